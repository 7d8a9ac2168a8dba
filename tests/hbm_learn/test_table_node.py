"""The node that looks up: exact at rest, cold after a move, near to the simulator in between."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hbm_learn import table_kernel as at
from hbm_learn.pupil import steps_without
from hbm_learn.reward import RewardConfig, Step
from hbm_learn.table_env import TableEnv, coarse_stack
from hbm_learn.table_kernel import percentiles_ms, serve_from_tables


@pytest.fixture
def node(library, episode):
    env = TableEnv(library, (1000,), RewardConfig(), 4)
    env.reset()
    return env._now.node


def at_rest(node, alpha: float) -> np.ndarray:
    state = np.zeros(at.SLOTS)
    state[at.EMB_WARM], state[at.KV_WARM] = alpha, 1.0 - alpha
    return state


def serve(node, state, begin: int, count: int, alpha: float, refill: float = 0.0) -> float:
    """Service ms of the next requests, one at a time."""
    before = state[at.SERVICE]
    bins = np.zeros(at.BINS)
    limited = node._replace(arrival_ms=node.arrival_ms[: begin + count])
    end = serve_from_tables(limited, state, bins, begin, math.inf, alpha, refill)
    assert end == begin + count
    return float(state[at.SERVICE] - before)


def test_at_rest_requests_take_what_the_tables_say(node) -> None:
    for column in (0, 7, 16):
        alpha = node.low + column * node.step
        took = serve(node, at_rest(node, alpha), 0, 300, alpha)
        said = node.gather_ms[:300, column].sum() + node.compute_ms[:300, column].sum()
        if node.overlap:
            both = np.maximum(node.gather_ms[:300, column], node.compute_ms[:300, column])
            said = both.sum()
        assert took == pytest.approx(float(said), rel=1e-4)


def test_a_move_costs_until_what_was_won_is_warm(node) -> None:
    moved = at_rest(node, 0.3)
    serve(node, moved, 0, 1, 0.7)
    assert moved[at.KV_WARM] == pytest.approx(0.3)
    assert moved[at.EMB_WARM] < 0.7
    cold = serve(node, at_rest(node, 0.3), 0, 100, 0.7)
    assert cold > serve(node, at_rest(node, 0.7), 0, 100, 0.7)
    while moved[at.EMB_WARM] < 0.7:
        before = moved[at.EMB_WARM]
        serve(node, moved, 1, 100, 0.7)
        assert moved[at.EMB_WARM] > before


def test_refill_warms_rows_while_the_node_is_idle(node) -> None:
    without, given = at_rest(node, 0.3), at_rest(node, 0.3)
    serve(node, without, 0, 50, 0.7)
    serve(node, given, 0, 50, 0.7, refill=1e-5)
    assert given[at.EMB_WARM] > without[at.EMB_WARM]


@pytest.mark.parametrize("latency_ms", [5.0, 80.0, 600.0])
def test_percentiles_are_within_a_twelfth_of_a_doubling(latency_ms) -> None:
    bins = np.zeros(at.BINS)
    place = int(at.GOAL_BIN + at.PER_DOUBLING * math.log2(latency_ms / 80.0))
    bins[place] = 10.0
    p50_ms, p99_ms = percentiles_ms(bins, 80.0)
    assert p50_ms == p99_ms == pytest.approx(latency_ms, rel=2 ** (1 / 12) - 1)
    assert percentiles_ms(np.zeros(at.BINS), 80.0) == (0.0, 0.0)


@pytest.mark.parametrize("seed", [1000, 1002])
def test_the_stack_does_the_same_in_both_within_a_few_percent(library, seed) -> None:
    episode = library.episode(seed)
    env = TableEnv(library, (seed,), RewardConfig(), 4)
    table, simulated = env._steps_without(episode), steps_without(episode, 4)

    def excess(steps: list[Step]) -> float:
        return sum(s.served_ms for s in steps) / sum(s.best_ms for s in steps) - 1.0

    assert abs(len(table) - len(simulated)) <= 2
    assert excess(table) == pytest.approx(excess(simulated), abs=0.05)


def test_the_gate_counts_periods_where_a_decision_stands_for_one() -> None:
    gate = coarse_stack(4).gate
    assert gate is not None
    assert (gate.gate_burst_ticks, gate.gate_refractory_ticks) == (4, 8)
