"""Prices are recovered from timings and do not jump."""

from __future__ import annotations

import numpy as np
import pytest
from hbm_serving.costs import ComputeTiming, CostEstimator, fit_compute


def timings(
    fixed: float, token: float, context: float, noise: float, seed: int
) -> list[ComputeTiming]:
    generator = np.random.default_rng(seed)
    made = []
    for tokens in (8, 32, 64, 128, 256, 512):
        for reach in (0, 64, 512):
            exact = fixed + token * tokens + context * tokens * reach
            jitter = 1.0 + noise * float(generator.standard_normal())
            made.append(ComputeTiming(1, tokens, tokens * reach, exact * jitter))
    return made


def test_constants_are_recovered() -> None:
    fitted = fit_compute(timings(0.4, 2e-3, 5e-6, 0.0, 0))
    assert fitted == pytest.approx((0.4, 2e-3, 5e-6), rel=1e-6)
    noisy = fit_compute(timings(0.4, 2e-3, 5e-6, 0.03, 1))
    assert noisy == pytest.approx((0.4, 2e-3, 5e-6), rel=0.2)


def test_no_constant_is_negative() -> None:
    # Longer inputs that take no longer would give a negative slope.
    flat = [ComputeTiming(1, tokens, tokens * 10, 5.0 - tokens / 1000) for tokens in range(1, 100)]
    assert min(fit_compute(flat)) >= 0.0


def test_factor_follows_a_lasting_change_and_ignores_outliers() -> None:
    costs = CostEstimator((1.0, 0.01, 0.0), (0.02,))
    for _ in range(50):
        costs.observe_compute(ComputeTiming(1, 100, 0, 2.0))
    before = costs.constants
    costs.observe_compute(ComputeTiming(1, 100, 0, 500.0))
    assert costs.constants.fixed_ms == pytest.approx(before.fixed_ms, rel=0.01)
    for _ in range(3000):
        costs.observe_compute(ComputeTiming(1, 100, 0, 3.0))
    assert costs.compute_ms(1, 100, 0) == pytest.approx(3.0, rel=0.02)
    assert costs.constants.row_ms == (0.02,)


def test_factor_is_bounded() -> None:
    costs = CostEstimator((1.0, 0.0, 0.0), (0.02, 0.01))
    for _ in range(20_000):
        costs.observe_compute(ComputeTiming(1, 1, 0, 1e6))
        costs.observe_gather((10, 0), 1e-9)
    assert costs.constants.fixed_ms == pytest.approx(4.0)
    assert costs.constants.row_ms == pytest.approx((0.005, 0.0025))


def test_batches_without_misses_do_not_move_the_row_price() -> None:
    costs = CostEstimator((1.0, 0.0, 0.0), (0.02,), gather_base_ms=0.1)
    for _ in range(100):
        costs.observe_gather((0,), 50.0)
        costs.observe_gather((1,), 50.0)  # a fifth of the base time: too little to tell
    assert costs.constants.row_ms == (0.02,)
