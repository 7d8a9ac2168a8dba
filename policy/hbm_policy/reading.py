"""The values that cross the policy: what one decision saw, what it decided, what it remembers.

All are immutable, so a recorded (reading, state) pair replays to the same decision. Times are ns of
CLOCK_MONOTONIC, costs ms per request, α the share of the pool's extents given to EMB.
"""

from __future__ import annotations

import math
from enum import IntFlag
from typing import Final, NamedTuple

from hbm_pool.contracts.records import Mode


class Reason(IntFlag):
    """Why a decision is what it is. One bit each: a decision has several."""

    description: str

    def __new__(cls, value: int, description: str = "") -> Reason:
        member = int.__new__(cls, value)
        member._value_ = value
        member.description = description
        return member

    # What kept the decision from being taken at all (the target is held).
    NO_TELEMETRY = 1 << 0, "the server has not published telemetry yet"
    TELEMETRY_STALE = 1 << 1, "the server's telemetry is too old: it is dead or stuck"
    TELEMETRY_INVALID = 1 << 2, "the server's telemetry holds impossible values"
    CLOCK_BACKWARDS = 1 << 3, "a clock went backwards"
    EPOCH_MISMATCH = 1 << 4, "telemetry belongs to another boot of the server than its file"
    SERVER_RESTARTED = 1 << 5, "the server restarted: what was known about the old one is dropped"
    INTENT_MISSING = 1 << 6, "nobody has said yet what this sidecar may do"
    INTENT_INVALID = 1 << 7, "the partition asked for has impossible values"
    DRAINING = 1 << 8, "the server drains and takes nothing new"
    # Mode.
    MODE_HOLD = 1 << 9, "mode hold: α stays as it is"
    MODE_FIXED = 1 << 10, "mode fixed: α is the given one"
    MODE_RECOMMEND = 1 << 11, "mode recommend: decided and published, not applied"
    # The anchor.
    CURVES_MISSING = 1 << 12, "the twin has published nothing about this server yet"
    CURVES_STALE = 1 << 13, "the twin's curve is too old: the twin is dead or stuck"
    CURVES_INVALID = 1 << 14, "the twin's curve holds impossible values"
    TWIN_COLD = 1 << 15, "the twin's virtual caches are not warm enough to be trusted"
    ANCHOR_MOVED = 1 << 16, "the best α changed"
    ANCHOR_KEPT = 1 << 17, "the best α stays: another one would save too little"
    # The move.
    SMALL_GAIN = 1 << 18, "moving would save too little"
    SMALL_CHANGE = 1 << 19, "α is close enough to where it should be"
    DWELL = 1 << 20, "the last move is too recent for another one"
    MOVE_STARTED = 1 << 21, "a move towards the best α starts"
    RAMPING = 1 << 22, "a move is under way, at its limited speed"
    MOVE_FINISHED = 1 << 23, "the move has reached its goal"
    MOVE_STOPPED = 1 << 24, "the move stops early: the best α went to the other side"
    BOUNDED = 1 << 25, "the bounds of α cut the wish short"
    SERVER_MOVING = 1 << 26, "the pool is still moving extents"
    SERVER_LIMITED = 1 << 27, "the server took the command but aims elsewhere: its target counts"
    # Layers above the anchor.
    GATE_OPEN = 1 << 28, "the burst gate is open: newest evidence counts, moves are faster"
    RESIDUAL = 1 << 29, "the learned correction has a say"
    # Refill.
    REFILL_PAUSED = (
        1 << 30,
        "no refill: the link is busy, EMB gives extents up, or none is asked for",
    )
    # More of the layers above the anchor.
    GATE_RECOVERING = 1 << 31, "after a burst: no faster than the refill, and not back"
    RESIDUAL_WAITS = 1 << 32, "the learned correction puts the move off"
    RESIDUAL_INVALID = 1 << 33, "the learned correction is no number and is left out"
    GATE_BARRED = 1 << 34, "a move back has to wait until what moved is refilled"
    DROPPING = 1 << 35, "too much waits: EMB drops what it gives up instead of relocating it"


HOLDS: Final = int(
    Reason.NO_TELEMETRY
    | Reason.TELEMETRY_STALE
    | Reason.TELEMETRY_INVALID
    | Reason.CLOCK_BACKWARDS
    | Reason.EPOCH_MISMATCH
    | Reason.SERVER_RESTARTED
    | Reason.INTENT_MISSING
    | Reason.INTENT_INVALID
    | Reason.DRAINING
    | Reason.MODE_HOLD
)
"""Any of these bits: no command is written and the target is what it was."""


def describe(reasons: int) -> list[str]:
    """The reasons of a decision in words, lowest bit first. Unknown bits are named by number."""
    words = []
    for bit in range(reasons.bit_length()):
        flag = 1 << bit
        if reasons & flag:
            known = flag in Reason._value2member_map_
            words.append(Reason(flag).description if known else f"unknown reason (bit {bit})")
    return words


class Curve(NamedTuple):
    """The twin's prediction: mean cost per request for each candidate α."""

    monotonic_ns: int
    boot_epoch: int  # of the server whose requests were simulated
    requests: int  # simulated so far
    requests_lost: int
    warm: float  # share of the virtual caches that is warm, 0..1
    alpha: tuple[float, ...]  # ascending
    cost_ms: tuple[float, ...]
    kv_hit_ratio: tuple[float, ...] = ()  # of each candidate, once warm
    emb_miss_ratio: tuple[float, ...] = ()


CURVE_WINDOW_REQUESTS: Final = 32.0
"""Requests after which an old one counts for 37 % in a curve of the sidecar's twin."""


class Traffic(NamedTuple):
    """What the server has counted since its start, and two percentiles of late."""

    errors: int = 0
    overloads: int = 0  # refused
    latency_p50_ms: float = 0.0
    latency_p99_ms: float = 0.0
    queue_depth: int = 0  # waiting now
    kv_lookups: int = 0
    kv_hits: int = 0
    kv_tokens_reused: int = 0
    kv_tokens_computed: int = 0
    emb_misses: int = 0
    gather_ms: float = 0.0
    compute_ms: float = 0.0
    service_ms: float = 0.0


NO_TRAFFIC: Final = Traffic()


class Reading(NamedTuple):
    """Everything one decision may look at."""

    now_ns: int
    # The server's file and its telemetry.
    boot_epoch: int  # of the mapped file; 0: none
    telemetry_ns: int  # 0: never read
    telemetry_epoch: int
    alpha: float  # applied
    alpha_target: float  # where the pool is moving to
    command_generation: int  # newest command the server took over
    moving: bool
    draining: bool
    requests: int
    emb_accesses: int
    emb_slots: int  # rows the EMB extents of now can hold
    refill_backlog_rows: int
    link_busy: float  # share of the last window in which the link was in use
    extents: int
    server_alpha_min: float
    server_alpha_max: float
    # What the sidecar is asked to do; mode is None until somebody has said.
    mode: int | None
    alpha_min: float
    alpha_max: float
    alpha_fixed: float
    refill_bytes_per_s: float
    # The twin.
    curve: Curve | None
    alpha_initial: float = math.nan  # for a server that has had no command yet; NaN: its own
    pool_bytes: int = 0  # 0: not known
    slo_ms: float = 0.0  # latency goal; 0: none
    traffic: Traffic = NO_TRAFFIC


class PolicyState(NamedTuple):
    """What a decision hands to the next one."""

    boot_epoch: int = 0
    tick: int = 0
    now_ns: int = 0
    mode: int = int(Mode.HOLD)
    generation: int = 0  # of the newest command
    command_alpha: float = math.nan
    command_refill: float = 0.0
    # The move.
    target: float = math.nan  # commanded so far, before rounding to extents
    goal: float = math.nan  # where the move in progress ends
    move_size: float = 0.0  # |Δα| of the newest move
    move_ns: int = 0  # when the target last changed
    move_accesses: int = 0  # EMB accesses counted at that time
    move_requests: int = 0  # requests counted at that time
    emb_accesses: int = 0
    # The anchor.
    anchor: float = math.nan
    curve_alpha: tuple[float, ...] = ()
    curve_cost_ms: tuple[float, ...] = ()  # smoothed
    curve_requests: int = 0
    # The layers' own memories.
    gate: tuple[float, ...] = ()
    observed: tuple[float, ...] = ()
    waits: int = 0  # ticks in a row for which the residual has put a move off


class Gating(NamedTuple):
    """What a burst gate asks for."""

    open: bool  # the newest curve replaces the smoothed one
    slew_scale: float  # factor on the speed of moves
    memory: tuple[float, ...]  # kept for the next decision
    slew_limit_per_s: float = math.inf  # no move is faster, whoever asks
    barred: float = 0.0  # no move starts in this direction: -1.0, 1.0 or none
    phase: int = 0  # gate.Phase
    cost_level: float = 0.0  # evidence of another cost; 1: the gate opens; < 0: of a lower one
    arrivals_level: float = 0.0  # the same of the arrival rate
    arrivals_z: float = 0.0  # newest sample, in standard deviations
    since_ticks: float = math.inf  # since the gate last opened


class Correction(NamedTuple):
    """What a residual asks for, around the anchor."""

    alpha: float  # added to the anchor
    slew_scale: float  # factor on the speed of moves
    fraction_scale: float = 1.0  # factor on the part of the way that a move goes
    wait: bool = False  # no move starts now


STEADY: Final = Gating(open=False, slew_scale=1.0, memory=())
NO_CORRECTION: Final = Correction(alpha=0.0, slew_scale=1.0)


class Decision(NamedTuple):
    """What to do now. `state` goes into the next call."""

    apply: bool  # write a command
    target: float  # α to aim at: never NaN; on hold the α that is
    refill_bytes_per_s: float
    generation: int  # of the command; unchanged while its content is
    drop_only: bool  # hand extents over at once, without relocating rows
    reasons: int  # bit set of Reason
    tick: int
    mode: int
    alpha: float  # applied, as read (NaN when unknown)
    anchor: float  # α̂; NaN while unknown
    gain: float  # predicted saving of going to the anchor, share of service time (0 if unknown)
    trust: float  # how far the anchor is trusted, 0..1
    state: PolicyState
    # What each layer said.
    gating: Gating = STEADY
    correction: Correction = NO_CORRECTION
    wish: float = math.nan  # where the layers below the shield want α; NaN: no wish
