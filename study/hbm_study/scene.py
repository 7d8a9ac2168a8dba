"""What all arms of a scene share: the stream, the twin's curves, and what every static α costs.

Curves and statics are kept on disk by the content they depend on. What a static split costs per
request depends on the order of requests only, never on when they arrive or whether gathering
overlaps: one sweep serves all loads and both ways of gathering. Streams are drawn anew: that takes
less time than reading them.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.records import CURVES, CostModel
from hbm_sim.curve_track import CurveTrack
from hbm_sim.faults import Fault, FaultKind, scaled
from hbm_sim.load_level import phase_rates
from hbm_sim.node_spec import NodeSpec
from hbm_sim.optimum import RegimeOptimum, StaticRun, latencies, p99, static_run
from hbm_sim.stream import Stream, make_stream
from hbm_sim.sweep import Optimum, optimum
from hbm_sim.workload import Workload, load_workload

from hbm_study.arms.fixed import Known
from hbm_study.cells import EQUAL, SIMULATOR, Scene, sources_digest
from hbm_study.faults import faults_of

COARSE_STEP = 0.05
FINE_STEP = 0.0125
FINE_REACH = 0.0375
"""The fine grid goes so far to both sides of the coarse minimum."""
TICK_S = 0.25
FLEET_RATE = 0.001
"""Share of rows followed on fleets: their streams are long."""
Mask = npt.NDArray[np.bool_]


class RegimeBest(NamedTuple):
    """Best static α of one regime."""

    by_service: Optimum  # J1, settled part
    by_tail: Optimum  # J2, P99 over the whole regime
    service_ms: float  # of the static split at J1's α, over the whole regime


class SceneData:
    """Made once per scene and worker; everything is computed when first asked for."""

    def __init__(self, scene: Scene, cache: Path) -> None:
        self.scene = scene
        self._cache = cache
        self._statics: dict[float, StaticRun] = {}

    @cached_property
    def workload(self) -> Workload:
        """As gathered in this scene. Raises WorkloadError."""
        workload = load_workload(self.scene.workload).with_gather(self.scene.gather)
        if self.scene.hot is None:
            return workload
        regimes = {
            name: regime.model_copy(
                update={"users": regime.users.model_copy(update={"hot": self.scene.hot})}
            )
            for name, regime in workload.regimes.items()
        }
        return workload.model_copy(update={"regimes": regimes})

    @cached_property
    def stream(self) -> Stream:
        """At the scene's load."""
        scene, workload = self.scene, self.workload
        if scene.nodes > 1:
            return self._for_fleet()
        if scene.load == EQUAL:
            qps = min(phase_rates(workload, workload.phases()))
            return make_stream(workload, scene.seed, scene.rate, qps=qps, requests=scene.requests)
        return make_stream(
            workload, scene.seed, scene.rate, load=float(scene.load), requests=scene.requests
        )

    def _for_fleet(self) -> Stream:
        """A longer walk at one rate: a node's lowest capacity, times the nodes, times the load."""
        scene, workload = self.scene, self.workload
        walk = tuple(
            step.model_copy(update={"requests": step.requests * scene.nodes})
            for step in workload.walk
        )
        update = {"walk": walk, "warm_up": workload.warm_up * scene.nodes}
        requests = None if scene.requests is None else scene.requests * scene.nodes
        # Capacities are those of the shipped regimes: another hot share is another traffic at the
        # same rate, which is what a router sees.
        shipped = load_workload(scene.workload).with_gather(scene.gather)
        qps = min(phase_rates(shipped, shipped.phases())) * float(scene.load) * scene.nodes
        return make_stream(
            workload.model_copy(update=update),
            scene.seed,
            scene.rate or FLEET_RATE,
            qps=qps,
            requests=requests,
        )

    @cached_property
    def spec(self) -> NodeSpec:
        """The node."""
        return self.workload.node_spec()

    @cached_property
    def faults(self) -> tuple[Fault, ...]:
        """What goes wrong, and when."""
        return faults_of(self.scene.fault, float(self.stream.arrival_s[-1]))

    @cached_property
    def track(self) -> CurveTrack:
        """The twin's curves, priced with what the server declares, faults included."""
        declared = self.spec.declares()
        for fault in self.faults:
            if fault.kind is FaultKind.COSTS:
                declared = scaled(declared, fault.factor)
        restarts = tuple(f.at_s for f in self.faults if f.kind is FaultKind.RESTART)
        scene = self.scene._replace(fault="")
        path = self._path("curves", scene._asdict(), list(declared), list(restarts))
        if path.is_file():
            with np.load(path) as stored:
                records = stored["records"].view(CURVES).reshape(-1)
            return CurveTrack(TICK_S, records, declared, self.spec.info.cost_model)
        track = CurveTrack.of(
            self.stream, self.spec, tick_s=TICK_S, costs=declared, restarts_s=restarts
        )
        # As bytes: a record type that another version lays out otherwise has another key.
        _save(path, records=np.ascontiguousarray(track.records).view(np.uint8))
        return track

    # -- statics ---------------------------------------------------------------------------------

    def static(self, alpha: float) -> StaticRun:
        """One α held over the whole stream."""
        alpha = round(alpha, 6)
        if alpha not in self._statics:
            self._statics[alpha] = self._timed(alpha)
        return self._statics[alpha]

    def _timed(self, alpha: float) -> StaticRun:
        """Latencies from kept service times, unless the queue would have refused a request."""
        stream, spec = self.stream, self.spec
        path = self._path("statics", self.scene.sweep._asdict(), round(alpha, 6))
        if not path.is_file():
            run = static_run(stream, spec, alpha)
            if not np.isnan(run.latency_ms).any():
                kept = {name: getattr(run, name) for name in _KEPT}
                _save(path, alpha=np.float64(run.alpha), **kept)
            return run
        with np.load(path) as stored:
            found: dict[str, Any] = {name: stored[name] for name in stored.files}
        gather_ms, compute_ms = found["gather_ms"], found["compute_ms"]
        latency_ms = latencies(stream, spec, gather_ms, compute_ms)
        if _longest_queue(stream, latency_ms, gather_ms, compute_ms) > spec.queue_limit:
            return static_run(stream, spec, alpha)
        overlap = spec.info.cost_model == CostModel.OVERLAP
        service_ms = np.maximum(gather_ms, compute_ms) if overlap else gather_ms + compute_ms
        return StaticRun(
            alpha=float(found["alpha"]),
            gather_ms=gather_ms,
            compute_ms=compute_ms,
            service_ms=service_ms,
            latency_ms=latency_ms,
            kv_hit=found["kv_hit"],
            missed_rows=found["missed_rows"],
            looked_up_rows=found["looked_up_rows"],
        )

    def grid(self, low: float, high: float, step: float) -> list[float]:
        """Multiples of a step within [low, high] and the server's bounds."""
        info = self.spec.info
        low, high = max(low, info.alpha_min), min(high, info.alpha_max)
        steps = np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step
        return sorted({round(float(each), 6) for each in steps})

    @cached_property
    def best(self) -> dict[str, RegimeBest]:
        """α* of each regime: grid .05, then .0125 around the optimum by mean service.

        P99 is taken over the coarse grid alone: over a finer one its minimum is noise.
        """
        stream = self.stream
        coarse = self.grid(0.0, 1.0, COARSE_STEP)
        found = {}
        for regime in stream.regimes:
            settled = stream.of_regime(regime)
            whole = stream.of_regime(regime, settled=False)
            if not settled.any():
                continue
            tails = [p99(self.static(alpha).latency_ms[whole]) for alpha in coarse]
            first = _best_by_service(self, coarse, settled)
            around = self.grid(first.alpha - FINE_REACH, first.alpha + FINE_REACH, FINE_STEP)
            by_service = _best_by_service(self, sorted({*coarse, *around}), settled)
            found[regime] = RegimeBest(
                by_service,
                optimum(coarse, np.array(tails)),
                float(self.static(by_service.alpha).service_ms[whole].mean()),
            )
        return found

    def optimum_of(self, regime: str) -> RegimeOptimum:
        """α* of a regime with its curves over the coarse grid."""
        runs = [self.static(alpha) for alpha in self.grid(0.0, 1.0, COARSE_STEP)]
        settled = self.stream.of_regime(regime)
        whole = self.stream.of_regime(regime, settled=False)
        best = self.best[regime]
        return RegimeOptimum(
            regime=regime,
            requests=int(whole.sum()),
            mean_service_ms=np.array([run.service_ms[settled].mean() for run in runs]),
            p99_ms=np.array([p99(run.latency_ms[whole]) for run in runs]),
            kv_hit_ratio=np.array([run.kv_hit[settled].mean() for run in runs]),
            emb_miss_ratio=np.array(
                [run.missed_rows[settled].sum() / run.looked_up_rows[settled].sum() for run in runs]
            ),
            by_service=best.by_service,
            by_p99=best.by_tail,
        )

    @cached_property
    def best_static(self) -> float:
        """The static α of this very stream with the lowest pooled P99, in hindsight."""
        coarse = self.grid(0.0, 1.0, COARSE_STEP)
        counted = self.stream.counted
        tails = [p99(self.static(alpha).latency_ms[counted]) for alpha in coarse]
        return coarse[int(np.argmin(tails))]

    @cached_property
    def known(self) -> Known:
        """What an oracle is told."""
        return Known(
            self.stream,
            {name: each.by_service.alpha for name, each in self.best.items()},
            {name: each.by_tail.alpha for name, each in self.best.items()},
            self.best_static,
            self.spec.info.alpha_min,
        )

    def _path(self, kind: str, *content: Any) -> Path:
        key = json.dumps([sources_digest(SIMULATOR), self._digest, *content], sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()[:24]
        return self._cache / kind / f"{name}.npz"

    @cached_property
    def _digest(self) -> str:
        return load_workload(self.scene.workload).digest()


_KEPT = ("gather_ms", "compute_ms", "kv_hit", "missed_rows", "looked_up_rows")


def _best_by_service(data: SceneData, alphas: list[float], mask: Mask) -> Optimum:
    return optimum(alphas, np.array([data.static(a).service_ms[mask].mean() for a in alphas]))


def _longest_queue(
    stream: Stream,
    latency_ms: npt.NDArray[np.float64],
    gather_ms: npt.NDArray[np.float64],
    compute_ms: npt.NDArray[np.float64],
) -> int:
    """Requests that wait when one arrives, at most; one in service counts too."""
    ends_ms = np.maximum.accumulate(stream.arrival_s * 1e3 + latency_ms)
    done = np.searchsorted(ends_ms, stream.arrival_s * 1e3)
    return int((np.arange(len(done)) - done).max(initial=0))


def _save(path: Path, **arrays: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.part.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(path)
