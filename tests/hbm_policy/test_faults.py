"""What goes wrong around a decision: how far α can get, and what is said."""

from __future__ import annotations

import math

import pytest
from hbm_policy import (
    Action,
    Intake,
    Policy,
    PolicyConfig,
    PolicyState,
    Reason,
    ResidualConfig,
    ShieldConfig,
    Traffic,
    decide,
    describe,
    is_hold,
)
from hbm_policy.layers import MAX_SLEW_SCALE
from hbm_pool.contracts.records import Mode

TICK_NS = 250_000_000
EXTENT = 1 / 400
HOUR_NS = 3_600_000_000_000
STEP = ShieldConfig().slew_per_s * 0.25 + EXTENT
"""Furthest that one tick may move the target."""


def test_a_suspended_process_goes_on_at_its_speed(adopted, follow, reading, valley) -> None:
    decisions, state = follow(adopted, 6, 0.8)
    alpha = decisions[-1].target
    late = 8 * TICK_NS + HOUR_NS
    seen = reading(
        8,
        now_ns=late,
        telemetry_ns=late,
        alpha=alpha,
        alpha_target=alpha,
        command_generation=state.generation,
        curve=valley(0.8, monotonic_ns=late, requests=10_000),
    )
    decision = decide(seen, state)
    assert decision.reasons & Reason.RAMPING
    assert 0.0 < decision.target - alpha <= ShieldConfig().slew_per_s + EXTENT


def test_a_suspended_pod_holds_until_the_server_speaks_again(adopted, follow, reading) -> None:
    decisions, state = follow(adopted, 6, 0.8)
    alpha, late = decisions[-1].target, 8 * TICK_NS + HOUR_NS
    held = decide(reading(8, now_ns=late, alpha=alpha, alpha_target=alpha), state)
    assert held.reasons == Reason.TELEMETRY_STALE
    assert held.target == pytest.approx(alpha, abs=EXTENT)
    after = late + TICK_NS
    seen = reading(9, now_ns=after, telemetry_ns=after, alpha=alpha, alpha_target=alpha)
    decision = decide(seen, held.state)
    assert decision.apply
    assert abs(decision.target - alpha) <= STEP


def test_a_clock_that_went_back_costs_one_decision(adopted, follow, reading) -> None:
    decisions, state = follow(adopted, 60, 0.8, start=100_000)
    alpha = decisions[-1].target
    held = decide(reading(10, alpha=alpha, alpha_target=alpha), state)
    assert held.reasons == Reason.CLOCK_BACKWARDS
    assert not held.apply
    # The server has counted on: only the clock is another one.
    decisions, _ = follow(held.state, 200, 0.3, start=11, alpha=alpha, emb_accesses=10**9)
    assert decisions[0].apply
    moving = [each for each in decisions if each.reasons & Reason.MOVE_STARTED]
    assert moving, "the dwell does not wait for the old clock"
    assert decisions[-1].target < alpha - 0.1


def test_frozen_telemetry_is_stale_in_time_and_thaws(adopted, reading) -> None:
    state, held = adopted, []
    for tick in range(2, 40):
        decision = decide(reading(tick, telemetry_ns=TICK_NS, emb_accesses=5_000), state)
        state = decision.state
        if decision.reasons & Reason.TELEMETRY_STALE:
            held.append(tick)
            assert not decision.apply
        assert decision.target == 0.5
    # 2 s after its stamp, from then on always.
    assert held == list(range(10, 40))
    assert decide(reading(40), state).apply


def test_counters_that_stand_still_allow_one_move(adopted, follow) -> None:
    decisions, _ = follow(adopted, 600, 0.9, emb_accesses=5_000 + 8_000, requests=5)
    starts = [each for each in decisions if each.reasons & Reason.MOVE_STARTED]
    assert len(starts) == 1
    assert decisions[-1].reasons & Reason.DWELL


@pytest.mark.parametrize("field", ["alpha", "alpha_target", "server_alpha_max"])
def test_telemetry_that_is_no_number_holds_and_recovers(adopted, follow, reading, field) -> None:
    decisions, state = follow(adopted, 6, 0.8)
    alpha = decisions[-1].target
    fields = {"alpha": alpha, "alpha_target": alpha}
    held = decide(reading(8, **fields | {field: math.nan}), state)
    assert held.reasons == Reason.TELEMETRY_INVALID
    assert not held.apply
    assert held.target == pytest.approx(alpha, abs=EXTENT)
    decision = decide(reading(9, **fields), held.state)
    assert decision.apply
    assert abs(decision.target - alpha) <= STEP


def test_a_link_that_is_no_number_pauses_the_refill(adopted, reading) -> None:
    decision = decide(reading(2, link_busy=math.nan), adopted)
    assert decision.refill_bytes_per_s == 0.0
    assert decision.reasons & Reason.REFILL_PAUSED


def test_a_twin_that_stopped_ends_trust_but_not_the_anchor(adopted, reading, valley) -> None:
    state, said = adopted, []
    curve = valley(0.5, monotonic_ns=2 * TICK_NS)
    for tick in range(2, 40):
        decision = decide(reading(tick, curve=curve), state)
        state = decision.state
        said.append(bool(decision.reasons & Reason.CURVES_STALE))
        assert not decision.reasons & Reason.MOVE_STARTED
        assert decision.anchor == pytest.approx(0.5)
    assert said == [False] * 9 + [True] * 29


def test_a_restart_in_the_middle_of_a_move(adopted, follow, reading, valley) -> None:
    decisions, state = follow(adopted, 6, 0.8)
    assert decisions[-1].reasons & Reason.RAMPING
    boot = {"boot_epoch": 8, "telemetry_epoch": 8, "emb_accesses": 10}
    old = valley(0.8, monotonic_ns=8 * TICK_NS)  # the twin has not noticed yet
    taken = decide(reading(8, **boot, curve=old), state)
    assert taken.reasons == Reason.SERVER_RESTARTED
    assert not taken.apply
    state = taken.state
    for tick in range(9, 20):
        decision = decide(reading(tick, **boot, curve=old), state)
        state = decision.state
        assert decision.reasons & Reason.CURVES_MISSING
        assert decision.target == 0.5
        assert decision.generation > decisions[-1].generation


def test_one_change_of_a_fixed_alpha_is_one_move(adopted, follow, reading) -> None:
    fixed = {"mode": int(Mode.FIXED)}
    decisions, state = follow(adopted, 60, 0.2, alpha_fixed=0.65, **fixed)
    more, state = follow(
        state, 60, 0.2, start=62, alpha=decisions[-1].target, alpha_fixed=0.4, **fixed
    )
    starts = [bool(each.reasons & Reason.MOVE_STARTED) for each in decisions + more]
    assert sum(starts) == 2
    assert starts[0]
    assert starts[60]
    assert len({each.target for each in decisions}) > 5, "each in many steps"


def test_a_fixed_alpha_out_of_the_servers_reach_is_one_move(adopted, reading) -> None:
    state, starts = adopted, 0
    for tick in range(2, 60):
        seen = reading(
            tick, mode=int(Mode.FIXED), alpha_fixed=0.8, command_generation=state.generation
        )
        decision = decide(seen, state)  # the pool stays at 0.5 whatever is asked
        state = decision.state
        starts += bool(decision.reasons & Reason.MOVE_STARTED)
    assert decision.reasons & Reason.SERVER_LIMITED
    assert starts == 1


def test_before_anything_was_read_it_says_so(make_info) -> None:
    nothing = Intake(make_info()).reading(TICK_NS, 7, None, None, None)
    decision = decide(nothing, PolicyState())
    assert decision.reasons == Reason.NO_TELEMETRY
    assert not decision.apply
    assert 0.0 <= decision.target <= 1.0


class Wild:
    """A residual that asks for as much as it can, another way each time."""

    gain = 1.0

    def __init__(self) -> None:
        self.asked = 0

    def act(self, observation):
        self.asked += 1
        sign = 1.0 if self.asked % 3 else -1.0
        return Action(sign, 1.0, 1.0, 0.0 if self.asked % 5 else 1.0)


FAULTS = {
    "telemetry frozen for 2 s": (
        lambda tick, seen: {"telemetry_ns": 40 * TICK_NS},
        range(41, 57),
        Reason.TELEMETRY_STALE,
    ),
    "alpha is no number": (
        lambda tick, seen: {"alpha": math.nan},
        range(41, 49),
        Reason.TELEMETRY_INVALID,
    ),
    "measured times are no numbers": (
        lambda tick, seen: {
            "traffic": Traffic(gather_ms=math.nan, compute_ms=math.inf, service_ms=-math.inf)
        },
        range(41, 49),
        Reason.RESIDUAL,
    ),
    "the twin is dead": (
        lambda tick, seen: {"curve": seen.curve._replace(monotonic_ns=40 * TICK_NS)},
        range(41, 120),
        Reason.CURVES_STALE,
    ),
    "prices x4": (
        lambda tick, seen: {
            "curve": seen.curve._replace(
                cost_ms=tuple(4.0 * each for each in reversed(seen.curve.cost_ms))
            )
        },
        range(41, 120),
        Reason.GATE_OPEN,
    ),
    "prices are no numbers": (
        lambda tick, seen: {"curve": seen.curve._replace(cost_ms=(math.nan,) * 17)},
        range(41, 60),
        Reason.CURVES_INVALID,
    ),
    "the clock jumps an hour ahead": (
        lambda tick, seen: {"now_ns": seen.now_ns + HOUR_NS},
        range(41, 43),
        Reason.TELEMETRY_STALE,
    ),
    "the clock goes back": (
        lambda tick, seen: {"now_ns": 1, "telemetry_ns": 1},
        range(41, 43),
        Reason.CLOCK_BACKWARDS,
    ),
    "the server restarts": (
        lambda tick, seen: {"boot_epoch": 8, "telemetry_epoch": 8, "emb_accesses": tick},
        range(41, 300),
        Reason.SERVER_RESTARTED,
    ),
    "the link is no number": (
        lambda tick, seen: {"link_busy": math.nan},
        range(41, 60),
        Reason.REFILL_PAUSED,
    ),
    "arrivals x10": (
        lambda tick, seen: {"requests": seen.requests * 10},
        range(41, 300),
        Reason.GATE_OPEN,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_all_layers_stay_bounded_say_so_and_come_back(reading, valley, fault) -> None:
    """With the burst gate on and a residual that always asks for the most."""
    config = PolicyConfig(residual=ResidualConfig(residual_gain=1.0))
    policy = Policy(config, residual=Wild())
    change, when, reason = FAULTS[fault]
    step = ShieldConfig().slew_per_s * MAX_SLEW_SCALE * 0.25 + EXTENT
    # A tick that comes late counts for a second at most.
    late = ShieldConfig().slew_per_s * MAX_SLEW_SCALE * 1.0 + EXTENT
    state, alpha, generation, boot = PolicyState(), 0.5, 0, 7
    said = 0
    for tick in range(1, 300):
        best = 0.75 if tick % 160 < 80 else 0.3
        seen = reading(
            tick,
            alpha=alpha,
            alpha_target=alpha,
            command_generation=generation,
            requests=20 * tick,
            pool_bytes=1 << 30,
            curve=valley(best, monotonic_ns=tick * TICK_NS, requests=20 * tick),
        )
        if tick in when:
            seen = seen._replace(**change(tick, seen))
            if seen.boot_epoch != boot:
                boot = seen.boot_epoch
                seen = seen._replace(curve=None)
        decision = policy.decide(seen, state)
        state = decision.state
        assert 0.1 <= decision.target <= 0.9
        assert describe(decision.reasons)
        said |= decision.reasons if tick in when else 0
        if not decision.apply:
            assert is_hold(decision)
            continue
        moved = abs(decision.target - alpha)
        assert moved <= (late if tick in range(41, 62) else step) + 1e-9
        alpha, generation = decision.target, decision.generation
    assert said & reason
    # Long after it is over the layers decide again, with a say for the residual.
    assert decision.apply
    assert decision.reasons & Reason.RESIDUAL or fault == "the server restarts"
