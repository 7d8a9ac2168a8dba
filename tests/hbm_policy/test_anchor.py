"""From curve to α̂."""

from __future__ import annotations

import math

import pytest
from hbm_policy import AnchorConfig, PolicyState, Reason, TwinAnchor
from hbm_policy.anchor import cost_at, parabola_vertex
from hypothesis import given
from hypothesis import strategies as st

STATE = PolicyState(boot_epoch=7)


def estimate(reading, curve, state=STATE, low=0.1, high=0.9, newest_only=False, **config):
    seen = reading(4, curve=curve and curve._replace(monotonic_ns=4 * 250_000_000))
    return TwinAnchor(AnchorConfig(**config)).estimate(seen, state, low, high, newest_only)


def after(state: PolicyState, found) -> PolicyState:
    return state._replace(
        anchor=found.anchor,
        curve_alpha=found.curve_alpha,
        curve_cost_ms=found.curve_cost_ms,
        curve_requests=found.curve_requests,
    )


@pytest.mark.parametrize("best", [0.13, 0.3, 0.512, 0.84])
def test_the_minimum_of_a_parabola_is_found_between_candidates(reading, valley, best) -> None:
    found = estimate(reading, valley(best))
    assert found.anchor == pytest.approx(best, abs=1e-9)
    assert found.trust == 1.0
    assert found.reasons & Reason.ANCHOR_MOVED


@pytest.mark.parametrize(("best", "anchor"), [(-0.3, 0.1), (1.4, 0.9)])
def test_a_slope_ends_at_the_outermost_candidate(reading, valley, best, anchor) -> None:
    assert estimate(reading, valley(best)).anchor == anchor


def test_the_gain_is_the_predicted_saving_over_the_applied_alpha(reading, valley) -> None:
    found = estimate(reading, valley(0.3))
    assert found.gain_ms == pytest.approx(8.0 * 0.2**2)
    assert found.gain == pytest.approx(found.gain_ms / (5.0 + 8.0 * 0.2**2))


@pytest.mark.parametrize(("low", "high", "anchor"), [(0.1, 0.25, 0.25), (0.52, 0.54, 0.52)])
def test_the_anchor_stays_within_the_bounds(reading, valley, low, high, anchor) -> None:
    assert estimate(reading, valley(0.4), low=low, high=high).anchor == anchor


def test_on_a_plateau_the_anchor_stays(reading, valley) -> None:
    state = after(STATE, estimate(reading, valley(0.5, depth=0.01)))
    found = estimate(reading, valley(0.55, depth=0.01, requests=2000), state)
    assert found.anchor == state.anchor
    assert found.reasons & Reason.ANCHOR_KEPT


def test_a_relative_and_an_absolute_gain_are_both_needed_to_leave(reading, valley) -> None:
    state = after(STATE, estimate(reading, valley(0.3)))
    there = valley(0.6, requests=10**6)
    assert estimate(reading, there, state).anchor == pytest.approx(0.6)
    assert estimate(reading, there, state, keep_gain_ms=5.0).anchor == state.anchor
    assert estimate(reading, there, state, keep_gain=0.5).anchor == state.anchor


def test_smoothing_counts_requests_not_ticks(reading, valley) -> None:
    start = after(STATE, estimate(reading, valley(0.3, requests=1)))
    once = after(start, estimate(reading, valley(0.7, requests=61), start))
    often = start
    for requests in (21, 41, 61):
        often = after(often, estimate(reading, valley(0.7, requests=requests), often))
    assert often.curve_cost_ms == pytest.approx(once.curve_cost_ms)
    still = estimate(reading, valley(0.7, requests=61), once)
    assert still.curve_cost_ms == once.curve_cost_ms


def test_an_open_gate_drops_the_past(reading, valley) -> None:
    start = after(STATE, estimate(reading, valley(0.3, requests=1)))
    curve = valley(0.7, requests=5)
    assert estimate(reading, curve, start).anchor < 0.4
    assert estimate(reading, curve, start, newest_only=True).anchor == pytest.approx(0.7)


def test_a_twin_that_started_anew_is_not_mixed_with_the_old_one(reading, valley) -> None:
    start = after(STATE, estimate(reading, valley(0.3, requests=5000)))
    assert estimate(reading, valley(0.7, requests=10), start).anchor == pytest.approx(0.7)


def test_other_candidates_are_not_mixed_with_the_old_ones(reading, valley) -> None:
    start = after(STATE, estimate(reading, valley(0.3)))
    other = valley(0.3, alpha=(0.2, 0.5, 0.8), cost_ms=(3.0, 2.0, 3.0), requests=1001)
    assert estimate(reading, other, start).anchor == pytest.approx(0.5)


def test_a_cold_twin_is_shown_but_not_trusted(reading, valley) -> None:
    found = estimate(reading, valley(0.3, warm=0.5))
    assert found.anchor == pytest.approx(0.3)
    assert found.trust == 0.0
    assert found.reasons & Reason.TWIN_COLD


def test_no_usable_curve_keeps_the_last_anchor_without_trust(reading, valley) -> None:
    state = after(STATE, estimate(reading, valley(0.3)))
    turned = tuple(reversed(valley(0.6).alpha))
    cases = [
        (None, Reason.CURVES_MISSING),
        (valley(0.6, requests=0, alpha=(), cost_ms=()), Reason.CURVES_MISSING),
        (valley(0.6, requests=-5), Reason.CURVES_INVALID),
        (valley(0.6, requests=2000, boot_epoch=8), Reason.CURVES_MISSING),
        (valley(0.6, requests=2000, cost_ms=(math.nan, *([1.0] * 16))), Reason.CURVES_INVALID),
        (valley(0.6, requests=2000, cost_ms=(*([1.0] * 16), math.inf)), Reason.CURVES_INVALID),
        (valley(0.6, requests=2000, cost_ms=(*([1.0] * 16), -1.0)), Reason.CURVES_INVALID),
        (valley(0.6, requests=2000, alpha=(), cost_ms=()), Reason.CURVES_INVALID),
        (valley(0.6, requests=2000, warm=math.nan), Reason.CURVES_INVALID),
        (
            valley(0.6, requests=2000, alpha=turned),
            Reason.CURVES_INVALID,
        ),
        (valley(0.6, requests=2000, alpha=(*([0.5] * 16), 7.0)), Reason.CURVES_INVALID),
    ]
    for curve, reason in cases:
        found = estimate(reading, curve, state)
        assert found.reasons == reason
        assert found.anchor == state.anchor
        assert found.trust == 0.0
        assert found.gain == 0.0


@pytest.mark.parametrize("age_ms", [2500.0, -2500.0])
def test_a_curve_of_another_time_is_stale(reading, valley, age_ms) -> None:
    seen = reading(100)
    curve = valley(0.3, monotonic_ns=seen.now_ns - int(age_ms * 1e6))
    found = TwinAnchor(AnchorConfig()).estimate(seen._replace(curve=curve), STATE, 0.1, 0.9, False)
    assert found.reasons == Reason.CURVES_STALE


@given(
    costs=st.lists(st.floats(0.1, 100.0), min_size=1, max_size=32),
    gap=st.floats(0.001, 0.03),
    where=st.floats(-0.5, 1.5),
)
def test_interpolation_and_vertex_stay_between_their_neighbours(costs, gap, where) -> None:
    alpha = tuple(gap * index for index in range(len(costs)))
    cost_ms = tuple(costs)
    assert min(costs) - 1e-9 <= cost_at(alpha, cost_ms, where) <= max(costs) + 1e-9
    index = costs.index(min(costs))
    vertex = parabola_vertex(alpha, cost_ms, index)
    assert alpha[max(index - 1, 0)] <= vertex <= alpha[min(index + 1, len(alpha) - 1)]
