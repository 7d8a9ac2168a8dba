"""Whatever comes in, what goes out is allowed, or α is held."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hbm_policy import (
    Action,
    Gating,
    Policy,
    PolicyConfig,
    PolicyState,
    Reading,
    Reason,
    ResidualConfig,
    Shield,
    ShieldConfig,
    Traffic,
    decide,
    is_hold,
)
from hbm_policy.observation import OBSERVATION_NAMES
from hbm_policy.reading import HOLDS, Curve
from hbm_policy.shield import Wish
from hbm_pool.contracts.records import Mode
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

TICK_NS = 250_000_000
WILD = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(-0.5, 1.5),
    st.floats(0.0, 1.0),
    st.sampled_from([0.0, 1.0, 0.1, 0.9, math.nan, math.inf, -math.inf]),
)
WILD_INT = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-3, 3), st.integers(0, 10**9))
NEAR_INT = st.integers(0, 4 * TICK_NS)
CURVES = st.one_of(
    st.none(),
    st.builds(
        Curve,
        monotonic_ns=WILD_INT,
        boot_epoch=st.integers(0, 3),
        requests=WILD_INT,
        requests_lost=st.integers(0, 5),
        warm=WILD,
        alpha=st.lists(WILD, max_size=6).map(tuple),
        cost_ms=st.lists(WILD, max_size=6).map(tuple),
    ),
    st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3).map(
        lambda costs: Curve(0, 1, 10, 0, 1.0, (0.1, 0.5, 0.9), tuple(costs))
    ),
)
TRAFFIC = st.builds(
    Traffic,
    **{
        name: WILD if name.endswith("_ms") else st.one_of(st.integers(0, 10**6), WILD_INT)
        for name in Traffic._fields
    },
)
READINGS = st.builds(
    Reading,
    now_ns=st.one_of(WILD_INT, NEAR_INT),
    boot_epoch=st.integers(0, 2),
    telemetry_ns=st.one_of(WILD_INT, NEAR_INT),
    telemetry_epoch=st.integers(0, 2),
    alpha=WILD,
    alpha_target=WILD,
    command_generation=st.one_of(st.integers(0, 5), WILD_INT),
    moving=st.booleans(),
    draining=st.booleans(),
    requests=WILD_INT,
    emb_accesses=st.one_of(st.integers(0, 10**9), WILD_INT),
    emb_slots=st.one_of(st.integers(0, 10**6), WILD_INT),
    refill_backlog_rows=WILD_INT,
    link_busy=WILD,
    extents=st.one_of(st.integers(1, 1000), st.integers(-1, 3)),
    server_alpha_min=WILD,
    server_alpha_max=WILD,
    mode=st.one_of(st.none(), st.sampled_from([int(mode) for mode in Mode]), WILD_INT),
    alpha_min=WILD,
    alpha_max=WILD,
    alpha_fixed=WILD,
    refill_bytes_per_s=WILD,
    curve=CURVES,
    pool_bytes=WILD_INT,
    slo_ms=WILD,
    traffic=TRAFFIC,
)
# Sound but for a few fields: these get past the first checks.
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "alpha": WILD,
    "alpha_target": WILD,
    "alpha_min": WILD,
    "alpha_max": WILD,
    "alpha_fixed": WILD,
    "server_alpha_min": WILD,
    "server_alpha_max": WILD,
    "link_busy": WILD,
    "refill_bytes_per_s": WILD,
    "emb_accesses": st.integers(-1, 10**9),
    "emb_slots": st.integers(-1, 10**6),
    "extents": st.integers(-1, 50),
    "command_generation": st.integers(-1, 50),
    "mode": st.sampled_from([None, 0, 1, 2, 3, 4]),
    "moving": st.booleans(),
    "draining": st.booleans(),
    "curve": CURVES,
    "traffic": TRAFFIC,
    "requests": WILD_INT,
    "slo_ms": WILD,
    "pool_bytes": WILD_INT,
    "telemetry_epoch": st.integers(6, 8),
    "boot_epoch": st.integers(6, 8),
    "now_ns": st.integers(0, 10 * TICK_NS),
    "telemetry_ns": st.integers(0, 10 * TICK_NS),
}
SPOILT = st.lists(
    st.sampled_from(sorted(FIELDS)).flatmap(lambda name: st.tuples(st.just(name), FIELDS[name])),
    max_size=3,
).map(dict)


class WildGate:
    """A gate that asks for anything."""

    def __init__(self, gating: Gating) -> None:
        self.gating = gating

    def step(self, reading: Reading, memory: tuple[float, ...]) -> Gating:
        return self.gating


class WildResidual:
    """A residual that asks for anything."""

    gain = 1.0

    def __init__(self, action: Action) -> None:
        self.action = action

    def act(self, observation: tuple[float, ...]) -> Action:
        assert len(observation) == len(OBSERVATION_NAMES)
        return self.action


GATINGS = st.builds(
    Gating,
    open=st.booleans(),
    slew_scale=WILD,
    memory=st.tuples(WILD),
    slew_limit_per_s=WILD,
    barred=WILD,
    since_ticks=st.floats(0.0, math.inf),
)
POLICIES = st.builds(
    lambda gating, action: Policy(
        PolicyConfig(residual=ResidualConfig(residual_gain=1.0)),
        gate=gating and WildGate(gating),
        residual=WildResidual(action),
    ),
    # None: the gate that ships, with its own memory.
    st.one_of(st.none(), GATINGS),
    st.builds(Action, WILD, WILD, WILD, WILD),
)


def check(reading: Reading, decision: Any) -> None:
    """What must hold for any reading."""
    assert math.isfinite(decision.target)
    assert 0.0 <= decision.target <= 1.0
    assert math.isfinite(decision.refill_bytes_per_s)
    assert decision.refill_bytes_per_s >= 0.0
    assert decision.gain >= 0.0
    assert 0.0 <= decision.trust <= 1.0
    assert decision.reasons >= 0
    if decision.apply:
        assert not is_hold(decision)
        assert reading.server_alpha_min <= decision.target <= reading.server_alpha_max
        low = max(reading.alpha_min, reading.server_alpha_min)
        high = min(reading.alpha_max, reading.server_alpha_max)
        if low <= high:
            assert low <= decision.target <= high
        assert decision.refill_bytes_per_s <= reading.refill_bytes_per_s
        assert decision.generation > 0
        assert reading.mode in (Mode.AUTO, Mode.FIXED)
    else:
        assert is_hold(decision) or reading.mode == Mode.RECOMMEND


@settings(max_examples=200, deadline=None)
@given(readings=st.lists(READINGS, min_size=1, max_size=4), policy=POLICIES)
def test_no_reading_makes_a_target_that_is_not_allowed(
    readings: list[Reading], policy: Policy
) -> None:
    state = PolicyState()
    for each in readings:
        decision = decide(each, state, policy)
        check(each, decision)
        assert decision.generation >= state.generation
        assert decision.tick == state.tick + 1
        state = decision.state


@settings(max_examples=200, deadline=None)
@given(spoilt=st.lists(SPOILT, min_size=1, max_size=6), policy=POLICIES)
def test_a_few_bad_fields_never_get_past_the_shield(reading, spoilt, policy) -> None:
    state = PolicyState()
    for tick, fields in enumerate(spoilt, start=1):
        seen = reading(tick)._replace(**fields)
        decision = decide(seen, state, policy)
        check(seen, decision)
        state = decision.state


@settings(max_examples=200, deadline=None)
@given(spoilt=st.lists(SPOILT, min_size=1, max_size=4), policy=POLICIES)
def test_after_any_reading_a_sound_one_is_decided_again(reading, valley, spoilt, policy) -> None:
    state = PolicyState()
    for tick, fields in enumerate(spoilt, start=1):
        state = decide(reading(tick)._replace(**fields), state, policy).state
    decisions = []
    for tick in range(40, 43):
        seen = reading(tick, emb_accesses=10**10 + tick)
        decisions.append(decide(seen, state, policy))
        state = decisions[-1].state
    assert decisions[-1].apply


@settings(max_examples=200, deadline=None)
@given(readings=st.lists(READINGS, min_size=1, max_size=3))
def test_a_replay_decides_the_same(readings: list[Reading]) -> None:
    def run() -> list[str]:
        state, said = PolicyState(), []
        for each in readings:
            decision = decide(each, state)
            state = decision.state
            said.append(repr(decision))
        return said

    assert run() == run()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"boot_epoch": 0}, Reason.NO_TELEMETRY),
        ({"telemetry_ns": 0}, Reason.NO_TELEMETRY),
        ({"telemetry_epoch": 6}, Reason.EPOCH_MISMATCH),
        ({"telemetry_ns": 1}, Reason.TELEMETRY_STALE),
        ({"telemetry_ns": 10**12}, Reason.CLOCK_BACKWARDS),
        ({"now_ns": TICK_NS // 2, "telemetry_ns": TICK_NS // 2}, Reason.CLOCK_BACKWARDS),
        ({"alpha": math.nan}, Reason.TELEMETRY_INVALID),
        ({"alpha": 1.5}, Reason.TELEMETRY_INVALID),
        ({"alpha_target": -0.1}, Reason.TELEMETRY_INVALID),
        ({"server_alpha_min": 0.95}, Reason.TELEMETRY_INVALID),
        ({"extents": 0}, Reason.TELEMETRY_INVALID),
        ({"emb_accesses": 3}, Reason.TELEMETRY_INVALID),
        ({"mode": None}, Reason.INTENT_MISSING),
        ({"mode": 9}, Reason.INTENT_INVALID),
        ({"alpha_min": 0.8, "alpha_max": 0.2}, Reason.INTENT_INVALID),
        ({"alpha_max": math.inf}, Reason.INTENT_INVALID),
        ({"refill_bytes_per_s": -1.0}, Reason.INTENT_INVALID),
        ({"refill_bytes_per_s": math.nan}, Reason.INTENT_INVALID),
        ({"mode": 3, "alpha_fixed": math.nan}, Reason.INTENT_INVALID),
        ({"draining": True}, Reason.DRAINING),
    ],
)
def test_each_fault_holds_and_says_why(reading, adopted, fields, reason) -> None:
    decision = decide(reading(20, **fields), adopted)
    assert decision.reasons == reason
    assert not decision.apply
    assert decision.target == 0.5
    assert reason & HOLDS


def test_a_new_boot_of_the_server_drops_what_was_known(reading, valley, adopted) -> None:
    state = decide(reading(2), adopted).state
    assert not math.isnan(state.anchor)
    seen = reading(3, boot_epoch=8, telemetry_epoch=8, emb_accesses=1, alpha_target=0.3, alpha=0.3)
    decision = decide(seen, state)
    assert decision.reasons == Reason.SERVER_RESTARTED
    assert not decision.apply
    assert math.isnan(decision.state.anchor)
    assert decision.state.target == 0.3


def steer(reading: Reading, state: PolicyState, wish: Wish | None, **config: Any) -> Any:
    shield = Shield(ShieldConfig(**config))
    return shield.steer(reading, state, shield.bounds(reading), wish)


def wish(alpha: float, gain: float = 0.1, scale: float = 1.0) -> Wish:
    return Wish(alpha, gain, 1.0, scale, free=False)


RESTED = PolicyState(boot_epoch=7, target=0.5, goal=0.5, now_ns=99 * TICK_NS)


def test_a_move_goes_part_of_the_way_at_limited_speed(reading) -> None:
    state, targets = RESTED, []
    for tick in range(100, 130):
        quiet = reading(tick, emb_accesses=10_000)
        found = steer(quiet, state, wish(0.7), slew_per_s=0.04, move_fraction=0.75)
        targets.append(found.target)
        state = state._replace(
            target=found.target,
            goal=found.goal,
            move_size=found.move_size,
            move_ns=found.move_ns,
            move_accesses=found.move_accesses,
            move_requests=found.move_requests,
            now_ns=quiet.now_ns,
        )
    steps = [right - left for left, right in pairwise(targets)]
    assert max(steps) <= 0.04 * 0.25 + 1e-9
    assert max(targets) == pytest.approx(0.65)
    assert state.move_size == pytest.approx(0.15)


def test_a_late_tick_does_not_jump(reading) -> None:
    late = reading(400)
    found = steer(late, RESTED, wish(0.9), slew_per_s=0.05)
    assert found.target - 0.5 <= 0.05 + 1e-9


def test_a_small_change_or_a_small_gain_starts_nothing(reading) -> None:
    seen = reading(100)
    assert steer(seen, RESTED, wish(0.51)).reasons == Reason.SMALL_CHANGE
    assert steer(seen, RESTED, wish(0.7, gain=0.001)).reasons == Reason.SMALL_GAIN
    absolute = steer(seen, RESTED, wish(0.7), min_gain_ms=2.0)
    assert absolute.reasons == Reason.SMALL_GAIN
    assert steer(seen, RESTED, wish(0.7)).reasons & Reason.MOVE_STARTED


def test_no_move_starts_while_the_pool_moves(reading) -> None:
    found = steer(reading(100, moving=True), RESTED, wish(0.7))
    assert found.reasons == Reason.SERVER_MOVING


def test_dwell_counts_accesses_per_slot_and_grows_with_the_last_move(reading) -> None:
    state = RESTED._replace(move_accesses=100_000, move_requests=500, move_ns=1)
    for size, needed in ((0.0, 8_000), (0.3, 16_000), (0.6, 24_000)):
        moved = state._replace(move_size=size)
        early = reading(100, emb_accesses=100_000 + needed - 1)
        assert steer(early, moved, wish(0.7)).reasons == Reason.DWELL
        done = reading(100, emb_accesses=100_000 + needed)
        assert steer(done, moved, wish(0.7)).reasons & Reason.MOVE_STARTED


@pytest.mark.parametrize(("size", "needed"), [(0.0, 128), (0.3, 256)])
def test_in_a_large_pool_dwell_is_over_when_the_evidence_is_new(reading, size, needed) -> None:
    """60 GB of rows take thousands of requests to be looked at once: longer than a regime."""
    state = RESTED._replace(move_accesses=100_000, move_requests=500, move_size=size, move_ns=1)
    for served, over in ((needed - 1, False), (needed, True)):
        seen = reading(100, emb_slots=50_000_000, emb_accesses=200_000, requests=500 + served)
        found = steer(seen, state, wish(0.7))
        assert found.reasons & Reason.MOVE_STARTED if over else found.reasons == Reason.DWELL


def test_dwell_lasts_a_least_time_whatever_the_traffic(reading) -> None:
    state = RESTED._replace(move_ns=100 * TICK_NS - 999_000_000)
    assert steer(reading(100), state, wish(0.7)).reasons == Reason.DWELL
    assert steer(reading(100), state, wish(0.7), dwell_ms=0.0).reasons & Reason.MOVE_STARTED


def test_a_move_stops_when_the_wish_goes_to_the_other_side(reading) -> None:
    state = RESTED._replace(target=0.55, goal=0.7)
    found = steer(reading(100), state, wish(0.4))
    assert (found.target, found.goal) == (0.55, 0.55)
    assert found.reasons & Reason.MOVE_STOPPED


def test_without_a_wish_a_move_under_way_goes_on(reading) -> None:
    state = RESTED._replace(target=0.55, goal=0.7)
    assert steer(reading(100), state, None).reasons == Reason.RAMPING


def test_an_alpha_outside_new_bounds_comes_in_at_once(reading) -> None:
    found = steer(reading(100, alpha_max=0.4), RESTED, wish(0.45, gain=0.0))
    assert found.reasons & Reason.BOUNDED
    assert found.target <= 0.4


@pytest.mark.parametrize(
    ("asked", "server", "allowed"),
    [
        ((0.2, 0.6), (0.1, 0.9), (0.2, 0.6)),
        ((0.0, 1.0), (0.1, 0.9), (0.1, 0.9)),
        ((0.92, 0.95), (0.1, 0.9), (0.9, 0.9)),
        ((0.0, 0.05), (0.1, 0.9), (0.1, 0.1)),
    ],
)
def test_bounds_are_those_of_both_sides_and_the_server_wins(
    reading, asked, server, allowed
) -> None:
    seen = reading(
        alpha_min=asked[0],
        alpha_max=asked[1],
        server_alpha_min=server[0],
        server_alpha_max=server[1],
    )
    assert Shield(ShieldConfig()).bounds(seen) == allowed


@pytest.mark.parametrize(
    ("busy", "share"), [(0.0, 1.0), (0.5, 0.5), (0.89, 0.125), (0.95, 0.0), (math.nan, 0.0)]
)
def test_refill_gets_the_idle_share_of_the_link(reading, busy, share) -> None:
    shield = Shield(ShieldConfig())
    assert shield.refill_bytes_per_s(reading(link_busy=busy), 0.5) == share * 1e6


def test_refill_rests_while_emb_gives_extents_up(reading) -> None:
    shield = Shield(ShieldConfig())
    assert shield.refill_bytes_per_s(reading(), 0.4) == 0.0
    assert shield.refill_bytes_per_s(reading(), 0.6) > 0.0
    unlimited = Shield(ShieldConfig(refill_link_busy=1.0))
    assert unlimited.refill_bytes_per_s(reading(link_busy=0.99), 0.5) == 1e6


@pytest.mark.parametrize(
    "wrong",
    [
        {"slew_per_s": 0.0},
        {"move_fraction": 0.0},
        {"move_fraction": 1.5},
        {"stale_ms": -1.0},
        {"min_gain": math.nan},
        {"unknown": 1},
    ],
)
def test_impossible_parameters_are_refused(wrong) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        PolicyConfig(shield=ShieldConfig(**wrong))
