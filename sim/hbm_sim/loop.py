"""The closed loop: a node, the twin's curves, and something that chooses α at every tick.

The reading is made as the sidecar makes it (`hbm_policy.Intake` over the same records), so the real
policy, a baseline and a policy in training all see the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from hbm_policy.intake import Intake
from hbm_policy.reading import Reading
from hbm_pool.contracts.records import CURVES, INTENT, TELEMETRY, Mode

from hbm_sim import engine_moves as at
from hbm_sim.curve_track import CurveTrack, tick_count, tick_ns
from hbm_sim.engine import EngineNode
from hbm_sim.engine_kernel import Outcome
from hbm_sim.faults import Fault, FaultKind, scaled
from hbm_sim.node_spec import NodeSpec, RowRule
from hbm_sim.stream import Stream

LINK_WINDOW_S: Final = 1.0


class Observation(NamedTuple):
    """What a decision may look at."""

    reading: Reading
    telemetry: npt.NDArray[Any]
    """One record of dtype TELEMETRY; valid during the call."""
    tick: int
    time_s: float
    spec: NodeSpec


class Action(NamedTuple):
    """What a decision asks of the node."""

    alpha: float
    refill_bytes_per_s: float
    anchor: float = math.nan
    reasons: int = 0
    drop_only: bool = False
    generation: int | None = None
    """Of the command, as telemetry is to echo it; None: the node counts."""


class Arm(Protocol):
    """A way of choosing α."""

    name: str

    def start(self, spec: NodeSpec, seed: int) -> None:
        """A new run begins."""

    def act(self, observation: Observation) -> Action:
        """Once per tick."""


class Watching(Protocol):
    """An arm that also learns from each request."""

    def served(self, stream: Stream, begin: int, end: int, outcome: Outcome) -> None:
        """Requests [begin, end) have begun since the tick before."""


class Hold:
    """Keeps one α: a static split."""

    def __init__(self, alpha: float) -> None:
        self.name = f"static-{alpha:g}"
        self.alpha = alpha

    def start(self, spec: NodeSpec, seed: int) -> None:
        """Nothing to prepare."""

    def act(self, observation: Observation) -> Action:
        """The same α, no refill."""
        return Action(self.alpha, 0.0)


@dataclasses.dataclass(frozen=True)
class Run:
    """What happened. Columns of the stream `[n]`, then columns of the ticks `[t]`, then totals."""

    arm: str
    seed: int
    latency_ms: npt.NDArray[np.float64]  # from the intended arrival; NaN: refused
    service_ms: npt.NDArray[np.float64]
    gather_ms: npt.NDArray[np.float64]
    compute_ms: npt.NDArray[np.float64]
    kv_hit: npt.NDArray[np.bool_]
    missed_rows: npt.NDArray[np.float64]
    dropped: npt.NDArray[np.bool_]
    time_s: npt.NDArray[np.float64]
    alpha: npt.NDArray[np.float64]  # applied, before the decision of the tick
    target: npt.NDArray[np.float64]
    anchor: npt.NDArray[np.float64]
    reasons: npt.NDArray[np.int64]
    refill_bytes: npt.NDArray[np.float64]  # copied since the tick before
    moves: int
    moved_bytes: int
    total_refill_bytes: float
    foreground_bytes: float
    critical_share: float
    """Of the requests' copies, how many waited for one of the refiller."""


def run_node(
    stream: Stream,
    spec: NodeSpec,
    arm: Arm,
    seed: int,
    *,
    tick_s: float = 0.25,
    curves: CurveTrack | None = None,
    alpha: float = 0.5,
    faults: Sequence[Fault] = (),
    refill_bytes_per_s: float = 1.0e9,
    rows: RowRule = "tz",
) -> Run:
    """One arm over one stream. `alpha`: where the node begins; `refill_bytes_per_s`: the budget
    that the reading states. Without `curves` the reading has no curve (statics need none).

    Equal inputs give an equal run.
    """
    return _Loop(
        stream, spec, arm, seed, tick_s, curves, alpha, faults, refill_bytes_per_s, rows
    ).run()


class Observer:
    """Makes one node's readings, tick by tick, as its sidecar would: with faults, noise, delay."""

    def __init__(
        self,
        node: EngineNode,
        seed: int,
        *,
        tick_s: float,
        refill_bytes_per_s: float,
        faults: Sequence[Fault] = (),
    ) -> None:
        self.node, self.spec, self.tick_s, self.faults = node, node.spec, tick_s, faults
        self._random = np.random.default_rng([seed, 41])
        self._intake = Intake(self.spec.info)
        self._telemetry = np.zeros((), TELEMETRY)
        self._curve = np.zeros((), CURVES)
        self._curve_seen = False
        self._intent = np.zeros((), INTENT)
        info = self.spec.info
        for name, value in (
            ("monotonic_ns", 1),
            ("generation", 1),
            ("mode", int(Mode.AUTO)),
            ("alpha_min", info.alpha_min),
            ("alpha_max", info.alpha_max),
            ("slo_ms", info.slo_ms),
            ("tick_ms", tick_s * 1e3),
            ("refill_bytes_per_s", refill_bytes_per_s),
            ("alpha_initial", math.nan),
        ):
            self._intent[name] = value
        self._late: deque[npt.NDArray[Any]] = deque(maxlen=self.spec.telemetry_delay_ticks + 1)
        self._noisy = {"gather_ms": 0.0, "compute_ms": 0.0, "service_ms": 0.0}
        self._true = dict.fromkeys(self._noisy, 0.0)
        window = max(1, round(LINK_WINDOW_S / tick_s))
        self._busy_ms: deque[float] = deque([0.0], maxlen=window + 1)

    def observe(self, tick: int, time_s: float, curve: npt.NDArray[Any] | None) -> Observation:
        """The reading of a tick; `curve`: the twin's newest record of dtype CURVES, if any."""
        now_ns = tick_ns(tick, self.tick_s)
        record = np.zeros((), TELEMETRY)
        self.node.telemetry(record, now_ns)
        self._measure(record)
        frozen = self._fault(FaultKind.FROZEN, time_s) is not None
        if not (frozen and self._late):
            self._late.append(record)
        self._telemetry[...] = self._late[0]
        if self._fault(FaultKind.NAN, time_s) is not None:
            for name in ("alpha", "latency_p50_ms", "latency_p99_ms", "gather_ms", "compute_ms"):
                self._telemetry[name] = math.nan
        costs = self._fault(FaultKind.COSTS, time_s)
        if costs is not None:
            wrong = scaled(self.spec.declares(), costs.factor)
            self._telemetry["cost_row_ms"][..., 0] = wrong.row_ms[0]
        jump = self._fault(FaultKind.CLOCK_JUMP, time_s)
        if jump is not None:
            now_ns += round(jump.factor * 1e9)
        if curve is not None and self._fault(FaultKind.TWIN_DEAD, time_s) is None:
            self._curve[...] = curve
            self._curve_seen = True
        reading = self._intake.reading(
            now_ns,
            self.node.boot_epoch,
            self._telemetry,
            self._intent,
            self._curve if self._curve_seen else None,
        )
        return Observation(reading, self._telemetry, tick, time_s, self.spec)

    def _measure(self, record: npt.NDArray[Any]) -> None:
        """Times as measured: noise on what each tick adds; use of the link over a second."""
        noise = self.spec.telemetry_noise
        for name, noisy in self._noisy.items():
            now = float(record[name])
            added = now - self._true[name]
            if added < 0.0:  # a restarted server counts from 0
                added, noisy = now, 0.0
            factor = math.exp(noise * self._random.standard_normal()) if noise > 0.0 else 1.0
            self._true[name] = now
            self._noisy[name] = noisy + added * factor
            record[name] = self._noisy[name]
        self._busy_ms.append(self.node.link_busy_ms)
        window_ms = (len(self._busy_ms) - 1) * self.tick_s * 1e3
        busy_ms = max(0.0, self._busy_ms[-1] - self._busy_ms[0])
        record["link_busy"] = min(1.0, busy_ms / window_ms) if window_ms > 0.0 else 0.0

    def _fault(self, kind: FaultKind, time_s: float) -> Fault | None:
        for fault in self.faults:
            if fault.kind is kind and fault.active(time_s):
                return fault
        return None


class _Loop:
    def __init__(
        self,
        stream: Stream,
        spec: NodeSpec,
        arm: Arm,
        seed: int,
        tick_s: float,
        curves: CurveTrack | None,
        alpha: float,
        faults: Sequence[Fault],
        refill_bytes_per_s: float,
        rows: RowRule,
    ) -> None:
        if curves is not None and curves.tick_s != tick_s:
            raise ValueError(f"the curves have ticks of {curves.tick_s} s, the loop of {tick_s} s")
        self.stream, self.spec, self.arm, self.seed = stream, spec, arm, seed
        self.tick_s, self.curves = tick_s, curves
        self.node = EngineNode(spec, alpha, stream.rate, rows, sampled_rows=len(stream.row_keys))
        self._observer = Observer(
            self.node, seed, tick_s=tick_s, refill_bytes_per_s=refill_bytes_per_s, faults=faults
        )
        self._restarts = sorted(f.at_s for f in faults if f.kind is FaultKind.RESTART)

    def run(self) -> Run:
        """All ticks, then what is left of the queue."""
        stream, node = self.stream, self.node
        ticks = tick_count(stream, self.tick_s)
        columns = {name: np.zeros(ticks) for name in ("alpha", "target", "anchor", "refill")}
        reasons = np.zeros(ticks, np.int64)
        self.arm.start(self.spec, self.seed)
        watch = getattr(self.arm, "served", None)
        begin = 0
        refilled = 0.0
        moves = moved = 0
        for tick in range(ticks):
            time_s = (tick + 1) * self.tick_s
            end = node.advance(stream, time_s)
            assert node.outcome is not None
            if watch is not None and end > begin:
                watch(stream, begin, end, node.outcome)
            begin = end
            while self._restarts and self._restarts[0] <= time_s:
                self._restarts.pop(0)
                moves, moved = moves + node.count(at.MOVES), moved + node.moved_bytes
                node.restart()
            record = None
            if self.curves is not None:
                record = self.curves.records[tick]
            observation = self._observer.observe(tick, time_s, record)
            action = self.arm.act(observation)
            columns["alpha"][tick] = node.alpha
            columns["target"][tick] = action.alpha
            columns["anchor"][tick] = action.anchor
            columns["refill"][tick] = max(0.0, node.refill_bytes - refilled)
            refilled = node.refill_bytes
            reasons[tick] = action.reasons
            node.command(
                action.alpha, action.refill_bytes_per_s, action.drop_only, action.generation
            )
        node.serve(stream, begin, len(stream))
        outcome = node.outcome
        assert outcome is not None
        return Run(
            arm=self.arm.name,
            seed=self.seed,
            latency_ms=outcome.latency_ms,
            service_ms=outcome.service_ms,
            gather_ms=outcome.gather_ms,
            compute_ms=outcome.compute_ms,
            kv_hit=outcome.cached_tokens > 0,
            missed_rows=outcome.missed_rows,
            dropped=outcome.dropped,
            time_s=np.arange(1, ticks + 1) * np.float64(self.tick_s),
            alpha=columns["alpha"],
            target=columns["target"],
            anchor=columns["anchor"],
            reasons=reasons,
            refill_bytes=columns["refill"],
            moves=moves + node.count(at.MOVES),
            moved_bytes=moved + node.moved_bytes,
            total_refill_bytes=float(columns["refill"].sum()),
            foreground_bytes=node.foreground_bytes,
            critical_share=node.critical_share,
        )
