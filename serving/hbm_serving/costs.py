"""The server's own cost constants, in ms: the prices by which the sidecar's twin compares α.

`compute_ms = fixed * requests + token * tokens + token_context * context` with `context` the sum
over computed tokens of the history tokens each attends to; `gather_ms` grows by `row[class]` per
missed row. A short calibration at start sets the proportions; served batches then move one
common factor each for compute and for rows, slowly and within bounds, because prices that jump
would move the twin's optimum without any change of traffic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_LEARNING_RATE = 0.01
_OUTLIER = 0.3  # larger surprises count as this: what is followed is close to the median
_TELLING = 4.0  # misses must cost this many times a gather without any, to tell their price
_DRIFT = math.log(4.0)  # the factor never leaves [1/4, 4] of the calibration


class CostConstants(NamedTuple):
    fixed_ms: float  # per request
    token_ms: float  # per computed token (history or candidate)
    token_context_ms: float  # per computed token and token of its context
    row_ms: tuple[float, ...]  # per missed row, by width class


class ComputeTiming(NamedTuple):
    """One measured forward pass."""

    requests: int
    tokens: int
    context: int
    ms: float


def fit_compute(timings: Sequence[ComputeTiming]) -> tuple[float, float, float]:
    """Non-negative least squares on relative errors: (fixed, token, token_context) in ms.

    With three constants the active set is found by trying all of them.
    """
    design = np.array([t[:3] for t in timings], dtype=np.float64)
    measured = np.array([max(t.ms, 1e-6) for t in timings])
    scaled = design / measured[:, None]
    best, best_error = np.zeros(3), math.inf
    for size in (3, 2, 1):
        for active in itertools.combinations(range(3), size):
            solved, *_ = np.linalg.lstsq(scaled[:, active], np.ones(len(measured)), rcond=None)
            if (solved < 0.0).any():
                continue
            candidate = np.zeros(3)
            candidate[list(active)] = solved
            error = float(((scaled @ candidate - 1.0) ** 2).sum())
            if error < best_error - 1e-12:
                best, best_error = candidate, error
    return float(best[0]), float(best[1]), float(best[2])


class _Factor:
    """A slowly learnt factor, in the logarithm, robust against single outliers."""

    def __init__(self) -> None:
        self._log = 0.0

    @property
    def value(self) -> float:
        return math.exp(self._log)

    def observe(self, expected_ms: float, measured_ms: float) -> None:
        """`expected_ms` already holds the present factor."""
        if expected_ms <= 0.0 or measured_ms <= 0.0:
            return
        surprise = math.log(measured_ms / expected_ms)
        surprise = min(max(surprise, -_OUTLIER), _OUTLIER)
        self._log = min(max(self._log + _LEARNING_RATE * surprise, -_DRIFT), _DRIFT)


class CostEstimator:
    """Holds calibrated constants and follows what batches really cost."""

    def __init__(
        self,
        compute: tuple[float, float, float],
        row_ms: Sequence[float],
        gather_base_ms: float = 0.0,
    ) -> None:
        self._compute = compute
        self._row_ms = tuple(row_ms)
        self._gather_base_ms = gather_base_ms
        self._compute_factor = _Factor()
        self._row_factor = _Factor()

    @property
    def constants(self) -> CostConstants:
        factor = self._compute_factor.value
        fixed, token, context = (value * factor for value in self._compute)
        rows = tuple(value * self._row_factor.value for value in self._row_ms)
        return CostConstants(fixed, token, context, rows)

    def compute_ms(self, requests: int, tokens: int, context: int) -> float:
        """Expected compute of a batch."""
        fixed, token, per_context = self._compute
        expected = fixed * requests + token * tokens + per_context * context
        return expected * self._compute_factor.value

    def observe_compute(self, timing: ComputeTiming) -> None:
        expected = self.compute_ms(timing.requests, timing.tokens, timing.context)
        self._compute_factor.observe(expected, timing.ms)

    def observe_gather(self, misses: Sequence[int], ms: float) -> None:
        """`misses` by width class, `ms` of the row gather alone. Batches whose misses are a small
        part of it teach nothing."""
        rows = sum(count * price for count, price in zip(misses, self._row_ms, strict=True))
        expected = rows * self._row_factor.value
        if expected > _TELLING * self._gather_base_ms:
            self._row_factor.observe(expected, max(ms - self._gather_base_ms, 0.1 * ms))
