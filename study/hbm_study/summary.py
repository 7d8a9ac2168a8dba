"""What a run comes down to: the figures that tables, goals and intervals are made of."""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from hbm_policy.reading import Reason
from hbm_sim.loop import Run
from hbm_sim.optimum import StaticRun, latencies

from hbm_study.arms.config import OracleArm
from hbm_study.arms.fixed import oracle_alpha
from hbm_study.scene import SceneData
from hbm_study.statistics import distance_to_plateau, over_time, percentile, step_histogram

Floats = npt.NDArray[np.float64]
WINDOWS: Final = 60
"""Error over time is kept in so many equal windows of the stream."""
STEP_EDGES: Final = (-0.05, -0.02, -0.01, -0.0005, 0.0005, 0.01, 0.02, 0.05)
"""Edges of the histogram of |Δα| per decision."""
LATENCY_EDGES_MS: Final = tuple(float(edge) for edge in np.geomspace(1.0, 1e4, 81).round(4))


class Outcome(NamedTuple):
    """What all kinds of runs have in common. Columns of the stream."""

    latency_ms: Floats  # NaN: refused
    service_ms: Floats
    gather_ms: Floats
    compute_ms: Floats
    kv_hit: npt.NDArray[np.bool_]
    missed_rows: Floats


class Track(NamedTuple):
    """Columns of the ticks."""

    time_s: Floats
    alpha: Floats
    target: Floats
    anchor: Floats
    reasons: npt.NDArray[np.int64]
    refill_bytes: Floats


def outcome_of(run: Run | StaticRun) -> Outcome:
    """Of a closed loop or of a static split."""
    return Outcome(*(getattr(run, name) for name in Outcome._fields))


def static_track(data: SceneData, alpha: float) -> Track:
    """One entry per request: nothing ever changes."""
    return _held(data, np.full(len(data.stream), alpha))


def stitched(data: SceneData, config: OracleArm) -> tuple[Outcome, Track]:
    """The free oracle: each request as served by a node that always was at its regime's α*."""
    wanted = oracle_alpha(config, data.known)
    parts = {alpha: data.static(alpha) for alpha in np.unique(wanted).tolist()}
    columns: dict[str, Any] = {}
    for name in ("gather_ms", "compute_ms", "service_ms", "kv_hit", "missed_rows"):
        columns[name] = np.select(
            [wanted == alpha for alpha in parts], [getattr(run, name) for run in parts.values()]
        )
    latency_ms = latencies(data.stream, data.spec, columns["gather_ms"], columns["compute_ms"])
    return Outcome(latency_ms=latency_ms, **columns), _held(data, wanted)


def _held(data: SceneData, alpha: Floats) -> Track:
    """α at each request, without decisions."""
    zeros = np.zeros(len(alpha))
    nothing = np.full(len(alpha), math.nan)
    return Track(data.stream.arrival_s, alpha, alpha, nothing, zeros.astype(np.int64), zeros)


def summarise(data: SceneData, outcome: Outcome, track: Track) -> dict[str, Any]:
    """Figures pooled, by regime and over time; plain data. Warm-up is never counted."""
    stream = data.stream
    counted = stream.counted
    slo_ms = data.spec.info.slo_ms
    request = np.minimum(np.searchsorted(stream.arrival_s, track.time_s), len(stream) - 1)
    star, low, high = _references(data, request)
    anchor_error = np.abs(track.anchor - star)
    applied_error = np.abs(track.alpha - star)
    pooled = figures_of(outcome, counted, slo_ms)
    regimes: dict[str, dict[str, Any]] = {}
    held_ms = 0.0
    for index, regime in enumerate(stream.regimes):
        whole = stream.of_regime(regime, settled=False)
        best = data.best.get(regime)
        if not whole.any() or best is None:
            continue
        settled = stream.of_regime(regime)
        ticks = (stream.regime[request] == index) & stream.settled[request]
        ticks &= stream.counted[request]
        figures = figures_of(outcome, whole, slo_ms)
        held_ms += best.service_ms * int(whole.sum())
        served_ms = outcome.service_ms[settled & ~np.isnan(outcome.latency_ms)]
        anchor_off = distance_to_plateau(track.anchor, low, high)
        applied_off = distance_to_plateau(track.alpha, low, high)
        regimes[regime] = {
            **figures,
            "service_settled_ms": _mean(served_ms),
            "regret": figures["service_ms"] / best.service_ms - 1.0,
            "alpha": _mean(track.alpha[ticks]),
            "anchor_error": _known_mean(anchor_error[ticks]),
            "anchor_distance": _known_mean(anchor_off[ticks]),
            "applied_error": _mean(applied_error[ticks]),
            "applied_distance": _mean(applied_off[ticks]),
            "alpha_star": best.by_service.alpha,
            "plateau_low": best.by_service.plateau_low,
            "plateau_high": best.by_service.plateau_high,
            "alpha_star_tail": best.by_tail.alpha,
        }
    first = int(np.searchsorted(track.time_s, stream.arrival_s[stream.warm_up]))
    opened = (track.reasons & int(Reason.GATE_OPEN)) != 0
    reasons = track.reasons[first:]
    position = np.maximum(request[first:] - stream.warm_up, 0)
    windows = (WINDOWS, int(counted.sum()))
    return {
        "pooled": pooled,
        "regimes": regimes,
        "regret": pooled["service_ms"] * int(counted.sum()) / held_ms - 1.0 if held_ms else None,
        "hours": float(stream.arrival_s[-1] - stream.arrival_s[stream.warm_up]) / 3600.0,
        "gate": gate_alarms(data, track.time_s[first:], opened[first:]),
        "decisions": len(reasons),
        "reasons": _reason_counts(reasons),
        "alpha_mean": _mean(track.alpha[first:]),
        "alpha_steps": step_histogram(track.alpha[first:], STEP_EDGES),
        "alpha_over_time": over_time(track.alpha[first:], position, *windows),
        "star_over_time": over_time(star[first:], position, *windows),
        "anchor_error_over_time": over_time(anchor_error[first:], position, *windows),
        "applied_error_over_time": over_time(applied_error[first:], position, *windows),
        "latency_histogram": np.histogram(
            outcome.latency_ms[counted], bins=[0.0, *LATENCY_EDGES_MS, np.inf]
        )[0].tolist(),
    }


def gate_alarms(
    data: SceneData, time_s: Floats, opened: npt.NDArray[np.bool_]
) -> dict[str, float | int]:
    """How the burst gate met the changes of regime. The first opening after a change and before the
    next one has detected it; every other opening is a false alarm."""
    stream = data.stream
    alarms = time_s[1:][np.diff(opened.astype(np.int8)) > 0]
    begins = np.flatnonzero(np.diff(stream.regime[stream.counted])) + 1 + stream.warm_up
    changes = stream.arrival_s[begins]
    delays = []
    ends = np.append(changes, math.inf)[1:]
    for change, following in zip(changes, ends, strict=True):
        met = alarms[(alarms >= change) & (alarms < following)]
        if len(met):
            delays.append(float(met[0] - change))
    return {
        "openings": len(alarms),
        "changes": len(changes),
        "detected": len(delays),
        "delay_s": sum(delays),
        "false": len(alarms) - len(delays),
    }


def totals(run: Run) -> dict[str, Any]:
    """Moves and bytes of a closed loop. A ramp of commands is one move."""
    commanded = np.diff(run.target) != 0.0
    return {
        "moves": int((np.diff(commanded.astype(np.int8), prepend=0) > 0).sum()),
        "moved_bytes": run.moved_bytes,
        "refill_bytes": run.total_refill_bytes,
        "foreground_bytes": run.foreground_bytes,
        "critical_share": run.critical_share,
    }


def no_moves(data: SceneData, outcome: Outcome) -> dict[str, Any]:
    """The same of a run without any."""
    row_bytes = data.spec.info.classes[0].row_bytes
    return {
        "moves": 0,
        "moved_bytes": 0,
        "refill_bytes": 0.0,
        "foreground_bytes": float(outcome.missed_rows.sum()) * row_bytes,
        "critical_share": 0.0,
    }


def _references(data: SceneData, request: npt.NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    """α* and plateau of the regime that was on at each of these requests."""
    rows = []
    for regime in data.stream.regimes:
        best = data.best.get(regime)
        if best is None:
            rows.append((math.nan, math.nan, math.nan))
        else:
            star = best.by_service
            rows.append((star.alpha, star.plateau_low, star.plateau_high))
    columns = np.array(rows)[data.stream.regime[request]]
    return columns[:, 0], columns[:, 1], columns[:, 2]


class Timed(Protocol):
    """What figures are made of; columns of the stream."""

    @property
    def latency_ms(self) -> Floats: ...
    @property
    def service_ms(self) -> Floats: ...
    @property
    def kv_hit(self) -> npt.NDArray[np.bool_]: ...


def figures_of(outcome: Timed, mask: npt.NDArray[np.bool_], slo_ms: float) -> dict[str, Any]:
    """Percentiles over offered requests: a refused one was never answered."""
    latency_ms = outcome.latency_ms[mask]
    refused = np.isnan(latency_ms)
    offered = np.where(refused, np.inf, latency_ms)
    service_ms = outcome.service_ms[mask][~refused]
    return {
        "requests": len(latency_ms),
        "refused": int(refused.sum()),
        **{f"p{share}_ms": _finite(percentile(offered, share / 100.0)) for share in (50, 95, 99)},
        "latency_ms": _mean(latency_ms[~refused]),
        "service_ms": _mean(service_ms),
        "slo": float((offered <= slo_ms).mean()) if len(offered) else math.nan,
        "kv_hit": _mean(outcome.kv_hit[mask][~refused].astype(np.float64)),
    }


def _finite(value: float) -> float:
    """More than 1 % refused: a percentile that was never reached, as a day, for JSON's sake."""
    return value if math.isfinite(value) else 8.64e7


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan


def _known_mean(values: Floats) -> float | None:
    """None for an arm without an anchor."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _reason_counts(reasons: npt.NDArray[np.int64]) -> dict[str, int]:
    """How many decisions gave each reason."""
    counts = {flag.name or "": int(((reasons & int(flag)) != 0).sum()) for flag in Reason}
    return {name: count for name, count in counts.items() if count}
