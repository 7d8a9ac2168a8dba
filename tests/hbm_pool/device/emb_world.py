"""A small embedding cache with tables whose true values the test knows."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hbm_pool.device.arena import Arena
from hbm_pool.device.embedding import EmbeddingCache
from hbm_pool.host.config import KVSpec, PoolShape, TableSpec
from hbm_pool.host.row_store import RamRowStore

EXTENT_BYTES = 2048
EXTENTS = 40
TABLES = (
    TableSpec("item", 1500, 16, "float32"),
    TableSpec("shop", 700, 16, "float32"),
    TableSpec("text", 400, 64, "bfloat16"),
    TableSpec("tiny", 300, 5, "int8"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class FaultyStore(RamRowStore):
    """Fails on request: `reads` and `writes` count down to the failure."""

    fail_reads = False
    fail_writes = False

    def read(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        if self.fail_reads:
            raise OSError("the disk is gone")
        super().read(ids, out)

    def write(self, ids: npt.NDArray[np.int64], values: npt.NDArray[np.uint8]) -> None:
        if self.fail_writes:
            half = ids.size // 2
            super().write(ids[:half], values[:half])
            raise OSError("the disk is full")
        super().write(ids, values)


LOOK_US = 50.0
"""Between two looks at a world's clock: budgets end after so many looks, whatever the machine does
meanwhile."""


class EmbWorld:
    """Cache, stores and the values every row has at this moment.

    Its clock goes on by `LOOK_US` with every look, unless the options name another one.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        tables: tuple[TableSpec, ...] = TABLES,
        extents: int = EXTENTS,
        extent_bytes: int = EXTENT_BYTES,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = PoolShape(
            pool_bytes=extents * extent_bytes,
            extent_bytes=extent_bytes,
            tables=tables,
            kv=KVSpec(layers=1, heads=1, head_dim=8, page_tokens=4),
            max_sequence_tokens=8,
        )
        self.values: dict[str, torch.Tensor] = {}
        self.stores: dict[str, FaultyStore] = {}
        for table in tables:
            drawn = self.rng.integers(-99, 99, (table.rows, table.width))
            values = torch.from_numpy(drawn).to(DTYPES[table.dtype])
            self.values[table.name] = values.clone()
            self.stores[table.name] = FaultyStore(values.view(torch.uint8).numpy(), table.name)
        self.arena = Arena(extents, extent_bytes, device)
        looks = itertools.count()
        options.setdefault("clock_s", lambda: next(looks) * LOOK_US * 1e-6)
        self.cache = EmbeddingCache(self.shape, self.arena, self.stores, **options)
        self.free = list(range(extents))

    def grow(self, count: int) -> None:
        taken, self.free = self.free[:count], self.free[count:]
        # Whoever had the extent before leaves its bytes behind.
        for extent in taken:
            begin = extent * self.arena.extent_bytes
            self.arena.storage[begin : begin + self.arena.extent_bytes] = 0xA5
        self.cache.grow(np.array(taken, np.int32))

    def give_back(self, extents: npt.NDArray[np.int32]) -> None:
        released = extents.tolist()
        assert len(set(released)) == len(released)
        assert not set(released) & set(self.free)
        self.free += released

    def draw(self, name: str, count: int, skew: float = 1.0) -> torch.Tensor:
        rows = len(self.values[name])
        ids = (self.rng.pareto(skew, count) * 20).astype(np.int64) % rows
        return torch.from_numpy(ids)

    def batch(self, count: int, skew: float = 1.0) -> dict[str, torch.Tensor]:
        return {
            name: self.draw(name, int(self.rng.integers(0, count + 1)), skew)
            for name in self.values
        }

    def buffers(self, ids: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        device = self.arena.device
        return {
            name: torch.full(
                (len(wanted), self.values[name].shape[1]), 77, dtype=self.values[name].dtype
            ).to(device)
            for name, wanted in ids.items()
        }

    def gather_and_check(self, ids: dict[str, torch.Tensor], *, beside_refill: bool = False) -> Any:
        out = self.buffers(ids)
        resident = {name: set(self.cache.resident_ids(name).tolist()) for name in ids}
        stats = self.cache.gather(ids, out)
        for name, wanted in ids.items():
            assert torch.equal(out[name].cpu(), self.values[name][wanted]), name
            missed_at = stats.missed_at.get(name, np.empty(0, np.int64))
            assert (np.diff(missed_at) > 0).all()
            missed = wanted[torch.from_numpy(missed_at.astype(np.int64))].tolist()
            absent = set(wanted.tolist()) - resident[name]
            if beside_refill:  # which may have brought some of them meanwhile
                assert len(missed) == len(set(missed))
                assert set(missed) <= absent, name
            else:
                assert sorted(missed) == sorted(absent), name
        assert stats.misses == sum(places.size for places in stats.missed_at.values())
        assert stats.accesses == sum(len(wanted) for wanted in ids.values())
        assert stats.unique == sum(wanted.unique().numel() for wanted in ids.values())
        assert stats.hits + stats.misses == stats.accesses
        return stats

    def check(self) -> None:
        assert self.cache.check_integrity() == []
        assert self.cache.check_rows() == []
        held = self.cache.extents().tolist()
        assert sorted(held + self.free) == list(range(self.arena.num_extents))
        assert self.cache.num_extents == len(held)
        assert sum(self.cache.class_extents()) == len(held)
