"""Prices that are wrong become right by what batches take, and nothing makes them absurd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hbm_policy import AdapterConfig, CostConstants, PriceState, RlsAdapter
from hbm_policy.adapter import NOISE_SD, PRIOR_SD, Rls
from hbm_policy.anchor import parabola_vertex
from hbm_policy.twin import Twin
from hbm_pool.contracts.records import CURVES, TELEMETRY
from hbm_sim.node import Node, Served
from hbm_sim.requests import RowNumbers
from hypothesis import given, settings
from hypothesis import strategies as st

TRUE = CostConstants(0.5, 0.2, 1e-3, (0.06, 0.04))
"""Prices by which the small server is best in the middle."""
REQUESTS = 1500


def scaled(costs: CostConstants, **factor: float) -> CostConstants:
    return CostConstants(
        costs.fixed_ms * factor.get("fixed", 1.0),
        costs.token_ms * factor.get("token", 1.0),
        costs.token_context_ms * factor.get("context", 1.0),
        tuple(each * factor.get("row", 1.0) for each in costs.row_ms),
    )


class Server:
    """A simulated node that declares `declared` and measures what `TRUE` says, with noise."""

    def __init__(self, info, declared: CostConstants, seed: int, noise: float = 0.1) -> None:
        self.node = Node(info, TRUE, 0.5)
        self.rows = RowNumbers(info)
        self.random = np.random.default_rng(seed)
        self.noise = noise
        self.telemetry = np.zeros((), TELEMETRY)
        self.telemetry["boot_epoch"] = 1
        self.declare(declared)

    def declare(self, costs: CostConstants) -> None:
        telemetry = self.telemetry
        telemetry["cost_fixed_ms"], telemetry["cost_token_ms"] = costs.fixed_ms, costs.token_ms
        telemetry["cost_token_context_ms"] = costs.token_context_ms
        telemetry["cost_row_ms"][: len(costs.row_ms)] = costs.row_ms

    def serve(self, sample) -> Served:
        served = self.node.serve(sample, self.rows.lists(sample))
        cached, tokens = served.cached_tokens, sample.history_tokens
        new = tokens - cached
        telemetry = self.telemetry
        for field, grown in (
            ("requests", 1),
            ("batches", 1),
            ("kv_tokens_computed", new),
            ("candidate_tokens", sample.candidates),
            ("context_tokens", new * (cached + tokens + 1) // 2 + sample.candidates * tokens),
            ("timed_accesses", served.lookups),
        ):
            telemetry[field] += np.uint64(grown)
        telemetry["timed_misses"][: len(served.misses)] += np.array(served.misses, np.uint64)
        telemetry["compute_ms"] += served.compute_ms * self.random.lognormal(0.0, self.noise)
        telemetry["gather_ms"] += served.gather_ms * self.random.lognormal(0.0, self.noise)
        return served


@pytest.fixture(scope="module")
def traffic(make_info, make_stream) -> Any:
    """(info, samples) of one stream; seeds 0 to 1."""
    info = make_info()
    return info, [make_stream(info, seed, REQUESTS, users=40, items=2500) for seed in (0, 1)]


def learned(traffic, seed: int, declared: CostConstants, every: int = 1) -> CostConstants:
    info, streams = traffic
    server, adapter = Server(info, declared, seed), RlsAdapter()
    costs = adapter.constants(server.telemetry)
    for at, sample in enumerate(streams[seed]):
        server.serve(sample)
        if at % every == every - 1:
            costs = adapter.constants(server.telemetry)
    assert costs is not None
    assert adapter.state is PriceState.LEARNED
    return costs


def anchor(twin: Twin, costs: CostConstants) -> float:
    """α̂ of what the twin has simulated, by other prices."""
    twin.feed([], 0, costs)
    record = np.zeros((), CURVES)
    twin.curves(record)
    points = int(record["points"])
    cost_ms = tuple(record["cost_ms"][:points].tolist())
    alpha = tuple(record["alpha"][:points].tolist())
    return parabola_vertex(alpha, cost_ms, cost_ms.index(min(cost_ms)))


@pytest.fixture(scope="module")
def twins(traffic) -> list[Twin]:
    info, streams = traffic
    found = []
    for stream in streams:
        twin = Twin(info, window_requests=1000.0)
        twin.feed(stream, 0, TRUE)
        found.append(twin)
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "factor",
    [
        {},
        {"row": 0.5},
        {"row": 2.0},
        {"row": 4.0},
        {"token": 0.5},
        {"token": 2.0},
        {"token": 4.0},
        {"context": 4.0},
        {"token": 0.5, "row": 2.0},
        {"token": 4.0, "row": 0.25},
    ],
    ids=str,
)
def test_wrong_prices_recover_to_the_right_anchor(traffic, twins, factor, seed) -> None:
    right = anchor(twins[seed], TRUE)
    assert 0.2 < right < 0.8, right
    declared = scaled(TRUE, **factor)
    if factor:
        assert abs(anchor(twins[seed], declared) - right) > 0.1, "this error would matter"
    assert abs(anchor(twins[seed], learned(traffic, seed, declared)) - right) <= 0.03


def test_readings_that_are_batches_apart_teach_the_same(traffic, twins) -> None:
    declared = scaled(TRUE, row=4.0)
    right = anchor(twins[0], TRUE)
    for every in (7, 50):
        assert abs(anchor(twins[0], learned(traffic, 0, declared, every)) - right) <= 0.03


def test_a_price_beyond_the_limit_stays_at_it(traffic) -> None:
    costs = learned(traffic, 0, scaled(TRUE, row=10.0, token=0.1))
    assert costs.token_ms == pytest.approx(4.0 * 0.1 * TRUE.token_ms, rel=1e-3)
    assert costs.row_ms[:2] == pytest.approx([2.5 * each for each in TRUE.row_ms], rel=1e-3)
    assert all(each >= 0.0 for each in costs.row_ms)


def test_a_limit_of_one_is_what_the_server_declares(traffic) -> None:
    info, streams = traffic
    declared = scaled(TRUE, row=2.0)
    server, adapter = Server(info, declared, 0), RlsAdapter(AdapterConfig(adapter_limit=1.0))
    for sample in streams[0][:50]:
        server.serve(sample)
        costs = adapter.constants(server.telemetry)
    assert costs is not None
    assert (*costs[:3], *costs.row_ms[:2]) == (*declared[:3], *declared.row_ms)
    assert (adapter.state, adapter.batches) == (PriceState.DECLARED, 0)


def test_while_the_gate_is_open_nothing_is_learned(traffic) -> None:
    info, streams = traffic
    server, adapter = Server(info, scaled(TRUE, row=2.0), 0), RlsAdapter()
    for sample in streams[0][:300]:
        server.serve(sample)
        before = adapter.constants(server.telemetry)
    batches = adapter.batches
    for sample in streams[0][300:400]:
        server.serve(sample)
        server.telemetry["gather_ms"] += 50.0
        assert adapter.constants(server.telemetry, learn=False) == before
    assert (adapter.state, adapter.batches) == (PriceState.HELD, batches)
    server.serve(streams[0][400])
    after = adapter.constants(server.telemetry)
    assert adapter.state is PriceState.LEARNED
    assert after.row_ms[0] == pytest.approx(before.row_ms[0], rel=0.05), "what passed is forgotten"


def test_a_pause_of_the_machine_is_no_price(traffic) -> None:
    info, streams = traffic
    server, adapter = Server(info, TRUE, 0), RlsAdapter()
    for at, sample in enumerate(streams[0]):
        server.serve(sample)
        if at % 100 == 50:
            server.telemetry["compute_ms"] += 1000.0
        costs = adapter.constants(server.telemetry)
    assert costs.token_ms == pytest.approx(TRUE.token_ms, rel=0.1)


def test_a_new_boot_starts_from_what_it_declares(traffic) -> None:
    info, streams = traffic
    server, adapter = Server(info, scaled(TRUE, row=4.0), 0), RlsAdapter()
    for sample in streams[0][:200]:
        server.serve(sample)
        adapter.constants(server.telemetry)
    again = Server(info, scaled(TRUE, row=0.5), 0)
    again.telemetry["boot_epoch"] = 2
    costs = adapter.constants(again.telemetry)
    assert costs.row_ms[0] == pytest.approx(0.5 * TRUE.row_ms[0])
    assert adapter.state is PriceState.DECLARED


def test_what_is_declared_later_moves_the_bounds_not_the_price(traffic) -> None:
    info, streams = traffic
    server, adapter = Server(info, TRUE, 0), RlsAdapter()
    for sample in streams[0][:600]:
        server.serve(sample)
        adapter.constants(server.telemetry)
    server.declare(scaled(TRUE, token=3.0))
    for sample in streams[0][600:700]:
        server.serve(sample)
        costs = adapter.constants(server.telemetry)
    assert costs.token_ms == pytest.approx(TRUE.token_ms, rel=0.1)
    server.declare(scaled(TRUE, token=8.0))
    server.serve(streams[0][700])
    assert adapter.constants(server.telemetry).token_ms >= 2.0 * TRUE.token_ms * 0.999


def test_before_anything_is_declared_there_is_no_price() -> None:
    adapter = RlsAdapter()
    assert adapter.constants(np.zeros((), TELEMETRY)) is None


def test_traffic_that_never_changes_neither_winds_up_nor_drifts() -> None:
    """Two counts in a fixed ratio: their sum is known, how it divides is not."""
    random = np.random.default_rng(3)
    rls = Rls([1.0, 1.0], [1.0, 1.0])
    low, high = [0.25, 0.25], [4.0, 4.0]
    for _ in range(20_000):
        rls.learn([2.0, 1.0], 6.0 * random.lognormal(0.0, 0.2), 1.0, 0.9995, low, high)
    prior = (PRIOR_SD / NOISE_SD) ** 2
    assert rls.covariance[0][0] + rls.covariance[1][1] <= 2.0 * prior * 1.001
    assert 2.0 * rls.values[0] + rls.values[1] == pytest.approx(6.0, rel=0.05)
    # The least change that explains it, as at the start: twice as much of what counts twice.
    assert rls.values[0] - 1.0 == pytest.approx(2.0 * (rls.values[1] - 1.0), abs=0.1)


def test_a_price_at_its_bound_does_not_drift_while_others_are_at_theirs() -> None:
    """A gather that costs nothing but its misses, whose price is as low as it may be: three
    constants at their bounds at once, and counts that go up and down together."""
    random = np.random.default_rng(4)
    rls = Rls([0.1, 1e-4, 1e-3], [0.0, 0.0, 1.0])
    low, high = [0.0, 0.0, 0.25], [math.inf, math.inf, 4.0]
    seen = []
    for _ in range(2000):
        looked_up = random.uniform(5e3, 4e4)
        missed = looked_up * random.uniform(0.05, 0.2)
        counts = [1.0, looked_up - missed, missed]
        rls.learn(counts, 0.25e-3 * missed, 1.0, 0.9995, low, high)
        seen.append(rls.values[2])
    assert max(seen[100:]) < 0.26
    assert rls.values[:2] == pytest.approx([0.0, 0.0], abs=1e-3)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(
                st.one_of(st.floats(0.0, 1e6), st.sampled_from([math.nan, math.inf, 0.0])),
                min_size=3,
                max_size=3,
            ),
            st.one_of(st.floats(0.0, 1e9), st.sampled_from([math.nan, math.inf, -1.0])),
            st.integers(1, 10_000),
        ),
        max_size=60,
    ),
)
def test_whatever_is_measured_constants_stay_within_their_bounds(samples) -> None:
    rls = Rls([0.5, 0.02, 0.0], [1.0, 1.0, 1.0])
    low, high = [0.25] * 3, [4.0] * 3
    for counts, ms, batches in samples:
        rls.learn(counts, ms, batches, 0.9995, low, high)
        assert all(0.25 <= value <= 4.0 for value in rls.values)
        assert all(math.isfinite(each) for row in rls.covariance for each in row)
        assert all(row[i] >= 0.0 for i, row in enumerate(rls.covariance))
    assert rls.constants[2] == 0.0
