"""All counters of a pool at one moment, under the names of the telemetry record."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy.typing as npt

from hbm_pool.contracts.records import TELEMETRY


class PoolStats(NamedTuple):
    """Counters grow while the pool lives; what says "now" is a gauge.

    Fields up to `row_epoch` carry the names, units and meaning of `contracts.records.TELEMETRY`;
    `fill` writes them into such a record.
    """

    alpha: float
    alpha_target: float
    extents_emb: int
    extents_kv: int
    extents_free: int
    extents_pending: int
    moving: bool
    moves: int
    moved_extents: int
    relocated_rows: int
    uncached_requests: int
    kv_lookups: int
    kv_hits: int
    kv_tokens_reused: int
    kv_tokens_computed: int
    kv_users: int
    kv_evicted_users: int
    emb_accesses: int
    emb_hits: int
    emb_misses: int
    emb_conflict_misses: int
    emb_ghost_hits: int
    emb_evictions: int
    class_extents: tuple[int, ...]
    class_accesses: tuple[int, ...]
    class_misses: tuple[int, ...]
    foreground_bytes: int
    refill_bytes: int
    refill_rows: int
    refill_backlog_rows: int
    link_busy: float
    model_version: int
    row_epoch: int
    # Not in telemetry.
    kv_tokens: int
    """Reusable tokens now."""
    kv_trimmed_users: int
    """Times a user lost the tail of the history for want of room."""
    kv_voided_users: int
    """Users whose KV a new model version or too old rows made worthless."""
    kv_busy: int
    """Acquires that found the user's handle open."""
    kv_pinned_extents: int
    """Now, by open handles."""
    kv_spare_extents: int
    """Now held by KV for nobody."""
    reclaimed_extents: int
    """Extents EMB gave up because KV's pins left no room."""
    accesses_per_slot_since_move: float
    """EMB accesses since the last finished move ÷ slots: below .8 another move does harm (the
    dwell rule of the replacement's measurements)."""

    def fill(self, record: npt.NDArray[Any]) -> None:
        """Writes the shared fields into one TELEMETRY record; the others stay as they are."""
        for name in _SCALARS:
            record[name] = getattr(self, name)
        for name in _PER_CLASS:
            values: tuple[int, ...] = getattr(self, name)
            column = record[name]
            column[: len(values)] = values
            column[len(values) :] = 0


_SHARED = [name for name in PoolStats._fields if name in (TELEMETRY.names or ())]
_SCALARS = [name for name in _SHARED if not TELEMETRY[name].shape]
_PER_CLASS = [name for name in _SHARED if TELEMETRY[name].shape]
