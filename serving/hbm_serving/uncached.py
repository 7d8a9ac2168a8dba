"""A server without caches, for comparison: every row comes from host memory, all is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hbm_serving.features import Ints
from hbm_serving.memory import Hold, MemoryLayout, RowCount
from hbm_serving.metrics import Sample


class HostMemory:
    """Implements `memory.Memory` without a pool. `copied(bytes)` waits as the link would."""

    def __init__(
        self,
        tables: Mapping[str, torch.Tensor],
        layout: MemoryLayout,
        device: torch.device,
        copied: Callable[[int], float],
    ) -> None:
        self.device = device
        self.layout = layout
        self.layer_pages: Sequence[torch.Tensor] | None = None
        self.model_version = 0
        self._tables = dict(tables)
        self._copied = copied
        self._row_epoch = 0
        self._accesses = 0
        self._bytes = 0

    @property
    def alpha(self) -> float:
        return 0.0

    def begin_batch(self) -> None:
        """Nothing moves here."""

    def idle(self) -> None:
        """Nothing moves here."""

    def acquire(self, user: int, pages: npt.NDArray[np.uint32], tokens: int) -> Hold | None:
        return None

    def commit(self, hold: Hold) -> None:
        raise AssertionError("nothing is held without a cache")

    def abort(self, hold: Hold) -> None:
        raise AssertionError("nothing is held without a cache")

    def order_pages(self, holds: Sequence[Hold]) -> None:
        """There are no pages."""

    def gather(self, ids: Mapping[str, torch.Tensor], out: Mapping[str, torch.Tensor]) -> RowCount:
        """Every access is a miss, but a row that a batch asks for twice is copied once."""
        accesses = misses = copied_bytes = 0
        by_class = [0] * len(self.layout.classes)
        for index, (name, table) in enumerate(self._tables.items()):
            if name not in ids:
                continue
            unique, inverse = torch.unique(ids[name], return_inverse=True)
            fetched = table.index_select(0, unique).to(self.device, non_blocking=True)
            torch.index_select(fetched, 0, inverse.to(self.device), out=out[name])
            accesses += len(inverse)
            misses += len(unique)
            by_class[self.layout.table_class[index]] += len(unique)
            copied_bytes += fetched.nbytes
        self._copied(copied_bytes)
        self._accesses += accesses
        self._bytes += copied_bytes
        return RowCount(accesses, misses, tuple(by_class))

    def set_target_alpha(self, alpha: float, *, drop_only: bool) -> None:
        """There is no α."""

    def set_refill_rate(self, bytes_per_s: float) -> None:
        """There is nothing to refill."""

    def push_rows(self, table: str, ids: Ints, values: npt.NDArray[np.float32]) -> int:
        rows = self._tables[table]
        rows[torch.from_numpy(ids)] = torch.from_numpy(values).to(rows.dtype)
        self._row_epoch += 1
        return self._row_epoch

    def set_model_version(self, version: int) -> None:
        self.model_version = version

    def on_kv_event(self, callback: Callable[[int, int], None]) -> None:
        """No KV, no events."""

    def shard_rows(self) -> npt.NDArray[np.uint32]:
        return np.zeros(0, dtype=np.uint32)

    def check_integrity(self) -> list[str]:
        return []

    def fill(self, record: npt.NDArray[Any]) -> None:
        record["emb_accesses"] = record["emb_misses"] = self._accesses
        record["foreground_bytes"] = self._bytes
        record["row_epoch"] = self._row_epoch

    def samples(self) -> Iterable[Sample]:
        yield Sample(
            "hbm_pool_foreground_bytes", "Bytes copied for requests.", "counter", self._bytes
        )

    def close(self) -> None:
        self._tables.clear()
