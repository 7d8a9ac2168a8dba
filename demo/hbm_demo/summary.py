"""`summary.json`: what the demo measured. A percentile never stands without its n, and P99 is given
only from 1,000 requests on, else P95."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_load.records import Outcome, Records
from hbm_sidecar.explain import starts_move

from hbm_demo.arm import ArmResult
from hbm_demo.machine import describe
from hbm_demo.observe import COUNTERS, NodeSample
from hbm_demo.optimum import NodeOptimum, RegimeOptimum
from hbm_demo.score_check import ScoreCheck
from hbm_demo.settings import DemoSettings

SCHEMA_VERSION: Final = 1
P99_FROM_N: Final = 1000
_PACKAGES: Final = ("hbm-partition", "torch", "numpy", "numba", "fbgemm_gpu-cpu", "redis", "uvloop")


class NodeSeries(NamedTuple):
    """The samples of one node as columns."""

    time_s: npt.NDArray[np.float64]  # [n]
    alpha: npt.NDArray[np.float64]
    anchor: npt.NDArray[np.float64]  # α̂; NaN while unknown
    counters: dict[str, npt.NDArray[np.float64]]  # cumulative


def series_of(samples: list[NodeSample], node: str) -> NodeSeries:
    """Columns of one node's samples, in order of time."""
    mine = [sample for sample in samples if sample.node == node]
    return NodeSeries(
        time_s=np.array([sample.time_s for sample in mine]),
        alpha=np.array([sample.alpha for sample in mine]),
        anchor=np.array([sample.anchor for sample in mine]),
        counters={name: np.array([sample.counters[name] for sample in mine]) for name in COUNTERS},
    )


def percentiles(latency_ms: npt.NDArray[np.float64]) -> dict[str, float | int | None]:
    """p50 and p99 (p95 below 1,000 values) of the finite values, with their n."""
    values = latency_ms[np.isfinite(latency_ms)]
    tail = 99 if len(values) >= P99_FROM_N else 95
    return {
        "n": len(values),
        "p50_ms": _percentile(values, 50),
        f"p{tail}_ms": _percentile(values, tail),
    }


def summarise(
    settings: DemoSettings,
    arms: list[ArmResult],
    optima: Mapping[str, RegimeOptimum],
    check: ScoreCheck,
    slo_ms: float,
    seconds_in_all: float,
) -> dict[str, Any]:
    """The whole summary, ready for JSON. The first arm is the adaptive one."""
    adaptive = arms[0]
    by_arm = {result.arm.name: _arm(result, slo_ms) for result in arms}
    first = by_arm[adaptive.arm.name]
    return {
        "schema_version": SCHEMA_VERSION,
        "requests": sum(each["requests"] for each in by_arm.values()),
        "errors": sum(each["errors"] for each in by_arm.values()),
        "dropped": sum(each["dropped"] for each in by_arm.values()),
        "checked_scores": check.checked,
        "mismatched_scores": check.mismatched,
        "worst_score_error": check.worst_error,
        "first_mismatch": check.first_mismatch,
        "integrity_violations": sum(len(each["integrity_violations"]) for each in by_arm.values()),
        "slo_ms": slo_ms,
        "arms": by_arm,
        "alpha": first["alpha"],
        "evictions": first["evictions"],
        "refill_bytes": first["refill_bytes"],
        "decision_us": first["decision_us"],
        "alpha_star": _optima(optima, adaptive),
        "alpha_star_shift": _shift(optima),
        "seed": settings.seed,
        "scenario": settings.scenario if settings.trace is None else None,
        "trace": None if settings.trace is None else str(settings.trace),
        "seconds_per_arm": settings.arm_seconds,
        "seconds_in_all": round(seconds_in_all, 1),
        "nodes": settings.nodes,
        "device": settings.device,
        "machine": describe(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def regime_at(records: Records, time_s: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Regime in force at each time: that of the newest request due by then; -1 outside the run."""
    newest = np.searchsorted(records.intended_s, time_s, side="right") - 1
    regime = records.regime[np.clip(newest, 0, None)].astype(np.int64)
    outside = (newest < 0) | (time_s > records.intended_s[-1])
    regime[outside] = -1
    return regime


def settled_at(records: Records, time_s: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Whether each time lies in the settled part of its step."""
    newest = np.searchsorted(records.intended_s, time_s, side="right") - 1
    inside = (newest >= 0) & (time_s <= records.intended_s[-1])
    settled: npt.NDArray[np.bool_] = records.settled[np.clip(newest, 0, None)] & inside
    return settled


def _arm(result: ArmResult, slo_ms: float) -> dict[str, Any]:
    records = result.records
    outcomes = np.array([str(outcome) for outcome in records.outcome])
    dropped = int((outcomes == Outcome.DROPPED).sum())
    failed = int((~records.ok).sum()) - dropped
    series = {node: series_of(result.samples, node) for node in result.nodes}
    totals = {name: _grown(series, name) for name in COUNTERS}
    return {
        "title": result.arm.title,
        "requests": len(records),
        "errors": failed,
        "outcomes": {str(name): int((outcomes == name).sum()) for name in np.unique(outcomes)},
        "dropped": dropped,
        "all": _regime(result, series, None, slo_ms),
        "regimes": {
            label: _regime(result, series, index, slo_ms)
            for index, label in enumerate(records.labels)
        },
        "alpha": _alpha(series, result.decisions),
        "evictions": {
            "kv_users": int(totals["kv_evicted_users"]),
            "emb_rows": int(totals["emb_evictions"]),
        },
        "moved_extents": int(totals["moved_extents"]),
        "relocated_rows": int(totals["relocated_rows"]),
        "uncached_requests": int(totals["uncached_requests"]),
        "refill_bytes": int(totals["refill_bytes"]),
        "foreground_bytes": int(totals["foreground_bytes"]),
        "decision_us": _decisions(result),
        "requests_per_node": _per_node(records),
        "load_lag_ms": _lag(records),
        "integrity_violations": result.integrity_violations,
        "cpu": {
            "cores": result.machine.cores,
            "busy_share": result.machine.busy_share,
            "steal_share": result.machine.steal_share,
            "run_queue_share": result.machine.run_queue_share,
            "processes": {name: each._asdict() for name, each in result.machine.processes.items()},
        },
    }


def _regime(
    result: ArmResult, series: Mapping[str, NodeSeries], index: int | None, slo_ms: float
) -> dict[str, Any]:
    records = result.records
    chosen = np.ones(len(records), dtype=np.bool_) if index is None else records.regime == index
    latency = records.latency_ms[chosen]
    ok = records.ok[chosen]
    reused = records.numbers["kv_reused_tokens"][chosen]
    known = np.isfinite(reused)
    looked_up = np.nansum(records.numbers["rows_looked_up"][chosen])
    missed = np.nansum(records.numbers["rows_missed"][chosen])
    service = records.numbers["service_ms"][chosen]
    counters = {
        name: _grown(series, name, records, index)
        for name in ("gather_ms", "compute_ms", "service_ms", "refill_bytes")
    }
    hidden = counters["gather_ms"] + counters["compute_ms"] - counters["service_ms"]
    alphas = np.concatenate(
        [
            each.alpha[(regime_at(records, each.time_s) == index) if index is not None else ...]
            for each in series.values()
        ]
    )
    return {
        "offered": int(chosen.sum()),
        **percentiles(np.where(ok, latency, np.nan)),
        "slo_attainment": _share(ok & (latency <= slo_ms)),
        "kv_hit_rate": _share(reused[known] > 0),
        "emb_hit_rate": float(1.0 - missed / looked_up) if looked_up else None,
        "mean_alpha": float(alphas.mean()) if len(alphas) else None,
        # Share of the time spent on fetching rows that the next batch's computing can hide.
        "overlap": float(hidden / counters["gather_ms"]) if counters["gather_ms"] > 0 else None,
        "mean_service_ms": _mean(service),
        "refill_bytes": int(counters["refill_bytes"]),
    }


def _grown(
    series: Mapping[str, NodeSeries],
    name: str,
    records: Records | None = None,
    regime: int | None = None,
) -> float:
    """Growth of a counter over all nodes, optionally only within one regime.

    A counter that falls belongs to a restarted server and counts from 0.
    """
    total = 0.0
    for each in series.values():
        values = each.counters[name]
        steps = np.diff(values, prepend=values[:1])
        steps = np.where(steps < 0, values, steps)
        if records is not None and regime is not None:
            steps = steps[regime_at(records, each.time_s) == regime]
        total += float(steps.sum())
    return total


def _alpha(
    series: Mapping[str, NodeSeries], decisions: Mapping[str, npt.NDArray[Any]]
) -> dict[str, float | int | None]:
    """Range of the applied α, and the moves that were decided and commanded."""
    values = np.concatenate([each.alpha for each in series.values()])
    started = [record for each in decisions.values() for record in each if starts_move(record)]
    up = sum(bool(record["target"] > record["alpha"]) for record in started)
    return {
        "min": float(values.min()) if len(values) else None,
        "max": float(values.max()) if len(values) else None,
        "moves": len(started),
        "moves_up": up,
        "moves_down": len(started) - up,
    }


def _decisions(result: ArmResult) -> dict[str, float | int | None]:
    """First read of telemetry to command stored, as the decide processes timed themselves."""
    latency = np.concatenate(
        [np.empty(0), *(each["latency_us"] for each in result.decisions.values())]
    )
    tail = 99 if len(latency) >= P99_FROM_N else 95
    return {
        "n": len(latency),
        "p50": _percentile(latency, 50),
        f"p{tail}": _percentile(latency, tail),
    }


def _optima(optima: Mapping[str, RegimeOptimum], result: ArmResult) -> dict[str, Any]:
    """α* of each regime beside the settled α̂ and α of the adaptive arm: per node, and the mean."""
    records = result.records
    found: dict[str, Any] = {}
    for index, label in enumerate(records.labels):
        nodes: dict[str, Any] = {}
        for node in result.nodes:
            each = series_of(result.samples, node)
            settled = (regime_at(records, each.time_s) == index) & settled_at(records, each.time_s)
            anchor = each.anchor[settled]
            optimum = optima[label].nodes.get(node) if label in optima else None
            hat = _mean(anchor)
            nodes[node] = {
                "alpha_star": None if optimum is None else optimum.alpha_star,
                "plateau": None if optimum is None else list(optimum.plateau),
                "alpha_hat": hat,
                "alpha": _mean(each.alpha[settled]),
                **_distances(optimum, hat),
            }
        found[label] = {
            "alpha_star": _mean_of(nodes, "alpha_star"),
            "alpha_hat": _mean_of(nodes, "alpha_hat"),
            "alpha": _mean_of(nodes, "alpha"),
            "distance": _mean_of(nodes, "distance"),
            "plateau_distance": _mean_of(nodes, "plateau_distance"),
            "nodes": nodes,
        }
    return found


def _distances(optimum: NodeOptimum | None, hat: float | None) -> dict[str, float | None]:
    """How far α̂ is from α*, and from the plateau around it where that is nearer."""
    if optimum is None or hat is None:
        return {"distance": None, "plateau_distance": None}
    return {
        "distance": abs(hat - optimum.alpha_star),
        "plateau_distance": optimum.distance(hat),
    }


def _shift(optima: Mapping[str, RegimeOptimum]) -> float | None:
    """Largest distance between the α* of two regimes on one node, the smallest over the nodes."""
    nodes = {node for optimum in optima.values() for node in optimum.nodes}
    shifts = []
    for node in nodes:
        stars = [each.nodes[node].alpha_star for each in optima.values() if node in each.nodes]
        shifts.append(max(stars) - min(stars))
    return float(min(shifts)) if shifts else None


def _per_node(records: Records) -> dict[str, dict[str, int]]:
    nodes = np.array(records.texts["node"])
    return {
        str(node): {
            label: int(((nodes == node) & (records.regime == index)).sum())
            for index, label in enumerate(records.labels)
        }
        for node in np.unique(nodes[nodes != ""])
    }


def _lag(records: Records) -> dict[str, float | int | None]:
    """How late the load generator itself was: it counts as latency, so it must stay small."""
    return percentiles((records.sent_s - records.intended_s) * 1e3)


def _percentile(values: npt.NDArray[np.float64], q: int) -> float | None:
    return float(np.percentile(values, q)) if len(values) else None


def _share(values: npt.NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if len(values) else None


def _mean(values: npt.NDArray[np.float64]) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _mean_of(nodes: Mapping[str, dict[str, Any]], key: str) -> float | None:
    values = [each[key] for each in nodes.values() if each[key] is not None]
    return float(np.mean(values)) if values else None
