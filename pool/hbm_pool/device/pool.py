"""The pool: one arena, two caches, one movable split. What a model server integrates with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch

from hbm_pool.device.arena import Arena
from hbm_pool.device.kv import KVCache
from hbm_pool.device.streams import StreamClock
from hbm_pool.host.config import PoolConfig
from hbm_pool.host.extents import ExtentLedger
from hbm_pool.host.fences import EpochClock
from hbm_pool.host.kv_index import KVIndex
from hbm_pool.host.row_lag import RowLag
from hbm_pool.host.split import EmbSide, Split


class Pool:
    """Reserves the arena, wires both caches to one ledger, moves α. Any thread may call it.

    Locks: see `hbm_pool.host.split`.
    """

    def __init__(
        self,
        config: PoolConfig,
        emb: EmbSide,
        device: torch.device | str = "cpu",
        *,
        clock_s: Callable[[], float] = time.monotonic,
        spans: EpochClock | None = None,
    ) -> None:
        self.config = config
        self.arena = Arena(config.num_extents, config.bytes_per_extent, device)
        on_cpu = self.arena.device.type == "cpu"
        self.spans = spans or (EpochClock() if on_cpu else StreamClock(self.arena.device))
        self.ledger = ExtentLedger(config.num_extents)
        self._lock = threading.Lock()
        self._rows = RowLag(config.max_kv_row_lag_s, clock_s)
        index = KVIndex(
            self.ledger,
            self.spans,
            page_tokens=config.kv.page_tokens,
            pages_per_extent=config.pages_per_extent,
            max_sequence_tokens=config.max_sequence_tokens,
            rows=self._rows,
            eviction=config.kv_eviction,
        )
        self._split = Split(
            self.ledger,
            index,
            emb,
            self.spans,
            emb_extents=config.emb_extents(config.alpha),
            min_emb_extents=config.min_emb_extents,
            max_emb_extents=config.max_emb_extents,
            slice_budget_us=config.slice_budget_us,
            lock=self._lock,
        )
        self.kv = KVCache(self.arena, config.kv, index, self._lock, self.spans, self._split.reclaim)

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
        """The α to move to; see `Split.set_target`."""
        self._split.set_target(alpha, drop_only=drop_only)

    def begin_batch(self) -> None:
        """Batch boundary: frees what work has left, takes a target α over, does one slice."""
        self._split.step()

    def idle(self) -> None:
        """`begin_batch` for a server without requests; call it every 10 ms or so."""
        self._split.step()

    def can_reserve(self, kv_extents: int, emb_extents: int) -> bool:
        """The one joint predicate; see `Split.can_reserve`."""
        return self._split.can_reserve(kv_extents, emb_extents)

    def set_model_version(self, version: int) -> None:
        """New dense weights: all KV is void, also what open handles are about to commit."""
        with self._lock:
            self.kv.index.set_model_version(version)

    def close(self) -> None:
        """Frees the arena."""
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
