"""The pool: one arena, two caches, one movable split. What a model server integrates with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from hbm_pool.device.arena import Arena
from hbm_pool.device.embedding import EmbeddingCache
from hbm_pool.device.kv import KVCache
from hbm_pool.device.refill import Refiller
from hbm_pool.device.row_counters import EmbeddingCounters
from hbm_pool.device.streams import StreamClock
from hbm_pool.errors import RowStoreError
from hbm_pool.host.config import PoolConfig
from hbm_pool.host.extents import ExtentLedger, Owner
from hbm_pool.host.fences import EpochClock
from hbm_pool.host.kv_index import KVIndex
from hbm_pool.host.link import LinkModel
from hbm_pool.host.row_lag import RowLag
from hbm_pool.host.row_store import RowStore
from hbm_pool.host.split import Split
from hbm_pool.host.stats import PoolStats

UPKEEP_S: Final = 0.1
"""At most so often: extents between width classes, KV that lags too far behind pushed rows."""


class Pool:
    """Reserves the arena exactly, wires both caches to one ledger, moves α.

    `stores` holds the whole table for each of `config.tables`. `background` starts the refiller's
    thread. Any thread may call any method; `hbm_pool.host.split` says which lock guards what.
    Raises ArenaMemoryError when the memory is not there, ValueError when stores and tables do not
    fit together.
    """

    def __init__(
        self,
        config: PoolConfig,
        stores: Mapping[str, RowStore],
        device: torch.device | str = "cpu",
        *,
        background: bool = True,
        clock_s: Callable[[], float] = time.monotonic,
        spans: EpochClock | None = None,
    ) -> None:
        self.config = config
        self.arena = Arena(config.num_extents, config.bytes_per_extent, device)
        on_cpu = self.arena.device.type == "cpu"
        if spans is None:
            spans = EpochClock() if on_cpu else StreamClock(self.arena.device)
        self.ledger = ExtentLedger(config.num_extents)
        self.link = LinkModel(config.link_bytes_per_s if on_cpu else None)
        self.emb = EmbeddingCache(
            config,
            self.arena,
            stores,
            clock=spans,
            link=self.link,
            index=config.emb_index,
            clock_s=clock_s,
        )
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._rows = RowLag(config.max_kv_row_lag_s, clock_s)
        index = KVIndex(
            self.ledger,
            spans,
            page_tokens=config.kv.page_tokens,
            pages_per_extent=config.pages_per_extent,
            max_sequence_tokens=config.max_sequence_tokens,
            rows=self._rows,
            eviction=config.kv_eviction,
        )
        self._split = Split(
            self.ledger,
            index,
            self.emb,
            spans,
            emb_extents=config.emb_extents(config.alpha),
            min_emb_extents=config.min_emb_extents,
            max_emb_extents=config.max_emb_extents,
            slice_budget_us=config.slice_budget_us,
            lock=self._lock,
            clock_s=clock_s,
        )
        self.kv = KVCache(self.arena, config.kv, index, self._lock, spans, self._split.reclaim)
        self.refiller = Refiller(self.emb, config.refill_bytes_per_s, clock_s=clock_s)
        if background:
            self.refiller.start()
        self._accesses_at_move = 0
        self._next_upkeep_s = clock_s() + UPKEEP_S

    # -- the split -------------------------------------------------------------------------------

    @property
    def alpha(self) -> float:
        """EMB extents ÷ all extents, exactly."""
        return self._split.alpha

    @property
    def target_alpha(self) -> float:
        """The α the pool is moving to, or holds: the newest target, within the bounds."""
        return self._split.target_emb_extents / self.ledger.num_extents

    @property
    def moving(self) -> bool:
        """True from the request for another α until it is reached."""
        return self._split.moving

    def set_target_alpha(self, alpha: float, *, drop_only: bool = False) -> None:
        """The α to move to, kept within the bounds; taken over at the next batch boundary.

        A planned move goes on slice by slice; `drop_only` hands over at once and relocates
        nothing (for emergencies). Raises ValueError when α is not a number from 0 to 1.
        """
        self._split.set_target(alpha, drop_only=drop_only)

    def begin_batch(self) -> None:
        """Batch boundary: frees what work has left, takes a target α over, does one slice of a
        move (about `slice_budget_us`). Never waits for another thread's slice."""
        if not self._split.step():
            self._upkeep()
            return
        if not self._split.moving:
            self._accesses_at_move = self._emb_accesses()

    def idle(self) -> bool:
        """`begin_batch` for a server without requests; call it at least every 10 ms.

        True: a move has more to do. Call again as soon as you have seen that no request waits: one
        that comes meanwhile waits for one slice at most, and a large pool gives up a third of its
        extents in seconds instead of minutes.
        """
        self.begin_batch()
        return self._split.has_slices

    def can_reserve(self, kv_extents: int, emb_extents: int) -> bool:
        """Whether both sides could have that many more extents at the same time.

        The one joint predicate: every byte counts once, pins and the bounds of α are respected.
        """
        return self._split.can_reserve(kv_extents, emb_extents)

    # -- versions --------------------------------------------------------------------------------

    def set_model_version(self, version: int) -> None:
        """New dense weights: all KV is void, also what open handles are about to commit."""
        if version < 0:
            raise ValueError(f"model version is {version}; it must not be negative")
        with self._lock:
            self.kv.index.set_model_version(version)

    def push_rows(
        self, table: str, ids: torch.Tensor | npt.NDArray[np.int64], values: torch.Tensor
    ) -> int:
        """New values of rows, `[n]` ids, `[n, width]` values; returns the new row epoch.

        EMB and the store have them when this returns. KV computed from older values is reused for
        at most `max_kv_row_lag_s` more. Raises as `EmbeddingCache.push_rows`; rows of a failed
        push are unknown, so it counts as one for KV.
        """
        try:
            self.emb.push_rows(table, ids, values)
        except RowStoreError:
            self._rows_changed()
            raise
        return self._rows_changed() if len(ids) else self._rows.epoch

    def _rows_changed(self) -> int:
        with self._lock:
            epoch = self._rows.push()
            if self.config.max_kv_row_lag_s == 0.0:
                self.kv.index.void_lagging()
            return epoch

    # -- state -----------------------------------------------------------------------------------

    def stats(self) -> PoolStats:
        """All counters; those of one side belong together, the sides may be a call apart."""
        emb = self.emb.counters()
        link = self.link.counters()
        backlog = self.refiller.backlog
        with self._lock:
            ledger, kv, split = self.ledger, self.kv.index.counters(), self._split.counters()
            counts = [ledger.count(owner) for owner in Owner]
            return PoolStats(
                alpha=counts[Owner.EMB] / ledger.num_extents,
                alpha_target=split.target_emb_extents / ledger.num_extents,
                extents_emb=counts[Owner.EMB],
                extents_kv=counts[Owner.KV],
                extents_free=counts[Owner.FREE],
                extents_pending=counts[Owner.PENDING],
                moving=split.moving,
                moves=split.moves,
                moved_extents=split.moved_extents,
                relocated_rows=emb.relocated_rows,
                uncached_requests=kv.uncached,
                kv_lookups=kv.lookups,
                kv_hits=kv.hits,
                kv_tokens_reused=kv.tokens_reused,
                kv_tokens_computed=kv.tokens_computed,
                kv_users=kv.users,
                kv_evicted_users=kv.evicted_users,
                emb_accesses=emb.accesses,
                emb_hits=emb.hits,
                emb_misses=emb.misses,
                emb_conflict_misses=emb.conflict_misses,
                emb_ghost_hits=emb.ghost_hits,
                emb_evictions=emb.evictions,
                class_extents=tuple(c.extents for c in emb.classes),
                class_accesses=tuple(c.accesses for c in emb.classes),
                class_misses=tuple(c.misses for c in emb.classes),
                foreground_bytes=link.foreground_bytes,
                refill_bytes=link.refill_bytes,
                refill_rows=emb.refill_rows,
                refill_backlog_rows=backlog,
                link_busy=link.busy,
                model_version=self.kv.index.model_version,
                row_epoch=self._rows.epoch,
                kv_tokens=kv.tokens,
                kv_trimmed_users=kv.trimmed_users,
                kv_voided_users=kv.voided_users,
                kv_busy=kv.busy,
                kv_pinned_extents=kv.pinned_extents,
                kv_spare_extents=kv.spare_extents,
                reclaimed_extents=split.reclaimed_extents,
                accesses_per_slot_since_move=self._dwell(emb),
            )

    def _upkeep(self) -> None:
        now_s = self._clock_s()
        if now_s < self._next_upkeep_s:
            return
        self._next_upkeep_s = now_s + UPKEEP_S
        with self._lock:
            self.kv.index.void_lagging()
        self.emb.rebalance(self.config.slice_budget_us)

    def _emb_accesses(self) -> int:
        return sum(kind.accesses for kind in self.emb.classes)

    def _dwell(self, emb: EmbeddingCounters) -> float:
        slots = sum(
            c.extents * kind.rows_per_extent
            for c, kind in zip(emb.classes, self.config.classes, strict=True)
        )
        return (emb.accesses - self._accesses_at_move) / max(1, slots)

    def check_integrity(self) -> list[str]:
        """Violations; empty when all is sound. Scans the indices: for idle moments and tests.

        free + KV + EMB + pending == all extents, none with two owners, every pin live, the caches'
        own checks.
        """
        with self._split.moving_lock:
            with self._lock:
                found = self.ledger.violations() + self.kv.index.violations()
                lent = self.ledger.owned(Owner.EMB)
            if not np.array_equal(self.emb.extents(), lent):
                found.append("emb: its extents are not the extents the ledger lends to EMB")
            return found + self.emb.check_integrity()

    def close(self) -> None:
        """Stops the refiller and frees the arena; stores stay open, they are the caller's."""
        self.refiller.close()
        self.arena.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
