"""What the learned residual sees of one decision: dimensionless numbers, by versioned names.

No milliseconds, bytes or counts: a policy that was trained on simulated nodes must find the same
numbers on a real one. Ratios are of late: moving averages over `AVERAGE_TICKS` ticks of what the
server counts. A name never changes its meaning under the same version.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Final, NamedTuple

from hbm_policy.anchor import Estimate
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
_GAIN_MIN: Final = 1e-4
_MOST: Final = 1e3
"""No feature is larger; a graph clips closer than that."""


_new: Final = tuple.__new__


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
        whole = lookups - was_lookups
        if whole > 0:
            kv_hit += _WEIGHT * ((hits - was_hits) / whole - kv_hit)
        whole = accesses - was_accesses
        if whole > 0:
            emb_miss += _WEIGHT * ((misses - was_misses) / whole - emb_miss)
        tokens = computed - was_computed
        whole = tokens + reused - was_reused
        if whole > 0:
            recompute += _WEIGHT * (tokens / whole - recompute)
        # What is measured may be no number: then the average stays.
        gathered_ms = gather_ms - was_gather_ms
        both_ms = gathered_ms + compute_ms - was_compute_ms
        if 0.0 < both_ms < math.inf and 0.0 <= gathered_ms <= both_ms:
            gather += _WEIGHT * (gathered_ms / both_ms - gather)
        served_ms, elapsed_ms = service_ms - was_service_ms, (now_ns - was_ns) / 1e6
        if elapsed_ms > 0.0 and 0.0 <= served_ms < math.inf:
            load += _WEIGHT * (served_ms / elapsed_ms - load)
    else:
        kv_hit = _share(hits, lookups)
        emb_miss = _share(misses, accesses)
        recompute = _share(computed, computed + reused)
        gather = _share(gather_ms, gather_ms + compute_ms)
        load = 0.0
    memory = (
        now_ns,
        lookups,
        hits,
        reused,
        computed,
        accesses,
        misses,
        gather_ms,
        compute_ms,
        service_ms,
        kv_hit,
        emb_miss,
        recompute,
        gather,
        load,
    )
    anchor, gain, _, trust, grid, cost_ms, _, _, plateau = estimate
    alpha = reading.alpha
    slope, kv_cold, emb_cold = 0.0, 0.0, 0.0
    curve = reading.curve
    if trust > 0.0 and len(grid) > 1:
        right = bisect_right(grid, alpha, 1, len(grid) - 1)
        left = right - 1
        width, cost = grid[right] - grid[left], cost_ms[left]
        rise = cost_ms[right] - cost
        share = (alpha - grid[left]) / width
        share = 0.0 if share < 0.0 else 1.0 if share > 1.0 else share
        slope = rise / (width * (cost + share * rise))
        # Both are predictions of a pool that is warm at α: the difference is what a move cost.
        if curve is not None and len(curve.emb_miss_ratio) == len(grid):
            hit, miss = curve.kv_hit_ratio, curve.emb_miss_ratio
            kv_cold = hit[left] + share * (hit[right] - hit[left]) - kv_hit
            emb_cold = emb_miss - miss[left] - share * (miss[right] - miss[left])
    slots = reading.emb_slots or 1
    slo_ms = reading.slo_ms
    cost_level, arrivals_level = gating.cost_level, gating.arrivals_level
    moved = accesses - state.move_accesses
    backlog = reading.refill_backlog_rows / slots
    features = (
        anchor - alpha if anchor == anchor else 0.0,
        state.goal - state.target,
        math.log10(gain + _GAIN_MIN),
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
        backlog if backlog < _MOST else _MOST,
    )
    return _new(Observed, (features, memory))


def _share(part: float, whole: float) -> float:
    """0 for what can be no share: counters and times come from outside."""
    return part / whole if 0.0 < whole < math.inf and 0.0 <= part <= whole else 0.0


def _log_ratio(value: float, goal: float) -> float:
    if goal <= 0.0:
        return 0.0
    ratio = value / goal
    return math.log(ratio if LOG_MIN < ratio < _MOST else LOG_MIN if ratio <= LOG_MIN else _MOST)
