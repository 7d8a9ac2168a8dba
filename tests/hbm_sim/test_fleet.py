"""Fleets: the real router scoring in front of simulated nodes."""

from __future__ import annotations

import numpy as np
import pytest
from hbm_sim.fleet import ORACLE, run_fleet
from hbm_sim.loop import Action, Hold, Observation
from hbm_sim.optimum import static_run
from hbm_sim.stream import make_stream

from tests.hbm_sim.small_workload import small_workload


def test_one_node_behind_a_router_is_that_node() -> None:
    workload = small_workload()
    stream, spec = make_stream(workload, 1, qps=40.0), workload.node_spec()
    fleet = run_fleet(stream, spec, 1, seed=1, alpha=0.4)
    alone = static_run(stream, spec, 0.4)
    assert np.array_equal(fleet.latency_ms, alone.latency_ms)
    assert np.array_equal(fleet.kv_hit, alone.kv_hit)
    assert fleet.requests.tolist() == [len(stream)]


def test_routing_by_cost_finds_users_again_and_spreads_load() -> None:
    workload = small_workload(walk=[{"regime": "busy", "requests": 3000}])
    stream, spec = make_stream(workload, 1, qps=300.0), workload.node_spec()
    runs = {
        policy: run_fleet(stream, spec, 4, seed=1, policy=policy)
        for policy in ("round_robin", "cost_ms", "chwbl")
    }
    blind, cost = runs["round_robin"], runs["cost_ms"]
    assert blind.requests.max() - blind.requests.min() <= 1
    assert cost.kv_hit.mean() > blind.kv_hit.mean() + 0.1
    assert runs["chwbl"].kv_hit.mean() > blind.kv_hit.mean() + 0.1
    assert cost.requests.min() > 0.1 * len(stream)
    for run in runs.values():
        assert run.requests.sum() == len(stream)
        assert (run.node >= 0).all()
        assert (run.latency_ms > 0.0).all()
    # What the router expects to hit mostly does.
    assert cost.predicted["tp"] > 5 * cost.predicted["fp"]


def test_who_knows_every_queue_and_cache_answers_sooner_than_any_router() -> None:
    workload = small_workload(walk=[{"regime": "busy", "requests": 3000}])
    stream, spec = make_stream(workload, 1, qps=300.0), workload.node_spec()
    oracle = run_fleet(stream, spec, 4, seed=1, policy=ORACLE)
    assert oracle.requests.sum() == len(stream)
    for policy in ("round_robin", "cost_ms", "chwbl"):
        routed = run_fleet(stream, spec, 4, seed=1, policy=policy)
        assert np.nanmean(oracle.latency_ms) < np.nanmean(routed.latency_ms), policy


def test_equal_inputs_make_an_equal_fleet_and_each_node_has_its_own_split() -> None:
    workload = small_workload()
    stream, spec = make_stream(workload, 1, qps=120.0), workload.node_spec()

    class Own(Hold):
        def act(self, observation: Observation) -> Action:
            assert observation.reading.curve is not None
            return super().act(observation)

    def once() -> tuple[list[float], np.ndarray]:
        run = run_fleet(
            stream, spec, 3, seed=2, arms=lambda k: Own(0.3 + 0.2 * k), twins=True, alpha=0.5
        )
        return run.alpha[-1].tolist(), run.latency_ms

    (alpha, latency), (again, latency_again) = once(), once()
    assert alpha == again
    assert np.array_equal(latency, latency_again)
    assert alpha == pytest.approx([0.3, 0.5, 0.7], abs=0.01)


def test_a_number_of_nodes_out_of_range_is_refused() -> None:
    workload = small_workload()
    stream = make_stream(workload, 1, qps=40.0)
    with pytest.raises(ValueError, match="65 nodes"):
        run_fleet(stream, workload.node_spec(), 65, seed=1)
