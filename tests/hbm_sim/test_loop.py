"""The closed loop: repeatable, with the real policy, through faults; the twin knows no α."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hbm_policy import CostConstants, Policy, PolicyConfig, PolicyState, Reason, ShieldConfig
from hbm_policy.twin import Twin
from hbm_pool.contracts.records import CURVES, TELEMETRY
from hbm_sim.curve_track import CurveTrack, TwinSamples
from hbm_sim.engine import EngineNode
from hbm_sim.engine_kernel import Outcome
from hbm_sim.faults import Fault, FaultKind
from hbm_sim.loop import Action, Hold, Observation, Run, run_node
from hbm_sim.node_spec import NodeSpec
from hbm_sim.optimum import static_optimum
from hbm_sim.stream import Stream, make_stream

from tests.hbm_sim.small_workload import small_workload

EAGER = PolicyConfig(shield=ShieldConfig(slew_per_s=0.5, dwell_ms=0.0, dwell_accesses_per_slot=0.1))


class Decide:
    """The policy that ships, with quick moves."""

    name = "twin"

    def start(self, spec: NodeSpec, seed: int) -> None:
        self.policy, self.state = Policy(EAGER), PolicyState()

    def act(self, observation: Observation) -> Action:
        decision = self.policy.decide(observation.reading, self.state)
        self.state = decision.state
        return Action(
            decision.target,
            decision.refill_bytes_per_s,
            decision.anchor,
            decision.reasons,
            generation=decision.generation,
        )


class HoldAndWatch(Hold):
    """A static split whose own twin is fed with each request as it was served."""

    def start(self, spec: NodeSpec, seed: int) -> None:
        info = dataclasses.replace(spec.info, sample_rate=1.0)
        self.info, self.costs = info, spec.declares()
        self.twin = Twin(info, clock_ns=lambda: 1)

    def served(self, stream: Stream, begin: int, end: int, outcome: Outcome) -> None:
        if begin == 0:
            self.samples = TwinSamples(stream, self.info)
        self.twin.feed([self.samples[i] for i in range(begin, end)], 0, self.costs)


def _stream() -> tuple[Stream, NodeSpec]:
    workload = small_workload(warm_up=400)
    return make_stream(workload, 1, qps=40.0), workload.node_spec()


def _equal(one: Run, other: Run) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name), equal_nan=True)
        if isinstance(getattr(one, field.name), np.ndarray)
        and getattr(one, field.name).dtype.kind == "f"
        else np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(one)
    )


def test_equal_inputs_make_an_equal_run_and_the_policy_moves() -> None:
    stream, spec = _stream()
    spec = dataclasses.replace(spec, telemetry_noise=0.1)
    curves = CurveTrack.of(stream, spec, rate=1.0)
    first = run_node(stream, spec, Decide(), 5, curves=curves)
    second = run_node(stream, spec, Decide(), 5, curves=curves)
    assert _equal(first, second)
    assert first.moves > 0
    assert first.moved_bytes > 0
    assert np.isfinite(first.anchor[-1])
    assert len(first.latency_ms) == len(stream)
    assert (first.latency_ms >= first.compute_ms - 1e-6).all()


def test_the_policy_ends_where_the_sweep_says_that_it_is_as_good_as_at_the_best() -> None:
    workload = small_workload(warm_up=400, walk=[{"regime": "quiet", "requests": 3000}])
    stream, spec = make_stream(workload, 1, qps=40.0), workload.node_spec()
    optimum = static_optimum(stream, spec).regime("quiet")
    run = run_node(stream, spec, Decide(), 1, curves=CurveTrack.of(stream, spec, rate=1.0))
    assert optimum.by_service.distance(float(np.median(run.anchor[-100:]))) <= 0.05
    settled = stream.of_regime("quiet")
    held = optimum.by_service.value_ms
    assert run.service_ms[settled].mean() < 1.02 * held


def test_the_twins_curve_is_the_same_whatever_alpha_the_server_runs_at() -> None:
    stream, spec = _stream()
    records = []
    for alpha in (0.15, 0.5, 0.85):
        arm = HoldAndWatch(alpha)
        run = run_node(stream, spec, arm, 1, alpha=alpha)
        # The requests fared differently ...
        records.append((run.missed_rows.sum(), np.zeros((), CURVES)))
        arm.twin.curves(records[-1][1])
    assert len({missed for missed, _ in records}) == 3
    # ... and the twin saw the same.
    assert records[0][1]["requests"] > 1000
    for _, record in records[1:]:
        assert record == records[0][1]


def test_a_hold_is_the_static_run() -> None:
    stream, spec = _stream()
    run = run_node(stream, spec, Hold(0.4), 1, alpha=0.4)
    optimum = static_optimum(stream, spec)
    static = optimum.run_at(0.4)
    assert static.alpha == pytest.approx(0.4, abs=0.01)
    assert np.array_equal(run.latency_ms, static.latency_ms)
    assert run.moves == 0
    assert run.total_refill_bytes == 0.0


def test_costs_declared_wrong_reach_the_policy_and_a_track_can_be_priced_anew() -> None:
    stream, spec = _stream()
    curves = CurveTrack.of(stream, spec, rate=1.0)
    dear = spec.declares()._replace(row_ms=(spec.declares().row_ms[0] * 4.0,))
    again = CurveTrack.of(stream, spec, rate=1.0, costs=dear)
    priced = curves.priced(dear)
    points = int(again.records[-1]["points"])
    assert priced.records["cost_ms"][-1][:points] == pytest.approx(
        again.records["cost_ms"][-1][:points]
    )

    seen: list[float] = []

    class Look(Hold):
        def act(self, observation: Observation) -> Action:
            seen.append(float(observation.telemetry["cost_row_ms"][..., 0]))
            return super().act(observation)

    run_node(stream, spec, Look(0.5), 1, faults=[Fault(FaultKind.COSTS, at_s=5.0)])
    assert seen[0] == pytest.approx(spec.costs.row_ms[0])
    assert seen[-1] == pytest.approx(4.0 * spec.costs.row_ms[0])


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(FaultKind.FROZEN, 10.0, 4.0), Reason.TELEMETRY_STALE),
        (Fault(FaultKind.NAN, 10.0, 2.0), Reason.TELEMETRY_INVALID),
        (Fault(FaultKind.CLOCK_JUMP, 10.0, 2.0, 60.0), Reason.TELEMETRY_STALE),
        (Fault(FaultKind.CLOCK_JUMP, 10.0, 2.0, -60.0), Reason.CLOCK_BACKWARDS),
        (Fault(FaultKind.TWIN_DEAD, 10.0), Reason.CURVES_STALE),
        (Fault(FaultKind.RESTART, 10.0), Reason.SERVER_RESTARTED),
    ],
)
def test_the_policy_says_what_is_wrong_and_stays_in_bounds(fault: Fault, reason: Reason) -> None:
    stream, spec = _stream()
    restarts = [fault.at_s] if fault.kind is FaultKind.RESTART else []
    curves = CurveTrack.of(stream, spec, rate=1.0, restarts_s=restarts)
    run = run_node(stream, spec, Decide(), 1, curves=curves, faults=[fault])
    before = run.time_s < fault.at_s
    assert not (run.reasons[before & (run.time_s > 1.0)] & int(reason)).any()
    assert (run.reasons[~before] & int(reason)).any()
    assert np.isfinite(run.target).all()
    assert ((run.alpha >= 0.1 - 0.011) & (run.alpha <= 0.9 + 0.011)).all()
    if math.isfinite(fault.duration_s):
        later = run.time_s > fault.at_s + fault.duration_s + 3.0
        assert not (run.reasons[later] & int(reason)).any()


def test_telemetry_may_be_late() -> None:
    stream, spec = _stream()
    late = dataclasses.replace(spec, telemetry_delay_ticks=2)
    ages: list[float] = []

    class Look(Hold):
        def act(self, observation: Observation) -> Action:
            reading = observation.reading
            ages.append((reading.now_ns - reading.telemetry_ns) / 1e9)
            return super().act(observation)

    run_node(stream, late, Look(0.5), 1)
    assert ages[-1] == pytest.approx(0.5)
    # A command that telemetry does not know of yet is no refusal.
    run = run_node(stream, late, Decide(), 1, curves=CurveTrack.of(stream, spec, rate=1.0))
    assert run.moves > 0
    assert not (run.reasons & int(Reason.SERVER_LIMITED)).any()


def test_what_is_counted_as_context_is_no_matter_of_what_it_costs() -> None:
    stream, spec = _stream()
    counted, taken = [], []
    for context in ("causal", "whole"):
        node = EngineNode(dataclasses.replace(spec, context=context), 0.5, stream.rate)
        node.serve(stream, 0, 500)
        record = np.zeros((), TELEMETRY)
        node.telemetry(record, 1)
        counted.append(int(record["context_tokens"]))
        taken.append(float(record["compute_ms"]))
    assert counted[0] == counted[1] > 0
    assert taken[1] > taken[0]


def test_overlapped_nodes_are_priced_by_the_slower_stage() -> None:
    workload = small_workload().with_gather("overlap")
    stream, spec = make_stream(workload, 1, qps=40.0), workload.node_spec()
    run = run_node(stream, spec, Hold(0.5), 1)
    assert run.service_ms == pytest.approx(np.maximum(run.gather_ms, run.compute_ms))
    with pytest.raises(ValueError, match="cannot be priced anew"):
        CurveTrack.of(stream, spec, rate=1.0).priced(CostConstants(1.0, 1.0, 0.0, (1.0,)))
