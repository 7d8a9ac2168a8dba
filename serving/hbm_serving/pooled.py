"""The pool as a model server sees it: rows and KV pages of one arena."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hbm_pool.device.pool import Pool
from hbm_pool.host.config import PoolConfig
from hbm_pool.host.kv_handle import KVHandle
from hbm_pool.host.row_store import RowStore

from hbm_serving.features import Ints
from hbm_serving.memory import Hold, MemoryLayout, RowCount
from hbm_serving.metrics import Sample
from hbm_serving.weights import DTYPES


class PooledMemory:
    """Implements `memory.Memory` over `hbm_pool.Pool`."""

    def __init__(
        self,
        config: PoolConfig,
        stores: Mapping[str, RowStore],
        layout: MemoryLayout,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.pool = Pool(config, stores=stores, device=device)
        self.device = self.pool.arena.device
        self.layer_pages: Sequence[torch.Tensor] | None = self.pool.kv.layer_pages
        self.model_version = 0
        self._stores = dict(stores)
        self._tables = {table.name: table for table in config.tables}

    @property
    def alpha(self) -> float:
        return self.pool.alpha

    def begin_batch(self) -> None:
        self.pool.begin_batch()

    def idle(self) -> bool:
        return self.pool.idle()

    def acquire(self, user: int, pages: npt.NDArray[np.uint32], tokens: int) -> Hold | None:
        return self.pool.kv.acquire(user, pages, tokens)

    def commit(self, hold: Hold) -> None:
        assert isinstance(hold, KVHandle)
        self.pool.kv.commit(hold)

    def abort(self, hold: Hold) -> None:
        assert isinstance(hold, KVHandle)
        self.pool.kv.abort(hold)

    def order_pages(self, holds: Sequence[Hold]) -> None:
        """Puts the present CUDA stream behind earlier work on the pages."""
        if self.device.type == "cuda":
            self.pool.kv.batch_indices([hold for hold in holds if isinstance(hold, KVHandle)])

    def gather(self, ids: Mapping[str, torch.Tensor], out: Mapping[str, torch.Tensor]) -> RowCount:
        found = self.pool.emb.gather(ids, out)
        return RowCount(
            found.accesses, found.misses, found.class_misses, tuple(found.missed_at.values())
        )

    def set_target_alpha(self, alpha: float, *, drop_only: bool) -> None:
        self.pool.set_target_alpha(alpha, drop_only=drop_only)

    def set_row_prices(self, row_ms: Sequence[float]) -> None:
        self.pool.emb.set_row_prices(row_ms)

    def set_refill_rate(self, bytes_per_s: float) -> None:
        self.pool.refiller.set_rate(bytes_per_s)

    def push_rows(self, table: str, ids: Ints, values: npt.NDArray[np.float32]) -> int:
        rows = torch.from_numpy(values).to(DTYPES[self._tables[table].dtype])
        return self.pool.push_rows(table, torch.from_numpy(ids), rows)

    def set_model_version(self, version: int) -> None:
        self.pool.set_model_version(version)
        self.model_version = version

    def on_kv_event(self, callback: Callable[[int, int], None]) -> None:
        self.pool.kv.on_event = callback

    def shard_rows(self, shards: int) -> npt.NDArray[np.uint32]:
        return self.pool.emb.shard_rows(shards)

    def check_integrity(self) -> list[str]:
        return self.pool.check_integrity()

    def fill(self, record: npt.NDArray[Any]) -> None:
        self.pool.stats().fill(record)

    def samples(self) -> Iterable[Sample]:
        stats = self.pool.stats()
        for name, kind, text in _STATS:
            yield Sample(f"hbm_pool_{name}", text, kind, float(getattr(stats, name)))
        for name, text in _CLASS_STATS:
            kind = "gauge" if name == "class_extents" else "counter"
            for index, value in enumerate(getattr(stats, name)):
                yield Sample(f"hbm_pool_{name}", text, kind, float(value), (("class", str(index)),))

    def close(self) -> None:
        self.pool.close()
        for store in self._stores.values():
            store.close()


_STATS = (
    ("alpha", "gauge", "EMB extents / all extents."),
    ("alpha_target", "gauge", "Where the pool is moving to, or holds."),
    ("extents_emb", "gauge", "Extents that hold rows."),
    ("extents_kv", "gauge", "Extents that hold KV."),
    ("extents_free", "gauge", "Extents nobody holds."),
    ("extents_pending", "gauge", "Extents given up, still read by work in flight."),
    ("moving", "gauge", "1 while a move is under way."),
    ("moves", "counter", "Finished changes of alpha; a ramp is one."),
    ("moved_extents", "counter", "Extents that changed sides, both directions."),
    ("relocated_rows", "counter", "Rows copied by planned moves."),
    ("reclaimed_extents", "counter", "Extents EMB gave up because KV's pins left no room."),
    ("kv_lookups", "counter", "KV lookups."),
    ("kv_hits", "counter", "KV lookups that reused at least one page."),
    ("kv_tokens_reused", "counter", "History tokens whose KV was reused."),
    ("kv_tokens_computed", "counter", "History tokens computed by requests with pages."),
    ("kv_users", "gauge", "Users with reusable KV."),
    ("kv_tokens", "gauge", "Reusable tokens."),
    ("kv_evicted_users", "counter", "Users that lost all their KV for want of room."),
    ("kv_trimmed_users", "counter", "Times a user lost the tail of the history."),
    ("kv_voided_users", "counter", "Users whose KV a version or old rows made worthless."),
    ("kv_pinned_extents", "gauge", "KV extents pinned by open handles."),
    ("emb_accesses", "counter", "Row lookups."),
    ("emb_hits", "counter", "Row lookups that hit."),
    ("emb_misses", "counter", "Row lookups that missed."),
    ("emb_conflict_misses", "counter", "Misses that found no place."),
    ("emb_ghost_hits", "counter", "Misses of rows that were evicted a short while ago."),
    ("emb_evictions", "counter", "Rows overwritten."),
    ("foreground_bytes", "counter", "Bytes of rows copied to the device for requests."),
    ("refill_bytes", "counter", "Bytes of rows copied in the background."),
    ("refill_rows", "counter", "Rows copied in the background."),
    ("refill_backlog_rows", "gauge", "Rows waiting for the refiller."),
    ("link_busy", "gauge", "Share of the last second in which the link was in use."),
    ("row_epoch", "gauge", "Pushes of rows so far."),
)
_CLASS_STATS = (
    ("class_extents", "EMB extents of a width class."),
    ("class_accesses", "Row lookups of a width class."),
    ("class_misses", "Row misses of a width class."),
)
