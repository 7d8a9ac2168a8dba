"""What a difference between two arms is worth: paired intervals over seeds, and judged goals.

Seeds are paired: both arms served the same stream, so that the difference of one seed carries no
arrival noise. Lower is better in everything judged here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
CONFIDENCE: Final = 0.95
RESAMPLES: Final = 10_000
NON_INFERIORITY: Final = 0.02
"""Differences of P99 under 2 % are noise."""
GOAL_SEEDS: Final = 10
"""A goal is judged on so many seeds at least; a figure is shown from five."""
FIGURE_SEEDS: Final = 5


class Interval(NamedTuple):
    """A mean over seeds with its bootstrap interval. One seed has no interval: NaN."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Both ends lie on one side of 0."""
        return self.low > 0.0 or self.high < 0.0

    def scaled(self, factor: float) -> Interval:
        """In another unit."""
        return Interval(self.mean * factor, self.low * factor, self.high * factor, self.seeds)


NOTHING: Final = Interval(math.nan, math.nan, math.nan, 0)


def interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean of one value per seed, and its percentile bootstrap interval."""
    column = np.asarray(values, np.float64)
    if len(column) == 0:
        return NOTHING
    if len(column) == 1:
        return Interval(float(column[0]), math.nan, math.nan, 1)
    means = column[_resamples(len(column), seed)].mean(axis=1)
    return _interval(float(column.mean()), means, len(column))


def relative_difference(
    arm: Sequence[float], reference: Sequence[float], *, seed: int = 0
) -> Interval:
    """Mean of arm ÷ reference − 1 over paired seeds; −0.1 is 10 % less than the reference.

    Raises ValueError for columns of different length: they are not paired.
    """
    arm_column, reference_column = _paired(arm, reference)
    return interval((arm_column / reference_column - 1.0).tolist(), seed=seed)


def share_of_gain(
    arm: Sequence[float],
    oracle: Sequence[float],
    reference: Sequence[float],
    *,
    seed: int = 0,
) -> Interval:
    """Which part of the oracle's gain over the reference an arm gets: a ratio of mean gains.

    Resampled over seeds, all three columns together. `NOTHING` where the oracle gains nothing: a
    part of nothing says nothing.
    """
    arm_column, reference_column = _paired(arm, reference)
    oracle_column, _ = _paired(oracle, reference)
    gain = 1.0 - arm_column / reference_column
    possible = 1.0 - oracle_column / reference_column
    if not possible.mean() > 0.0:
        return NOTHING
    share = float(gain.mean() / possible.mean())
    if len(gain) == 1:
        return Interval(share, math.nan, math.nan, 1)
    chosen = _resamples(len(gain), seed)
    totals = possible[chosen].mean(axis=1)
    # A resample in which the oracle gains nothing has no share: it counts as the worst.
    shares = np.full(len(totals), -np.inf)
    np.divide(gain[chosen].mean(axis=1), totals, out=shares, where=totals > 0.0)
    return _interval(share, shares, len(gain))


def non_inferior(difference: Interval, margin: float = NON_INFERIORITY) -> bool:
    """The interval's upper end stays within the margin: not worse, as far as can be told."""
    return difference.high <= margin


def percentile(values: npt.NDArray[np.float64], share: float) -> float:
    """NaN of nothing; otherwise linear between order statistics, like the simulator's."""
    return float(np.percentile(values, 100.0 * share)) if len(values) else math.nan


def distance_to_plateau(alpha: Floats, low: Floats, high: Floats) -> Floats:
    """How far each α lies outside [low, high]; 0 inside."""
    return np.maximum(np.maximum(low - alpha, alpha - high), 0.0)


def over_time(
    error: Floats, position: npt.NDArray[np.int64], windows: int, requests: int
) -> list[float]:
    """Mean of an error in equal windows of the stream, NaN for a window without a decision.

    `position`: index of the request at which each value was taken.
    """
    window = np.minimum(position * windows // max(requests, 1), windows - 1)
    known = np.isfinite(error)
    counts = np.bincount(window[known], minlength=windows)
    sums = np.bincount(window[known], weights=error[known], minlength=windows)
    return [
        float(total / count) if count else math.nan
        for total, count in zip(sums, counts, strict=True)
    ]


def step_histogram(alpha: Floats, edges: Sequence[float]) -> list[int]:
    """How often α changed by how much from one decision to the next; the ends are open."""
    steps = np.diff(alpha)
    counts = np.histogram(steps, bins=[-np.inf, *edges, np.inf])[0]
    return [int(count) for count in counts]


def _paired(left: Sequence[float], right: Sequence[float]) -> tuple[Floats, Floats]:
    if len(left) != len(right):
        raise ValueError(f"{len(left)} and {len(right)} seeds cannot be paired")
    return np.asarray(left, np.float64), np.asarray(right, np.float64)


def _resamples(seeds: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, seeds]).integers(seeds, size=(RESAMPLES, seeds))


def _interval(mean: float, means: Floats, seeds: int) -> Interval:
    tail = (1.0 - CONFIDENCE) / 2.0
    # Without interpolation: a resample without a value (−inf) is an end like any other.
    low, high = np.quantile(means, [tail, 1.0 - tail], method="nearest")
    return Interval(mean, float(low), float(high), seeds)
