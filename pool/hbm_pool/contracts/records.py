"""Layout of the control block: every record that crosses between server and sidecar.

All numbers are little-endian and naturally aligned; the dtypes below *are* the layout and
`ABI_VERSION` goes up when one changes. Counters only grow while `boot_epoch` stays the same; a
reader takes differences. Ages are differences of CLOCK_MONOTONIC, which all processes of a pod
share.
"""

from __future__ import annotations

import dataclasses
from enum import IntEnum
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

ABI_VERSION: Final = 3
MAX_CLASSES: Final = 4
"""Row-width classes a pool may have."""
MAX_CURVE_POINTS: Final = 32
"""Candidate α of the twin."""


class Mode(IntEnum):
    """What the sidecar may do. `HOLD` is the state without any policy: keep α as it is."""

    HOLD = 0
    AUTO = 1
    RECOMMEND = 2
    FIXED = 3


class CostModel(IntEnum):
    """How a request's gather and compute combine into its service time."""

    SERIAL = 0
    """One after the other: the sum."""
    OVERLAP = 1
    """Rows of the next batch are gathered while this one computes: the slower of the two."""


TELEMETRY: Final = np.dtype(
    [
        ("monotonic_ns", "<i8"),
        ("boot_epoch", "<u8"),
        # The split.
        ("alpha", "<f8"),  # applied: EMB extents / all extents
        ("alpha_target", "<f8"),  # where the pool is moving to
        ("command_generation", "<u8"),  # newest command taken over
        ("extents_emb", "<i8"),
        ("extents_kv", "<i8"),
        ("extents_free", "<i8"),
        ("extents_pending", "<i8"),
        ("moving", "<i8"),  # 1 while a planned move is under way
        ("moves", "<u8"),  # changes of alpha that were finished; a ramp of commands is one
        ("moved_extents", "<u8"),
        ("relocated_rows", "<u8"),  # rows copied by planned moves
        # Requests.
        ("requests", "<u8"),
        ("errors", "<u8"),
        ("overloads", "<u8"),  # refused with 503
        ("uncached_requests", "<u8"),  # computed without KV pages for want of room
        ("batches", "<u8"),
        ("slo_met", "<u8"),  # of requests with a known deadline or the server's own SLO
        ("slo_total", "<u8"),
        ("latency_p50_ms", "<f8"),  # of the last window (latency_n requests)
        ("latency_p99_ms", "<f8"),
        ("latency_n", "<u8"),
        ("queue_depth", "<i8"),
        ("queue_ms", "<f8"),  # what a request that comes now would wait
        ("draining", "<i8"),  # 1 while the server finishes what it has and takes nothing new
        # KV.
        ("kv_lookups", "<u8"),
        ("kv_hits", "<u8"),  # lookups that reused at least one page
        ("kv_tokens_reused", "<u8"),
        ("kv_tokens_computed", "<u8"),  # history tokens, candidates not counted
        ("candidate_tokens", "<u8"),
        ("context_tokens", "<u8"),  # history tokens attended to, summed over computed tokens
        ("kv_users", "<i8"),  # resident now
        ("kv_evicted_users", "<u8"),
        # EMB: sums over classes, and per class.
        ("emb_accesses", "<u8"),
        ("emb_hits", "<u8"),
        ("emb_misses", "<u8"),
        ("emb_conflict_misses", "<u8"),
        ("emb_ghost_hits", "<u8"),
        ("emb_evictions", "<u8"),
        ("class_extents", "<i8", (MAX_CLASSES,)),
        ("class_accesses", "<u8", (MAX_CLASSES,)),
        ("class_misses", "<u8", (MAX_CLASSES,)),
        # Time, measured apart, summed over batches.
        ("gather_ms", "<f8"),
        ("compute_ms", "<f8"),
        ("service_ms", "<f8"),  # as the cost model combines them, measured
        # Of the very batches behind these times; the sums above run ahead by what is in flight.
        ("timed_accesses", "<u8"),
        ("timed_misses", "<u8", (MAX_CLASSES,)),
        # Link host -> device.
        ("foreground_bytes", "<u8"),
        ("refill_bytes", "<u8"),
        ("refill_rows", "<u8"),
        ("refill_backlog_rows", "<i8"),
        ("link_busy", "<f8"),  # share of the last window in which the link was in use
        # The server's own cost constants, in ms (hbm_serving.costs).
        ("cost_fixed_ms", "<f8"),  # per request
        ("cost_token_ms", "<f8"),  # per computed token (history or candidate)
        ("cost_token_context_ms", "<f8"),  # per computed token and token of its context
        ("cost_row_ms", "<f8", (MAX_CLASSES,)),  # per missed row of each class
        # Versions and cursors.
        ("model_version", "<u8"),
        ("row_epoch", "<u8"),
        ("residency_sequence", "<u8"),  # of the newest residency event
        ("requests_lost", "<u8"),  # samples that never came into the ring: too large, or dropped
    ],
    align=True,
)

COMMAND: Final = np.dtype(
    [
        ("monotonic_ns", "<i8"),
        ("boot_epoch", "<u8"),  # echoed from telemetry: a command for another boot is ignored
        ("generation", "<u8"),
        ("alpha", "<f8"),
        ("refill_bytes_per_s", "<f8"),
        ("drop_only", "<i8"),  # 1: hand extents over at once, rows are not relocated
    ],
    align=True,
)

INTENT: Final = np.dtype(
    [
        ("monotonic_ns", "<i8"),
        ("generation", "<u8"),
        ("mode", "<i8"),
        ("alpha_min", "<f8"),
        ("alpha_max", "<f8"),
        ("alpha_fixed", "<f8"),
        ("slo_ms", "<f8"),
        ("tick_ms", "<f8"),
        ("refill_bytes_per_s", "<f8"),
        ("alpha_initial", "<f8"),  # for a server that has had no command yet; NaN: its own
        # What a move may cost (hbm_policy.MoveConfig).
        ("slew_per_s", "<f8"),
        ("move_fraction", "<f8"),
        ("min_change", "<f8"),
        ("dwell_ms", "<f8"),
        # First eight bytes of the sha256 of the learned residual asked for; 0: none. The file is
        # `residual-HASH.onnx` in the run directory.
        ("residual_hash", "<u8"),
        ("policy_hash", "<u8"),
    ],
    align=True,
)

CURVES: Final = np.dtype(
    [
        ("monotonic_ns", "<i8"),
        ("boot_epoch", "<u8"),  # of the server whose requests were simulated
        ("points", "<i8"),
        ("requests", "<u8"),  # simulated so far (cumulative)
        ("window_requests", "<u8"),  # behind the values below
        ("requests_lost", "<u8"),  # ring loss seen by the twin (cumulative)
        ("warm", "<f8"),  # share of the virtual caches that has been filled, 0..1
        # What `cost_ms` is priced by, and where that comes from (hbm_policy.adapter).
        ("price_fixed_ms", "<f8"),
        ("price_token_ms", "<f8"),
        ("price_token_context_ms", "<f8"),
        ("price_row_ms", "<f8", (MAX_CLASSES,)),
        ("price_state", "<i8"),  # hbm_policy.costs.PriceState
        ("price_batches", "<u8"),  # batches that the prices were learned from
        ("alpha", "<f8", (MAX_CURVE_POINTS,)),
        ("cost_ms", "<f8", (MAX_CURVE_POINTS,)),  # mean per request, by the server's cost model
        # Sufficient statistics of the window, per request: with them `decide` can price anew.
        ("compute_tokens", "<f8", (MAX_CURVE_POINTS,)),
        ("context_tokens", "<f8", (MAX_CURVE_POINTS,)),
        ("rows_missed", "<f8", (MAX_CURVE_POINTS, MAX_CLASSES)),
        ("kv_hit_ratio", "<f8", (MAX_CURVE_POINTS,)),
        ("emb_miss_ratio", "<f8", (MAX_CURVE_POINTS,)),
    ],
    align=True,
)

DECISION: Final = np.dtype(
    [
        ("monotonic_ns", "<i8"),
        ("generation", "<u8"),  # of the command written with it; 0 when none was
        ("intent_generation", "<u8"),  # of the wish that it followed; 0: of none
        ("tick", "<u8"),
        ("alpha", "<f8"),  # applied, as read
        ("anchor", "<f8"),  # α̂; NaN while unknown
        ("target", "<f8"),
        ("refill_bytes_per_s", "<f8"),
        ("reasons", "<u8"),  # bit set of hbm_policy.Reason
        ("latency_us", "<f8"),  # first read of telemetry -> command sequence stored
        ("due_us", "<f8"),  # tick due -> command sequence stored
        ("gain", "<f8"),  # predicted saving of moving to the anchor, share of service time
        ("mode", "<i8"),
        # What each layer added (hbm_policy).
        ("gate_phase", "<i8"),  # gate.Phase
        ("gate_cost", "<f8"),  # evidence of a change of cost, 1: the gate opens; < 0: downwards
        ("gate_arrivals", "<f8"),  # the same for the arrival rate
        ("shift", "<f8"),  # the residual's correction of the anchor, as taken
        ("fraction_scale", "<f8"),  # its factor on how far a move goes
        ("slew_scale", "<f8"),  # factor on how fast, of gate and residual
        ("wish", "<f8"),  # where the layers below the shield want α; NaN: no wish
        ("goal", "<f8"),  # where the move under way ends
    ],
    align=True,
)
"""One record of the decision log: a ring in sidecar.cb, read by `hbm explain` and admin."""


@dataclasses.dataclass(frozen=True, slots=True)
class RowClass:
    """A width class as the sidecar must know it."""

    row_bytes: int
    rows_per_extent: int
    catalogue_rows: int
    tables: tuple[int, ...]
    """Indices (as in row keys) of the tables that live in this class."""


@dataclasses.dataclass(frozen=True, slots=True)
class TableMap:
    """An embedding table as the twin must know it: which row of it an item looks up."""

    name: str
    rows: int
    class_index: int
    hashed: bool
    """`history.table_rows`: False for the item table itself, True for a hashed side feature."""


@dataclasses.dataclass(frozen=True, slots=True)
class ServerInfo:
    """What does not change while a server lives. Stored as JSON in the info region."""

    node: str
    model: str
    extents: int
    extent_bytes: int
    page_tokens: int
    pages_per_extent: int
    max_sequence_tokens: int
    drop_block_tokens: int
    """Histories longer than `max_sequence_tokens` lose whole blocks of this length."""
    tables: tuple[TableMap, ...]
    classes: tuple[RowClass, ...]
    cost_model: CostModel
    sample_rate: float
    """Share of rows whose ids go into the request ring (spatial hash sample)."""
    alpha_min: float
    alpha_max: float
    slo_ms: float
    device: str
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    kv_eviction: Literal["tail", "whole"] = "tail"
    """What the coldest user loses when KV needs room (`PoolConfig.kv_eviction`)."""


class RequestSample(NamedTuple):
    """One served request as the twin needs it: independent of the present α.

    Row ids cover candidates and the *whole* history, whether the server looked them up or not;
    only sampled rows (`identity.sampled`) are listed. Position p of a history row is its token;
    a virtual KV cache that holds c tokens skips the rows with p < c.
    """

    user: int  # int64 user hash; 0 for an anonymous request (never cached)
    history_tokens: int
    candidates: int
    rows_total: int  # unsampled lookups: history (all tokens) + candidates, over all tables
    history_rows_total: int  # the part of it that belongs to the history
    page_fingerprints: npt.NDArray[np.uint32]  # [history_tokens // page_tokens]
    history_keys: npt.NDArray[np.uint64]  # [n] row keys, in order of position
    history_positions: npt.NDArray[np.uint32]  # [n]
    candidate_keys: npt.NDArray[np.uint64]  # [m]


class UserCached(NamedTuple):
    """User now has `tokens` tokens of KV resident (replaces what was said before)."""

    sequence: int
    user: int
    tokens: int


class UserEvicted(NamedTuple):
    """Nothing of the user's KV is resident any more."""

    sequence: int
    user: int


ResidencyEvent = UserCached | UserEvicted


class ResidencySnapshot(NamedTuple):
    """All resident users at residency sequence `sequence`, for a reader that lost its place."""

    boot_epoch: int
    sequence: int
    users: npt.NDArray[np.int64]  # [n]
    tokens: npt.NDArray[np.uint32]  # [n]
    shard_rows: npt.NDArray[np.uint32]  # [s] resident rows per EMB shard
