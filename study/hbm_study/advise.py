"""What a user's own log says: the best static α, and whether moving it would pay.

Every split serves the same requests. What adapting gains is measured against the best static α in
hindsight, which is the strongest thing that could have been set by hand; its uncertainty comes from
resampling stretches of the log, both runs together.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from hbm_sim.curve_track import CurveTrack
from hbm_sim.loop import Run, run_node
from hbm_sim.node_spec import NodeSpec
from hbm_sim.optimum import StaticRun, latencies, p99, static_run
from hbm_sim.stream import Stream
from hbm_sim.sweep import Optimum, optimum

from hbm_study.arms import Known, load_arm, make_arm
from hbm_study.statistics import NON_INFERIORITY, RESAMPLES, Interval

Floats = npt.NDArray[np.float64]
STRETCHES: Final = 20
"""Equal parts of the log that are resampled."""
USED_SHARE: Final = 0.7
"""Share of the server's time in the busiest stretch, at the best static α, where no rate is given:
a node is bought for its peak."""
STEP: Final = 0.05
TICK_S: Final = 0.25
LEAST_REQUESTS: Final = 2000
"""Fewer counted requests tell nothing of a P99."""
_SHIPS: Final = "twin-adapter-gate"


class AdviceError(ValueError):
    """A log from which nothing can be said; one line."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """Everything the report shows."""

    requests: int
    qps: float
    alpha: Floats  # [k] static splits
    service_ms: Floats  # [k] mean, settled part
    tail_ms: Floats  # [k] P99
    kv_hit: Floats  # [k]
    best_service: Optimum
    best_tail: Optimum
    by_part: dict[str, Optimum]
    """Best by mean service time in each part of the log."""
    adaptive_tail_ms: float
    adaptive_service_ms: float
    tail_change: Interval
    """P99 of adapting over the best static α, less 1."""
    service_change: Interval
    slo_ms: float
    slo_static: float
    slo_adaptive: float
    moved_bytes: int
    time_s: Floats
    alpha_over_time: Floats
    anchor_over_time: Floats

    @property
    def pays(self) -> bool:
        """The whole interval lies below noise."""
        return self.tail_change.high < -NON_INFERIORITY

    @property
    def matters(self) -> bool:
        """Some split is worse than another by more than noise."""
        return bool(
            self.tail_ms.max() > (1.0 + NON_INFERIORITY) * self.tail_ms.min()
            or self.service_ms.max() > 1.01 * self.service_ms.min()
        )

    @property
    def recommended(self) -> float:
        """Static α to begin with, or to stay at: the best by P99 where it is clear, else by mean
        service time, whose minimum is sharper. The middle where no α is better than another."""
        if not self.matters:
            return float(self.alpha[len(self.alpha) // 2])
        inside = (
            self.best_tail.plateau_low <= self.best_service.alpha <= self.best_tail.plateau_high
        )
        return self.best_service.alpha if inside else self.best_tail.alpha

    def verdict(self) -> str:
        """One plain sentence."""
        change, low, high = (100.0 * value for value in self.tail_change[:3])
        seen = f"P99 {change:+.1f} % [{low:+.1f}, {high:+.1f}] against the best static α"
        if not self.matters:
            return (
                "Adapting is not worth it, and neither is choosing: every split of this pool "
                "serves this log alike. What the log asks for fits, or hardly anything of it "
                "returns."
            )
        if self.moved_bytes == 0:
            return (
                "Adapting is not worth it: the policy that ships would not have moved α once on "
                "this log. Keep α fixed."
            )
        if self.pays:
            return f"Adapting is worth it: {seen}."
        if self.tail_change.low > NON_INFERIORITY:
            return f"Adapting is not worth it: it makes things worse ({seen}). Keep α fixed."
        return f"Adapting is not worth it: {seen}; that is noise or nothing. Keep α fixed."

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = dataclasses.asdict(self)
        for name in ("time_s", "alpha_over_time", "anchor_over_time"):
            del plain[name]
        for name in ("alpha", "service_ms", "tail_ms", "kv_hit"):
            plain[name] = plain[name].tolist()
        for name in ("tail_change", "service_change"):
            plain[name] = getattr(self, name)._asdict()
        return {
            **plain,
            "pays": self.pays,
            "matters": self.matters,
            "recommended": self.recommended,
            "verdict": self.verdict(),
        }


def advise(
    stream: Stream, spec: NodeSpec, *, qps: float | None = None, slo_ms: float | None = None
) -> Advice:
    """Sweeps, adapts, compares. `qps`: mean arrivals per second; None: so that the best static α
    keeps the server busy for `USED_SHARE` of the log's busiest stretch. Gaps keep their
    proportions. `slo_ms`: None
    for twice the median latency of the best static α.

    Raises AdviceError for too short a log.
    """
    counted = stream.counted
    if int(counted.sum()) < LEAST_REQUESTS:
        raise AdviceError(
            f"the log has {len(stream)} requests, {int(counted.sum())} of them after the warm-up; "
            f"at least {LEAST_REQUESTS} are needed"
        )
    info = spec.info
    alphas = np.unique(np.append(np.arange(info.alpha_min, info.alpha_max, STEP), info.alpha_max))
    runs = [static_run(stream, spec, float(alpha)) for alpha in alphas]
    means = np.array([run.service_ms[counted & stream.settled].mean() for run in runs])
    if qps is None:
        qps = _rate_for_peak(stream, runs[int(means.argmin())])
    stream = _at_rate(stream, qps)
    tails = np.array([_tail(stream, spec, run) for run in runs])
    points = [run.alpha for run in runs]
    best_tail = optimum(points, tails)
    static = runs[points.index(best_tail.alpha)]
    latency_ms = latencies(stream, spec, static.gather_ms, static.compute_ms)
    run = _adaptive(stream, spec, best_tail.alpha)
    goal = slo_ms or 2.0 * float(np.percentile(latency_ms[counted], 50))
    first = int(np.searchsorted(run.time_s, stream.arrival_s[stream.warm_up]))
    return Advice(
        requests=int(counted.sum()),
        qps=qps,
        alpha=np.array(points),
        service_ms=means,
        tail_ms=tails,
        kv_hit=np.array([each.kv_hit[counted].mean() for each in runs]),
        best_service=optimum(points, means),
        best_tail=best_tail,
        by_part={
            name: optimum(points, np.array([each.service_ms[mask].mean() for each in runs]))
            for name in stream.regimes
            if (mask := stream.of_regime(name)).any()
        },
        adaptive_tail_ms=p99(run.latency_ms[counted]),
        adaptive_service_ms=float(np.nanmean(run.service_ms[counted])),
        tail_change=_change(run.latency_ms[counted], latency_ms[counted], _p99_of),
        service_change=_change(run.service_ms[counted], static.service_ms[counted], _mean_of),
        slo_ms=goal,
        slo_static=float((latency_ms[counted] <= goal).mean()),
        slo_adaptive=float((run.latency_ms[counted] <= goal).mean()),
        moved_bytes=run.moved_bytes,
        time_s=run.time_s[first:],
        alpha_over_time=run.alpha[first:],
        anchor_over_time=run.anchor[first:],
    )


def _rate_for_peak(stream: Stream, run: StaticRun) -> float:
    """Mean arrivals per second at which the busiest stretch keeps the server busy as wished."""
    arrival_s = stream.arrival_s
    length_s = float(arrival_s[-1] - arrival_s[0])
    peak = 0.0
    for part in np.array_split(np.arange(len(stream)), STRETCHES):
        took_s = float(arrival_s[part[-1]] - arrival_s[part[0]])
        busy_s = float(np.nansum(run.service_ms[part])) / 1e3
        peak = max(peak, busy_s / took_s if took_s > 0.0 else 0.0)
    if peak <= 0.0 or length_s <= 0.0:
        return USED_SHARE * 1e3 / float(np.nanmean(run.service_ms))
    return USED_SHARE / peak * (len(stream) - 1) / length_s


def _at_rate(stream: Stream, qps: float) -> Stream:
    arrival_s = stream.arrival_s - stream.arrival_s[0]
    scale = (len(stream) - 1) / qps / max(float(arrival_s[-1]), 1e-9)
    if float(arrival_s[-1]) <= 0.0:
        arrival_s, scale = np.arange(len(stream)) / qps, 1.0
    return dataclasses.replace(stream, arrival_s=arrival_s * scale + 1e-3)


def _tail(stream: Stream, spec: NodeSpec, run: StaticRun) -> float:
    latency_ms = latencies(stream, spec, run.gather_ms, run.compute_ms)
    return p99(latency_ms[stream.counted])


def _adaptive(stream: Stream, spec: NodeSpec, begin: float) -> Run:
    """The stack that ships, from the best static α on."""
    track = CurveTrack.of(stream, spec, tick_s=TICK_S)

    def unknown() -> Known:
        raise AdviceError("the stack that ships asks for no oracle")

    arm = make_arm(_SHIPS, load_arm(_SHIPS), lambda: track, unknown)
    return run_node(stream, spec, arm, 1, tick_s=TICK_S, curves=track, alpha=begin)


def _p99_of(values: Floats) -> float:
    return p99(values)


def _mean_of(values: Floats) -> float:
    return float(np.nanmean(values))


def _change(ours: Floats, theirs: Floats, figure: Any) -> Interval:
    """Relative difference of a figure, its interval over resampled stretches of the log."""
    mean = figure(ours) / figure(theirs) - 1.0
    parts = [(ours[each], theirs[each]) for each in np.array_split(np.arange(len(ours)), STRETCHES)]
    random = np.random.default_rng(0)
    changes = []
    for chosen in random.integers(STRETCHES, size=(RESAMPLES // 20, STRETCHES)):
        left, right = (np.concatenate([parts[i][side] for i in chosen]) for side in (0, 1))
        changes.append(figure(left) / figure(right) - 1.0)
    low, high = np.quantile(changes, [0.025, 0.975])
    return Interval(float(mean), float(low), float(high), STRETCHES)
