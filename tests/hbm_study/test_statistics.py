"""Intervals say what seeds can tell, and no more."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hbm_study.statistics import (
    Interval,
    distance_to_plateau,
    interval,
    non_inferior,
    over_time,
    relative_difference,
    share_of_gain,
    step_histogram,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats


def test_interval_agrees_with_scipy_on_its_ends() -> None:
    values = np.random.default_rng(3).normal(10.0, 2.0, 20)
    ours = interval(values.tolist())
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", random_state=np.random.default_rng(4)
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.05)
    assert ours.high == pytest.approx(theirs.high, abs=0.05)


def test_one_seed_has_no_interval_and_proves_nothing() -> None:
    seen = interval([0.9])
    assert seen.mean == 0.9
    assert math.isnan(seen.low)
    assert not seen.excludes_zero
    assert not non_inferior(seen)


def test_pairing_removes_what_seeds_share() -> None:
    random = np.random.default_rng(5)
    shared = random.uniform(50.0, 150.0, 12)
    arm = shared * (0.97 + random.normal(0.0, 0.002, 12))
    seen = relative_difference(arm.tolist(), shared.tolist())
    # Unpaired, the seeds' own scatter of ± 30 % would hide 3 %.
    assert seen.high < -0.02
    assert seen.excludes_zero


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 2 seeds"):
        relative_difference([1.0, 2.0, 3.0], [1.0, 2.0])


def test_share_of_gain_is_a_ratio_of_means_and_nothing_without_a_gain() -> None:
    reference = [100.0] * 10
    oracle = [80.0] * 10
    arm = [84.0 + 0.1 * seed for seed in range(10)]
    seen = share_of_gain(arm, oracle, reference)
    assert seen.mean == pytest.approx((100.0 - np.mean(arm)) / 20.0)
    assert seen.low < seen.mean < seen.high
    assert share_of_gain(arm, [101.0] * 10, reference).seeds == 0


def test_an_oracle_that_may_gain_nothing_leaves_the_lower_end_open() -> None:
    reference = [100.0] * 6
    oracle = [99.0, 101.5, 98.0, 101.0, 99.5, 100.5]
    seen = share_of_gain(oracle, oracle, reference)
    assert seen.low == -math.inf


def test_noise_under_two_percent_is_no_loss_but_three_is() -> None:
    assert non_inferior(Interval(0.01, 0.0, 0.019, 10))
    assert not non_inferior(Interval(0.01, 0.0, 0.03, 10))


@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30),
    st.floats(0.0, 0.5),
    st.floats(0.5, 1.0),
)
def test_distance_is_zero_inside_a_plateau_alone(
    alphas: list[float], low: float, high: float
) -> None:
    alpha = np.array(alphas)
    distance = distance_to_plateau(alpha, np.full_like(alpha, low), np.full_like(alpha, high))
    assert ((distance == 0.0) == ((alpha >= low) & (alpha <= high))).all()
    nearest = np.minimum(np.abs(alpha - low), np.abs(alpha - high))
    assert distance == pytest.approx(np.where(distance > 0.0, nearest, 0.0))


def test_over_time_averages_windows_and_leaves_empty_ones_open() -> None:
    error = np.array([0.1, 0.3, math.nan, 0.5])
    seen = over_time(error, np.array([0, 10, 20, 99]), 4, 100)
    assert seen[0] == pytest.approx(0.2)
    assert math.isnan(seen[1])
    assert math.isnan(seen[2])
    assert seen[3] == pytest.approx(0.5)


def test_steps_of_alpha_are_counted_with_open_ends() -> None:
    alpha = np.array([0.5, 0.5, 0.53, 0.2, 0.9])
    assert step_histogram(alpha, (-0.1, -0.001, 0.001, 0.1)) == [1, 0, 1, 1, 1]
