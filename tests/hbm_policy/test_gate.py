"""The burst gate: what opens it, what follows, and what does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hbm_policy import (
    BurstGate,
    GateConfig,
    Gating,
    Phase,
    Policy,
    PolicyConfig,
    Reason,
    ShieldConfig,
    Traffic,
    decide,
)

TICK_NS = 250_000_000
MIB = 1 << 20


class World:
    """Ticks of a server whose requests cost and arrive as told; the twin's window is 32."""

    def __init__(self, reading, valley, gate: BurstGate, seed: int = 0) -> None:
        self._reading, self._valley = reading, valley
        self.gate = gate
        self.random = np.random.default_rng(seed)
        self.tick = 0
        self.requests = 0
        self.cost_ms = 5.0
        self.memory: tuple[float, ...] = ()
        self.alpha = 0.5

    def step(self, per_tick: float = 20.0, mean_ms: float = 5.0, **fields) -> Gating:
        self.tick += 1
        came = int(self.random.poisson(per_tick))
        for cost in mean_ms * self.random.lognormal(0.0, 0.5, came):
            self.cost_ms += (cost - self.cost_ms) * (1.0 - math.exp(-1 / 32))
        self.requests += came
        curve = self._valley(
            0.5,
            depth=0.0,
            monotonic_ns=self.tick * TICK_NS,
            requests=self.requests,
            warm=fields.pop("warm", 1.0),
            cost_ms=(self.cost_ms,) * 17,
        )
        seen = self._reading(
            self.tick,
            requests=self.requests,
            curve=curve,
            alpha=self.alpha,
            alpha_target=self.alpha,
            pool_bytes=400 * MIB,
            refill_bytes_per_s=100 * MIB,
            **fields,
        )
        gating = self.gate.step(seen, self.memory)
        self.memory = gating.memory
        return gating

    def run(self, ticks: int, **traffic) -> list[Gating]:
        return [self.step(**traffic) for _ in range(ticks)]


@pytest.fixture
def world(reading, valley):
    def make(seed: int = 0, **config) -> World:
        return World(reading, valley, BurstGate(GateConfig(**config)), seed)

    return make


def opened(run: list[Gating]) -> list[int]:
    """Ticks at which the gate opened."""
    return [i for i, each in enumerate(run) if each.open and not (i and run[i - 1].open)]


def test_steady_traffic_never_opens_it(world) -> None:
    assert sum(len(opened(world(seed).run(2000))) for seed in range(5)) == 0


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_another_cost_of_the_same_split_opens_it_soon(world, factor) -> None:
    delays = []
    for seed in range(10):
        here = world(seed)
        assert not opened(here.run(400))
        delays.append(opened(here.run(40, mean_ms=5.0 * factor))[0])
    assert np.median(delays) <= 5
    assert max(delays) <= 10


@pytest.mark.parametrize("factor", [0.4, 2.0])
def test_another_arrival_rate_opens_it_soon(world, factor) -> None:
    for seed in range(5):
        here = world(seed)
        assert not opened(here.run(400))
        assert opened(here.run(40, per_tick=20.0 * factor))[0] <= 12


def test_it_stays_open_for_its_ticks_and_not_again_at_once(world) -> None:
    here = world(gate_burst_ticks=10, gate_refractory_ticks=50)
    here.run(300)
    run = here.run(400, mean_ms=15.0)
    first = opened(run)[0]
    assert [each.open for each in run[first : first + 11]] == [True] * 10 + [False]
    assert all(each.slew_scale == (2.0 if each.open else 1.0) for each in run)
    assert len(opened(run)) == 1, "the new cost has become the normal one"
    back = here.run(100, mean_ms=5.0)
    assert opened(back), "and the old one is a change again"


def test_one_outlier_is_no_burst(world) -> None:
    here = world()
    here.run(300)
    here.cost_ms *= 40.0
    run = here.run(1)
    here.cost_ms = 5.0
    assert not opened(run + here.run(30))


def test_a_cold_twin_is_not_watched(world) -> None:
    here = world()
    here.run(100)
    run = [here.step(mean_ms=50.0 / (1 + tick), warm=0.5) for tick in range(60)]
    assert not opened(run)


def test_a_twin_that_starts_anew_is_no_burst(world) -> None:
    here = world()
    here.run(300)
    here.requests = 0
    assert not opened(here.run(100))


def test_refused_and_waiting_requests_have_arrived_too(world) -> None:
    """Throughput is what α moves; arrivals are what it cannot move."""
    here = world()
    here.run(300)
    served = here.requests
    for tick in range(1, 61):
        here.tick += 1
        # Twenty come in as before, and eight are served: the rest waits or is refused.
        lost = Traffic(overloads=6 * tick, queue_depth=6 * tick)
        seen = here._reading(here.tick, requests=served + 8 * tick, traffic=lost)
        gating = here.gate.step(seen, here.memory)
        here.memory = gating.memory
        assert not gating.open


def test_after_a_burst_moves_are_as_slow_as_the_refill_and_none_goes_back(world) -> None:
    here = world(gate_burst_ticks=8)
    here.run(300)
    while not here.step(mean_ms=15.0).open:
        assert here.tick < 320
    while here.step(mean_ms=15.0).open:
        here.alpha += 0.05
    moved = here.alpha - 0.5
    recovering = here.step(mean_ms=15.0)
    assert recovering.phase == Phase.RECOVERING
    assert recovering.barred == -1.0
    assert recovering.slew_limit_per_s == pytest.approx(0.25), "100 of 400 MiB per second"
    ticks = 1
    while here.step(mean_ms=15.0).phase == Phase.RECOVERING:
        ticks += 1
    assert ticks * 0.25 == pytest.approx(moved / 0.25, abs=0.75)


def test_without_a_move_there_is_nothing_to_recover_from(world) -> None:
    here = world(gate_burst_ticks=8)
    here.run(300)
    phases = {each.phase for each in here.run(100, mean_ms=15.0)}
    assert phases == {Phase.NORMAL, Phase.BURST}


def test_a_clock_that_jumps_neither_blinds_nor_holds_it(world) -> None:
    here = world()
    here.run(300)
    here.tick -= 200
    assert not opened(here.run(20))
    assert opened(here.run(40, per_tick=60.0))
    here.tick += 100_000
    here.run(400)
    assert here.step().phase == Phase.NORMAL


def test_a_threshold_of_zero_is_no_gate(reading, valley) -> None:
    off = Policy(PolicyConfig(gate=GateConfig(gate_threshold=0.0)))
    none = Policy(PolicyConfig(gate=None))
    state = decide(reading(1), none_state := decide(reading(1), _nothing()).state).state
    assert none_state.boot_epoch == 7
    for tick in range(2, 40):
        seen = reading(tick, requests=100_000 * tick * (tick % 7))
        assert off.decide(seen, state) == none.decide(seen, state)


def _nothing():
    from hbm_policy import PolicyState

    return PolicyState()


def test_an_open_gate_takes_the_newest_curve_and_moves_faster(reading, valley) -> None:
    """A jump of the optimum, seen by whole decisions, with the gate and without."""
    reached = {}
    for name, gate in (("gate", GateConfig()), ("none", None)):
        policy = Policy(
            PolicyConfig(gate=gate, shield=ShieldConfig(slew_per_s=0.1, min_change=0.02))
        )
        state = policy.decide(reading(1), _nothing()).state
        alpha, generation, opened_at = 0.3, 0, None
        path = []
        for tick in range(2, 500):
            late = tick > 400
            curve = valley(0.7 if late else 0.3, monotonic_ns=tick * TICK_NS, requests=20 * tick)
            curve = curve._replace(cost_ms=tuple(v * (2.0 if late else 1.0) for v in curve.cost_ms))
            decision = policy.decide(
                reading(
                    tick,
                    alpha=alpha,
                    alpha_target=alpha,
                    command_generation=generation,
                    requests=20 * tick,
                    curve=curve,
                ),
                state,
            )
            state = decision.state
            alpha, generation = decision.target, decision.generation
            if decision.reasons & Reason.GATE_OPEN:
                opened_at = opened_at or tick
            path.append(alpha)
        reached[name] = path
        assert (opened_at is not None) == (name == "gate")
        if opened_at is not None:
            assert 400 < opened_at <= 410
    fast, slow = (next(i for i, a in enumerate(reached[n]) if a > 0.55) for n in ("gate", "none"))
    assert fast < slow
