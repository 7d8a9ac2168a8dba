"""Whole decisions over many ticks."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hbm_policy import (
    Action,
    Gating,
    Policy,
    PolicyConfig,
    PolicyState,
    Reason,
    ResidualConfig,
    ShieldConfig,
    Traffic,
    decide,
    is_hold,
)
from hbm_policy.layers import MAX_CORRECTION
from hbm_policy.observation import OBSERVATION_NAMES
from hbm_pool.contracts.records import Mode


def test_the_first_sound_reading_is_taken_over_and_not_acted_on(reading) -> None:
    decision = decide(reading(1, alpha=0.3, alpha_target=0.35), PolicyState())
    assert decision.reasons == Reason.SERVER_RESTARTED
    assert not decision.apply
    assert decision.state.target == 0.35


def test_alpha_follows_the_anchor_and_rests_there(adopted, follow) -> None:
    decisions, state = follow(adopted, 400, 0.8, depth=80.0)
    assert decisions[-1].anchor == pytest.approx(0.8, abs=1e-6)
    assert abs(decisions[-1].target - 0.8) < ShieldConfig().min_change + 1 / 400
    assert decisions[-1].reasons & Reason.SMALL_CHANGE
    # Part of the way, a pause, part of the rest: not one jump.
    starts = [each for each in decisions if each.reasons & Reason.MOVE_STARTED]
    assert len(starts) >= 2
    assert max(each.target for each in decisions) <= 0.8
    back, _ = follow(state, 400, 0.3, start=402, alpha=decisions[-1].target, depth=80.0)
    assert abs(back[-1].target - 0.3) <= 0.04
    assert back[-1].reasons & (Reason.SMALL_CHANGE | Reason.SMALL_GAIN)


def test_a_command_keeps_its_generation_while_it_says_the_same(adopted, follow) -> None:
    decisions, _ = follow(adopted, 200, 0.6)
    for left, right in pairwise(decisions):
        said = (left.target, left.refill_bytes_per_s)
        same = said == (right.target, right.refill_bytes_per_s)
        assert right.generation == left.generation + (0 if same else 1)


@pytest.mark.parametrize(
    ("waiting", "slo_ms", "best", "drops"),
    [
        (10, 80.0, 0.2, True),
        (4, 80.0, 0.2, False),  # 5 ms each: less than half of the goal
        (10, 0.0, 0.2, False),  # nobody has said what is too long
        (10, 80.0, 0.8, False),  # KV gives, and has nothing to relocate
    ],
)
def test_emb_drops_what_it_gives_up_while_too_much_waits(
    adopted, reading, valley, waiting, slo_ms, best, drops
) -> None:
    state, said = adopted, []
    for tick in range(2, 8):
        decision = decide(
            reading(
                tick,
                emb_accesses=10**6 * tick,
                traffic=Traffic(queue_depth=waiting),
                slo_ms=slo_ms,
                curve=valley(best),
            ),
            state,
        )
        state = decision.state
        said.append((decision.drop_only, bool(decision.reasons & Reason.DROPPING)))
    assert said[-1] == (drops, drops)
    assert drops or set(said) == {(False, False)}


def test_a_server_that_is_behind_hears_of_the_drop_though_the_target_stays(
    adopted, reading, valley
) -> None:
    """The target was reached by the ramp before; the pool is still relocating towards it."""
    curve = valley(0.5)
    calm = decide(reading(2, alpha=0.6, curve=curve), adopted)
    late = reading(3, alpha=0.6, curve=curve, traffic=Traffic(queue_depth=20), slo_ms=80.0)
    hurried = decide(late, calm.state)
    assert hurried.target == calm.target
    assert (calm.drop_only, hurried.drop_only) == (False, True)
    assert hurried.generation > calm.generation


def test_generations_go_on_after_those_the_server_has_seen(reading) -> None:
    state = decide(reading(1, command_generation=41), PolicyState()).state
    assert decide(reading(2, command_generation=41), state).generation == 42


def test_targets_are_whole_extents(adopted, follow) -> None:
    decisions, _ = follow(adopted, 100, 0.8)
    assert all(abs(each.target * 400 - round(each.target * 400)) < 1e-6 for each in decisions)


def test_recommend_decides_and_applies_nothing(adopted, follow) -> None:
    decisions, _ = follow(adopted, 100, 0.8, mode=int(Mode.RECOMMEND))
    assert not any(each.apply for each in decisions)
    assert all(each.reasons & Reason.MODE_RECOMMEND for each in decisions)
    assert not any(is_hold(each) for each in decisions)
    assert decisions[-1].target > 0.55
    assert {each.generation for each in decisions} == {0}


def test_hold_keeps_alpha_but_still_says_where_the_anchor_is(adopted, follow) -> None:
    decisions, state = follow(adopted, 20, 0.8, mode=int(Mode.HOLD))
    assert not any(each.apply for each in decisions)
    assert decisions[-1].reasons & Reason.MODE_HOLD
    assert decisions[-1].target == 0.5
    assert decisions[-1].anchor == pytest.approx(0.8, abs=1e-6)
    assert state.target == 0.5


def test_fixed_goes_to_the_given_alpha_and_stays(adopted, follow) -> None:
    decisions, _ = follow(adopted, 60, 0.2, mode=int(Mode.FIXED), alpha_fixed=0.65)
    assert decisions[-1].target == 0.65
    assert all(each.apply for each in decisions)
    steps = [right.target - left.target for left, right in pairwise(decisions)]
    assert max(steps) <= 0.05 * 0.25 + 1 / 400


def test_fixed_outside_the_bounds_ends_at_the_bound(adopted, follow) -> None:
    decisions, _ = follow(adopted, 60, 0.2, mode=int(Mode.FIXED), alpha_fixed=0.99)
    assert decisions[-1].target == 0.9
    assert decisions[-1].reasons & Reason.BOUNDED


def test_another_mode_starts_from_where_the_pool_is(adopted, follow, reading) -> None:
    _, state = follow(adopted, 60, 0.8, mode=int(Mode.RECOMMEND))
    assert state.target > 0.5
    decision = decide(reading(100, alpha=0.5, alpha_target=0.5), state)
    assert decision.target == 0.5


def test_a_server_that_aims_elsewhere_is_believed(adopted, reading) -> None:
    state = decide(reading(2), adopted).state
    generation = state.generation
    limited = reading(3, alpha=0.42, alpha_target=0.42, command_generation=generation)
    decision = decide(limited, state)
    assert decision.reasons & Reason.SERVER_LIMITED
    assert decision.target == pytest.approx(0.42)


def test_a_cold_twin_starts_no_move(adopted, reading, valley) -> None:
    state = adopted
    for tick in range(2, 80):
        curve = valley(0.9, warm=0.3, monotonic_ns=tick * 250_000_000)
        decision = decide(reading(tick, curve=curve), state)
        state = decision.state
        assert decision.target == 0.5
        assert decision.reasons & Reason.TWIN_COLD


def test_a_dead_twin_lets_a_move_finish_and_starts_none(adopted, reading, follow) -> None:
    decisions, state = follow(adopted, 60, 0.8)
    target = decisions[-1].target
    for tick in range(62, 200):
        decision = decide(reading(tick, curve=None, alpha=target, alpha_target=target), state)
        state = decision.state
        target = decision.target
        assert decision.reasons & Reason.CURVES_MISSING
        assert not decision.reasons & Reason.MOVE_STARTED
        assert decision.anchor == decisions[-1].anchor


def test_stale_telemetry_in_the_middle_of_a_move_stops_it(adopted, follow, reading) -> None:
    decisions, state = follow(adopted, 6, 0.8)
    assert decisions[-1].reasons & Reason.RAMPING
    held = decide(reading(40, telemetry_ns=1), state)
    assert not held.apply
    assert held.state.goal == held.state.target
    target = decisions[-1].target
    after = decide(reading(41, alpha=target, alpha_target=target, curve=None), held.state)
    assert after.target == pytest.approx(target)


def test_the_recorded_states_replay_to_the_same_decisions(adopted, follow) -> None:
    first, _ = follow(adopted, 120, 0.7)
    second, _ = follow(adopted, 120, 0.7)
    assert first == second


class OpenGate:
    def step(self, reading, memory):
        return Gating(open=True, slew_scale=2.0, memory=(*memory, 1.0)[-3:])


class Says:
    """A residual that always answers the same."""

    gain = 1.0

    def __init__(self, **action: float) -> None:
        self.action = Action(**{"shift": 0.0, "fraction": 0.0, "slew": 0.0, "wait": 0.0} | action)

    def act(self, observation):
        assert len(observation) == len(OBSERVATION_NAMES)
        return self.action


def with_residual(residual: Says, gain: float = 1.0, **shield: float) -> Policy:
    return Policy(
        PolicyConfig(
            shield=ShieldConfig(**shield), residual=ResidualConfig(residual_gain=gain), gate=None
        ),
        residual=residual,
    )


def test_a_gate_is_asked_remembers_and_speeds_moves_up(adopted, reading, valley) -> None:
    config = PolicyConfig(shield=ShieldConfig(slew_per_s=0.04))
    seen = reading(20, curve=valley(0.9, monotonic_ns=20 * 250_000_000))
    state = adopted._replace(now_ns=19 * 250_000_000)
    calm = decide(seen, state, Policy(config))
    burst = decide(seen, state, Policy(config, gate=OpenGate()))
    assert burst.reasons & Reason.GATE_OPEN
    assert burst.target - 0.5 == pytest.approx(2 * (calm.target - 0.5))
    assert burst.state.gate == (1.0,)


@pytest.fixture
def far(adopted, reading, valley):
    """A reading whose anchor is 0.8 and the state before it: a move would start."""
    seen = reading(20, curve=valley(0.8, monotonic_ns=20 * 250_000_000))
    return seen, adopted._replace(now_ns=19 * 250_000_000)


@pytest.mark.parametrize("asked", [0.6, -0.6, 8.0, -8.0, math.inf])
def test_a_residual_shifts_the_goal_within_its_limit(far, asked) -> None:
    policy = with_residual(Says(shift=asked), move_fraction=1.0)
    decision = decide(*far, policy)
    assert decision.reasons & Reason.RESIDUAL
    cut = MAX_CORRECTION * math.copysign(min(abs(asked), 1.0), asked)
    assert decision.state.goal == pytest.approx(0.8 + cut)
    assert decision.anchor == pytest.approx(0.8)
    assert decision.wish == pytest.approx(0.8 + cut)


def test_a_gain_scales_the_residual_and_none_leaves_it_unasked(far) -> None:
    residual = Says(shift=1.0)
    half = decide(*far, with_residual(residual, 0.5, move_fraction=1.0))
    assert half.state.goal == pytest.approx(0.8 + MAX_CORRECTION / 2)
    without = decide(*far, with_residual(residual, 0.0))
    assert without == decide(*far, Policy(PolicyConfig(gate=None)))
    residual.gain = 0.0  # its maker did not find it worth anything
    assert decide(*far, with_residual(residual)) == without


def test_an_untrained_residual_changes_nothing(far) -> None:
    asked = decide(*far, with_residual(Says()))
    without = decide(*far, Policy(PolicyConfig(gate=None)))
    assert asked.target == without.target
    assert asked.state.goal == without.state.goal


def test_a_residual_says_how_far_and_how_fast_but_not_past_the_shield(far) -> None:
    plain = decide(*far, with_residual(Says(), move_fraction=0.4, slew_per_s=0.04))
    half = decide(*far, with_residual(Says(fraction=-1.0, slew=-1.0), move_fraction=0.4,
                                      slew_per_s=0.04))  # fmt: skip
    assert half.state.goal - 0.5 == pytest.approx((plain.state.goal - 0.5) / 2)
    assert half.state.target - 0.5 == pytest.approx((plain.state.target - 0.5) / 4)
    more = decide(*far, with_residual(Says(fraction=9.0, slew=9.0), move_fraction=0.9,
                                      slew_per_s=0.04))  # fmt: skip
    assert more.state.goal == pytest.approx(0.8), "no further than the anchor"
    assert more.state.target - 0.5 == pytest.approx(4 * (plain.state.target - 0.5))


def test_a_residual_that_waits_puts_a_move_off_but_not_for_ever(adopted, reading, valley) -> None:
    waiting = with_residual(Says(wait=1.0))
    state, said = adopted, []
    for tick in range(8, 80):
        decision = decide(
            reading(tick, curve=valley(0.8, monotonic_ns=tick * 250_000_000)), state, waiting
        )
        state = decision.state
        said.append(decision.reasons)
        if decision.reasons & Reason.MOVE_STARTED:
            break
    waits = sum(bool(reasons & Reason.RESIDUAL_WAITS) for reasons in said)
    assert waits == ResidualConfig().residual_wait_ticks
    assert said[-1] & Reason.MOVE_STARTED


@pytest.mark.parametrize("field", ["shift", "fraction", "slew", "wait"])
def test_a_residual_that_is_no_number_is_left_out(far, field) -> None:
    decision = decide(*far, with_residual(Says(**{field: math.nan})))
    assert decision.reasons & Reason.RESIDUAL_INVALID
    assert not decision.reasons & Reason.RESIDUAL
    assert decision.target == decide(*far, Policy(PolicyConfig(gate=None))).target


def test_a_server_without_any_command_begins_at_the_initial_alpha(reading) -> None:
    nothing_known = {"curve": None, "alpha_initial": 0.7}
    state = decide(reading(1, **nothing_known), PolicyState()).state
    targets = []
    for tick in range(2, 40):
        decision = decide(reading(tick, **nothing_known, alpha_target=state.target), state)
        assert decision.apply
        targets.append(decision.target)
        state = decision.state
    assert targets == sorted(targets)
    assert targets[-1] == pytest.approx(0.7)


@pytest.mark.parametrize(
    "fields",
    [
        {"command_generation": 3},  # somebody has decided before
        {"alpha_initial": math.nan},
        {"mode": int(Mode.HOLD)},
    ],
)
def test_others_stay_where_they_are(reading, fields) -> None:
    seen = {"curve": None, "alpha_initial": 0.7} | fields
    state = decide(reading(1, **seen), PolicyState()).state
    for tick in range(2, 40):
        decision = decide(reading(tick, **seen), state)
        assert decision.target == 0.5
        state = decision.state


def test_the_initial_alpha_counts_when_a_hold_ends_and_stays_within_the_bounds(reading) -> None:
    seen = {"curve": None, "alpha_initial": 0.95, "alpha_max": 0.8}
    state = decide(reading(1, **seen, mode=int(Mode.HOLD)), PolicyState()).state
    for tick in range(2, 60):
        state = decide(reading(tick, **seen), state).state
    assert state.target == pytest.approx(0.8)
