"""What the learned residual sees of one decision: dimensionless numbers, by versioned names.

No milliseconds, bytes or counts: a policy that was trained on simulated nodes must find the same
numbers on a real one. Ratios are of late: moving averages over `AVERAGE_TICKS` ticks of what the
server counts. A name never changes its meaning under the same version.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Final, NamedTuple

from hbm_policy.anchor import Estimate, cost_at
from hbm_policy.reading import Gating, PolicyState, Reading

OBSERVATION_VERSION: Final = 1
OBSERVATION_NAMES: Final = (
    "anchor_ahead",  # α̂ - α
    "target_ahead",  # what is left of the move under way, in α
    "log_gain",  # log10 of the predicted saving of going to α̂, share of the cost, + 1e-4
    "slope",  # of the cost at α, per unit of α, as a share of the cost
    "plateau",  # half the width of the interval around α̂ in which the cost is within 1 %
    "kv_hit",  # requests that reused KV, share
    "kv_cold",  # what the twin expects of that at α, minus what is
    "emb_miss",  # rows missed, share of those looked up
    "emb_cold",  # what is, minus what the twin expects at α
    "recompute",  # history tokens computed, share of all
    "gather",  # gather, share of the time of gather and compute
    "log_load",  # ln of the share of the time in which the server computes or gathers
    "log_p50_slo",  # ln of the median latency over the latency goal; 0 without a goal
    "log_p99_slo",  # the same of the 99th percentile
    "arrivals_z",  # newest arrivals, in standard deviations from what is normal
    "alarm",  # evidence of a change of regime; ±1 opens the gate
    "since_alarm",  # ticks since the gate opened, as exp(-ticks / 16)
    "since_move",  # ln of 1 + EMB accesses per slot since the last move
    "refill_backlog",  # rows that wait for refill, share of the slots
)
"""What the places of an observation are."""
AVERAGE_TICKS: Final = 16.0
LOG_MIN: Final = 1e-3
"""Ratios below this are this, before their logarithm."""

_WEIGHT: Final = 1.0 / AVERAGE_TICKS
_ALARM_TICKS: Final = 16.0
_WITHIN: Final = 1.01
_GAIN_MIN: Final = 1e-4
_MOST: Final = 1e3
"""No feature is larger; a graph clips closer than that."""


class Observed(NamedTuple):
    """One observation, and what the next one needs of it."""

    features: tuple[float, ...]
    memory: tuple[float, ...]


NOTHING_OBSERVED: Final = (0.0,) * len(OBSERVATION_NAMES)


def observe(reading: Reading, state: PolicyState, estimate: Estimate, gating: Gating) -> Observed:
    """The features of this reading. `state.observed` is () at first and after a restart."""
    traffic = reading.traffic
    (
        _,
        _,
        p50_ms,
        p99_ms,
        _,
        lookups,
        hits,
        reused,
        computed,
        misses,
        gather_ms,
        compute_ms,
        service_ms,
    ) = traffic
    accesses, now_ns = reading.emb_accesses, reading.now_ns
    if state.observed:
        (
            was_ns,
            was_lookups,
            was_hits,
            was_reused,
            was_computed,
            was_accesses,
            was_misses,
            was_gather_ms,
            was_compute_ms,
            was_service_ms,
            kv_hit,
            emb_miss,
            recompute,
            gather,
            load,
        ) = state.observed
        kv_hit = _toward(kv_hit, hits - was_hits, lookups - was_lookups)
        emb_miss = _toward(emb_miss, misses - was_misses, accesses - was_accesses)
        tokens = computed - was_computed
        recompute = _toward(recompute, tokens, tokens + reused - was_reused)
        gathered_ms = gather_ms - was_gather_ms
        gather = _toward(gather, gathered_ms, gathered_ms + compute_ms - was_compute_ms)
        load = _toward(load, service_ms - was_service_ms, (now_ns - was_ns) / 1e6)
    else:
        kv_hit = hits / lookups if lookups else 0.0
        emb_miss = misses / accesses if accesses else 0.0
        recompute = computed / (computed + reused) if computed else 0.0
        gather = gather_ms / (gather_ms + compute_ms) if gather_ms > 0.0 else 0.0
        load = 0.0
    memory = (
        float(now_ns),
        float(lookups),
        float(hits),
        float(reused),
        float(computed),
        float(accesses),
        float(misses),
        gather_ms,
        compute_ms,
        service_ms,
        kv_hit,
        emb_miss,
        recompute,
        gather,
        load,
    )
    alpha, anchor = reading.alpha, estimate.anchor
    grid, cost_ms = estimate.curve_alpha, estimate.curve_cost_ms
    slope, plateau, kv_cold, emb_cold = 0.0, 0.0, 0.0, 0.0
    curve = reading.curve
    if estimate.trust > 0.0 and len(grid) > 1:
        right = bisect_right(grid, alpha)
        right = 1 if right == 0 else min(right, len(grid) - 1)
        rise = cost_ms[right] - cost_ms[right - 1]
        slope = rise / (grid[right] - grid[right - 1]) / cost_ms[right]
        plateau = _half_width(grid, cost_ms)
        # Both are predictions of a pool that is warm at α: the difference is what a move cost.
        if curve is not None and len(curve.emb_miss_ratio) == len(grid):
            kv_cold = cost_at(grid, curve.kv_hit_ratio, alpha) - kv_hit
            emb_cold = emb_miss - cost_at(grid, curve.emb_miss_ratio, alpha)
    slots = reading.emb_slots or 1
    slo_ms = reading.slo_ms
    cost_level, arrivals_level = gating.cost_level, gating.arrivals_level
    moved = accesses - state.move_accesses
    features = (
        anchor - alpha if anchor == anchor else 0.0,
        state.goal - state.target,
        math.log10(estimate.gain + _GAIN_MIN),
        slope,
        plateau,
        kv_hit,
        kv_cold,
        emb_miss,
        emb_cold,
        recompute,
        gather,
        math.log(load if load > LOG_MIN else LOG_MIN),
        _log_ratio(p50_ms, slo_ms),
        _log_ratio(p99_ms, slo_ms),
        gating.arrivals_z,
        cost_level if abs(cost_level) > abs(arrivals_level) else arrivals_level,
        math.exp(-gating.since_ticks / _ALARM_TICKS),
        math.log1p(moved / slots if moved > 0 else 0.0),
        min(reading.refill_backlog_rows / slots, _MOST),
    )
    return Observed(features, memory)


def _toward(average: float, part: float, whole: float) -> float:
    """A moving average of part / whole; nothing new, or no number, leaves it as it is."""
    if 0.0 < whole < math.inf and 0.0 <= part < math.inf:
        average += _WEIGHT * (part / whole - average)
    return average


def _log_ratio(value: float, goal: float) -> float:
    if goal <= 0.0:
        return 0.0
    ratio = value / goal
    return math.log(ratio if LOG_MIN < ratio < _MOST else LOG_MIN if ratio <= LOG_MIN else _MOST)


def _half_width(grid: tuple[float, ...], cost_ms: tuple[float, ...]) -> float:
    limit = _WITHIN * min(cost_ms)
    inside = [alpha for alpha, cost in zip(grid, cost_ms, strict=True) if cost <= limit]
    return (inside[-1] - inside[0]) / 2.0
