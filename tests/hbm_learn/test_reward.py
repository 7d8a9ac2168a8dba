"""What a step is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hbm_learn.reward import RewardConfig, Step, step_of

PRICE = RewardConfig(regret_weight=100.0, move_weight=20.0, late_weight=50.0)


def test_nothing_lost_is_worth_nothing() -> None:
    assert Step(requests=10, served_ms=50.0, best_ms=50.0).reward(PRICE) == 0.0
    assert Step().reward(PRICE) == 0.0


@pytest.mark.parametrize(
    ("step", "worth"),
    [
        (Step(requests=10, served_ms=55.0, best_ms=50.0), -10.0),
        (Step(requests=10, served_ms=500.0, best_ms=50.0), -50.0),  # cut at half as much again
        (Step(requests=10, served_ms=45.0, best_ms=50.0), 0.0),  # lucky: no reward for it
        (Step(requests=10, late=2, served_ms=50.0, best_ms=50.0), -10.0),
        (Step(requests=10, served_ms=50.0, best_ms=50.0, moved=0.05), -1.0),
        (Step(moved=0.05), -1.0),
    ],
)
def test_each_term_has_its_price(step, worth) -> None:
    assert step.reward(PRICE) == pytest.approx(worth)


def test_a_refused_request_is_late_and_took_nothing(episode) -> None:
    slo_ms = episode.spec.info.slo_ms
    service = np.array([4.0, 4.0, 0.0])
    latency = np.array([slo_ms / 2, slo_ms * 2, math.nan])
    step = step_of(episode, 5, 8, service, latency, 0.1)
    assert (step.requests, step.late, step.moved) == (3, 2, 0.1)
    assert step.served_ms == 8.0
    assert step.best_ms == pytest.approx(episode.best_ms[5:7].sum())
