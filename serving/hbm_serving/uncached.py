"""A server without caches, for comparison: every row comes from host memory, all is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hbm_pool.host.link import LinkModel
from hbm_pool.host.row_store import RowStore

from hbm_serving.config import ModelConfig
from hbm_serving.features import Ints
from hbm_serving.memory import Hold, MemoryLayout, RowCount, as_row_bytes
from hbm_serving.metrics import Sample
from hbm_serving.weights import DTYPES


class HostMemory:
    """Implements `memory.Memory` without a pool: every row travels over the link, every time."""

    def __init__(
        self,
        model: ModelConfig,
        stores: Mapping[str, RowStore],
        layout: MemoryLayout,
        device: torch.device,
        link: LinkModel,
    ) -> None:
        self.device = device
        self.layout = layout
        self.layer_pages: Sequence[torch.Tensor] | None = None
        self.model_version = 0
        self._tables = model.tables
        self._stores = dict(stores)
        self._link = link
        self._row_epoch = 0
        self._accesses = 0
        self._misses = 0

    @property
    def alpha(self) -> float:
        return 0.0

    def begin_batch(self) -> None:
        """Nothing moves here."""

    def idle(self) -> bool:
        return False  # nothing moves here

    def acquire(self, user: int, pages: npt.NDArray[np.uint32], tokens: int) -> Hold | None:
        return None

    def commit(self, hold: Hold) -> None:
        raise AssertionError("nothing is held without a cache")

    def abort(self, hold: Hold) -> None:
        raise AssertionError("nothing is held without a cache")

    def order_pages(self, holds: Sequence[Hold]) -> None:
        """There are no pages."""

    def gather(self, ids: Mapping[str, torch.Tensor], out: Mapping[str, torch.Tensor]) -> RowCount:
        """Every row is a miss; a row that a batch asks for twice is copied once."""
        accesses = misses = copied_bytes = 0
        by_class = [0] * len(self.layout.classes)
        missed_at = []
        for index, table in enumerate(self._tables):
            if table.name not in ids:
                continue
            unique, first, inverse = np.unique(
                ids[table.name].numpy(), return_index=True, return_inverse=True
            )
            rows = torch.empty(len(unique), table.width, dtype=DTYPES[table.dtype])
            self._stores[table.name].read(unique, rows.view(torch.uint8).numpy())
            torch.index_select(
                rows.to(self.device),
                0,
                torch.from_numpy(inverse).to(self.device),
                out=out[table.name],
            )
            missed_at.append(first)
            accesses += len(inverse)
            misses += len(unique)
            by_class[self.layout.table_class[index]] += len(unique)
            copied_bytes += rows.nbytes
        self._link.foreground(copied_bytes)
        self._accesses += accesses
        self._misses += misses
        return RowCount(accesses, misses, tuple(by_class), tuple(missed_at))

    def set_target_alpha(self, alpha: float, *, drop_only: bool) -> None:
        """There is no α."""

    def set_row_prices(self, row_ms: Sequence[float]) -> None:
        """There is nothing to divide."""

    def set_refill_rate(self, bytes_per_s: float) -> None:
        """There is nothing to refill."""

    def push_rows(self, table: str, ids: Ints, values: npt.NDArray[np.float32]) -> int:
        (spec,) = (spec for spec in self._tables if spec.name == table)
        self._stores[table].write(ids, as_row_bytes(values, spec.dtype))
        self._row_epoch += 1
        return self._row_epoch

    def set_model_version(self, version: int) -> None:
        self.model_version = version

    def on_kv_event(self, callback: Callable[[int, int], None]) -> None:
        """No KV, no events."""

    def shard_rows(self, shards: int) -> npt.NDArray[np.uint32]:
        return np.zeros(0, dtype=np.uint32)

    def check_integrity(self) -> list[str]:
        return []

    def fill(self, record: npt.NDArray[Any]) -> None:
        record["emb_accesses"] = self._accesses
        record["emb_misses"] = self._misses
        record["foreground_bytes"] = self._link.counters().foreground_bytes
        record["row_epoch"] = self._row_epoch

    def samples(self) -> Iterable[Sample]:
        yield Sample(
            "hbm_pool_foreground_bytes",
            "Bytes of rows copied to the device for requests.",
            "counter",
            self._link.counters().foreground_bytes,
        )

    def close(self) -> None:
        for store in self._stores.values():
            store.close()
