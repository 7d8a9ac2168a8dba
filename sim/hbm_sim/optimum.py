"""α* of a stream: every static split serves the same requests, regime by regime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.records import CostModel

from hbm_sim.engine import EngineNode
from hbm_sim.node_spec import NodeSpec, RowRule
from hbm_sim.queueing import queue_ms
from hbm_sim.stream import Stream
from hbm_sim.sweep import Optimum, optimum

COARSE_STEP: Final = 0.05
FINE_STEP: Final = 0.0125


@dataclasses.dataclass(frozen=True)
class StaticRun:
    """One α held over a whole stream. Times do not depend on arrivals; latencies do."""

    alpha: float
    gather_ms: npt.NDArray[np.float64]
    compute_ms: npt.NDArray[np.float64]
    service_ms: npt.NDArray[np.float64]
    latency_ms: npt.NDArray[np.float64]  # NaN: refused
    kv_hit: npt.NDArray[np.bool_]
    missed_rows: npt.NDArray[np.float64]
    looked_up_rows: npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class RegimeOptimum:
    """One regime: curves over `StaticOptimum.alpha`, and their minima."""

    regime: str
    requests: int
    mean_service_ms: npt.NDArray[np.float64]  # J1, over the settled part
    p99_ms: npt.NDArray[np.float64]  # J2, over the whole regime, latency from intended arrival
    kv_hit_ratio: npt.NDArray[np.float64]
    emb_miss_ratio: npt.NDArray[np.float64]
    by_service: Optimum
    by_p99: Optimum


@dataclasses.dataclass(frozen=True)
class StaticOptimum:
    """All regimes, and the stream as a whole (`pooled`)."""

    alpha: npt.NDArray[np.float64]
    runs: tuple[StaticRun, ...]
    regimes: tuple[RegimeOptimum, ...]
    pooled: RegimeOptimum

    def regime(self, name: str) -> RegimeOptimum:
        """One regime by name. Raises KeyError."""
        for each in self.regimes:
            if each.regime == name:
                return each
        raise KeyError(name)

    def run_at(self, alpha: float) -> StaticRun:
        """The run whose α is nearest."""
        return self.runs[int(np.argmin(np.abs(self.alpha - alpha)))]


def static_run(stream: Stream, spec: NodeSpec, alpha: float, rows: RowRule = "tz") -> StaticRun:
    """One static split."""
    node = EngineNode(spec, alpha, stream.rate, rows, sampled_rows=len(stream.row_keys))
    node.serve(stream, 0, len(stream))
    outcome = node.outcome
    assert outcome is not None
    return StaticRun(
        node.alpha,
        outcome.gather_ms,
        outcome.compute_ms,
        outcome.service_ms,
        outcome.latency_ms,
        outcome.cached_tokens > 0,
        outcome.missed_rows,
        outcome.looked_up_rows,
    )


def static_optimum(
    stream: Stream,
    spec: NodeSpec,
    *,
    rows: RowRule = "tz",
    fine: bool = True,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> StaticOptimum:
    """α* per regime by mean service (J1) and pooled P99 (J2): grid 0.05, then 0.0125 around each
    minimum. `jobs` processes share the candidates (joblib)."""
    info = spec.info
    low, high = info.alpha_min, info.alpha_max
    coarse = _grid(low, high, COARSE_STEP, low, high)
    runs = _runs(stream, spec, rows, coarse, jobs, progress)
    if fine:
        found = _optimum(stream, runs)
        around: set[float] = set()
        for each in (*found.regimes, found.pooled):
            for best in (each.by_service.alpha, each.by_p99.alpha):
                around.update(_grid(low, high, FINE_STEP, best - COARSE_STEP, best + COARSE_STEP))
        known = {round(alpha, 6) for alpha in coarse}
        wanted = sorted(alpha for alpha in around if round(alpha, 6) not in known)
        runs += _runs(stream, spec, rows, wanted, jobs, progress)
    return _optimum(stream, runs)


def _grid(low: float, high: float, step: float, first: float, last: float) -> list[float]:
    first, last = max(first, low), min(last, high)
    steps = np.arange(np.ceil(first / step - 1e-9), np.floor(last / step + 1e-9) + 1) * step
    return sorted({round(float(each), 6) for each in steps})


def _runs(
    stream: Stream,
    spec: NodeSpec,
    rows: RowRule,
    alphas: list[float],
    jobs: int,
    progress: Callable[[int, int], None] | None,
) -> list[StaticRun]:
    if jobs > 1 and len(alphas) > 1:
        from joblib import Parallel, delayed

        tasks: Any = (delayed(static_run)(stream, spec, alpha, rows) for alpha in alphas)
        return list(Parallel(n_jobs=jobs, max_nbytes="1M")(tasks))
    runs = []
    for done, alpha in enumerate(alphas):
        runs.append(static_run(stream, spec, alpha, rows))
        if progress is not None:
            progress(done + 1, len(alphas))
    return runs


def _optimum(stream: Stream, runs: list[StaticRun]) -> StaticOptimum:
    runs = sorted({run.alpha: run for run in runs}.values(), key=lambda run: run.alpha)
    alpha = np.array([run.alpha for run in runs])
    regimes = tuple(
        _regime(name, stream.of_regime(name), stream.of_regime(name, settled=False), runs, alpha)
        for name in stream.regimes
        if stream.of_regime(name).any()
    )
    pooled = _regime("", stream.counted & stream.settled, stream.counted, runs, alpha)
    return StaticOptimum(alpha, tuple(runs), regimes, pooled)


def _regime(
    name: str,
    settled: npt.NDArray[np.bool_],
    whole: npt.NDArray[np.bool_],
    runs: list[StaticRun],
    alpha: npt.NDArray[np.float64],
) -> RegimeOptimum:
    service = np.array([run.service_ms[settled].mean() for run in runs])
    tails = np.array([p99(run.latency_ms[whole]) for run in runs])
    missed = np.array([run.missed_rows[settled].sum() for run in runs])
    looked_up = np.array([run.looked_up_rows[settled].sum() for run in runs])
    return RegimeOptimum(
        name,
        int(whole.sum()),
        service,
        tails,
        np.array([run.kv_hit[settled].mean() for run in runs]),
        missed / np.maximum(looked_up, 1.0),
        optimum(alpha.tolist(), service),
        optimum(alpha.tolist(), tails),
    )


def p99(latency_ms: npt.NDArray[np.float64]) -> float:
    """P99 over offered requests: a refused one (NaN) was never answered."""
    if len(latency_ms) == 0:
        return float("nan")
    refused = np.isnan(latency_ms)
    if refused.any():
        # Without interpolation: between two infinities there is no number.
        return float(np.percentile(np.where(refused, np.inf, latency_ms), 99, method="higher"))
    return float(np.percentile(latency_ms, 99))


def latencies(
    stream: Stream,
    spec: NodeSpec,
    gather_ms: npt.NDArray[np.float64],
    compute_ms: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Latencies of the whole stream if its requests took these times, `[n]` ms."""
    overlap = spec.info.cost_model == CostModel.OVERLAP
    return queue_ms(stream.arrival_s * 1e3, gather_ms, compute_ms, overlap=overlap)
