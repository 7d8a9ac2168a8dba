"""α* of streams whose answer is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hbm_pool.contracts.records import CostModel
from hbm_sim import Node, SweepError, TraceRequests, static_sweep
from hbm_sim.requests import RowNumbers
from hbm_sim.sweep import optimum, queue_ms, settled_by_share
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def two_regimes(make_info, make_requests):
    """Many users who return (KV matters), then strangers over a broad catalogue (rows matter)."""
    info = make_info()
    first = make_requests(info, 1, 400, users=30, zipf=1.3, regime="returning", nodes=2)
    second = make_requests(
        info, 2, 400, users=100_000, zipf=0.5, regime="strangers", nodes=2, start_s=4.0
    )
    return info, [*first, *second]


@pytest.fixture(scope="module")
def swept(two_regimes, costs):
    info, requests = two_regimes
    return static_sweep(requests, info, costs)


def test_the_optimum_is_found_where_it_must_be(swept):
    assert swept.regime("returning").best_mean.alpha < 0.5
    assert swept.regime("strangers").best_mean.alpha > 0.7


def test_every_alpha_is_what_a_node_of_that_alpha_does(swept, two_regimes, costs):
    info, requests = two_regimes
    numbers = RowNumbers(info)
    regime = swept.regime("strangers", "node-1")
    index = len(regime.alpha) // 2
    node = Node(info, costs, regime.alpha[index])
    service_ms = []
    for request in requests:
        if request.node == "node-1":
            served = node.serve(request.sample, numbers.lists(request.sample))
            if request.settled and request.regime == "strangers":
                service_ms.append(served.service_ms)
    assert len(service_ms) == regime.requests
    assert regime.mean_service_ms[index] == pytest.approx(np.mean(service_ms))


def test_grids_are_coarse_everywhere_and_fine_around_the_optimum(swept, two_regimes):
    info, _ = two_regimes
    for regime in swept.pooled:
        alpha = np.array(regime.alpha)
        assert alpha[0] >= 0.1 - 1e-9
        assert alpha[-1] <= 0.9 + 1e-9
        assert np.diff(alpha).max() <= 0.05 + 1 / info.extents
        near = alpha[np.abs(alpha - regime.best_mean.alpha) <= 0.05]
        assert np.diff(near).max() <= 0.0125 + 1 / info.extents


def test_pooled_counts_are_those_of_the_nodes_together(swept):
    for regime in swept.pooled:
        nodes = [swept.regime(regime.regime, node) for node in swept.by_node]
        assert regime.requests == sum(each.requests for each in nodes)
        mean = np.average(
            [each.mean_service_ms for each in nodes],
            axis=0,
            weights=[each.requests for each in nodes],
        )
        assert regime.mean_service_ms == pytest.approx(mean)


def test_the_tail_names_its_percentile_and_exists_with_arrivals_only(swept, two_regimes, costs):
    info, requests = two_regimes
    assert swept.pooled[0].tail_percentile == 95
    assert swept.pooled[0].tail_latency_ms is not None
    blind = [each._replace(arrival_s=math.nan) for each in requests]
    without = static_sweep(blind, info, costs)
    assert without.pooled[0].tail_latency_ms is None
    assert without.pooled[0].best_tail is None
    assert without.pooled[0].mean_service_ms == swept.pooled[0].mean_service_ms


def test_the_result_is_json(swept):
    plain = json.loads(json.dumps(swept.to_dict()))
    assert plain["costs"]["row_ms"] == [0.05, 0.03]
    assert [each["regime"] for each in plain["pooled"]] == ["returning", "strangers"]
    assert set(plain["by_node"]) == {"node-0", "node-1"}
    with pytest.raises(KeyError):
        swept.regime("unheard-of")


def test_progress_ends_where_it_should(two_regimes, costs):
    info, requests = two_regimes
    seen: list[tuple[int, int]] = []
    static_sweep(requests[100:300], info, costs, progress=lambda *at: seen.append(at))
    assert seen[-1] == (400, 400)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_streams_and_constants_without_an_answer_are_refused(two_regimes, costs):
    info, requests = two_regimes
    with pytest.raises(SweepError, match="no settled request"):
        static_sweep([], info, costs)
    with pytest.raises(SweepError, match="no settled request"):
        static_sweep([each._replace(settled=False) for each in requests[:5]], info, costs)
    with pytest.raises(SweepError, match="cannot price"):
        static_sweep(requests, info, costs._replace(token_ms=math.nan))


@given(
    values=st.lists(st.floats(1.0, 10.0), min_size=1, max_size=40),
)
def test_the_plateau_holds_the_optimum_and_nothing_worse(values):
    alpha = [index / 100 for index in range(len(values))]
    found = optimum(alpha, np.array(values))
    assert found.value_ms == min(values)
    assert found.plateau_low <= found.alpha <= found.plateau_high
    inside = [
        value
        for where, value in zip(alpha, values, strict=True)
        if found.plateau_low <= where <= found.plateau_high
    ]
    assert max(inside) <= found.value_ms * 1.01 + 1e-12
    assert found.distance(found.alpha) == 0.0
    assert found.distance(found.plateau_high + 0.1) == pytest.approx(0.1)
    assert found.distance(found.plateau_low - 0.1) == pytest.approx(0.1)


def test_settled_marks_start_anew_with_each_run_of_a_regime():
    regimes = ["a"] * 4 + ["b"] * 3 + ["a"] * 2
    assert settled_by_share(regimes, 0.5) == [
        False, False, True, True,
        False, False, True,
        False, True,
    ]  # fmt: skip
    assert settled_by_share([], 0.5) == []


def test_a_queue_waits_serially_and_overlaps_in_tandem():
    arrival = np.array([0.0, 1.0, 2.0])
    gather, compute = np.array([2.0, 2.0, 2.0]), np.array([3.0, 3.0, 3.0])
    serial = queue_ms(arrival, gather, compute, overlap=False)
    assert serial.tolist() == [5.0, 9.0, 13.0]
    tandem = queue_ms(arrival, gather, compute, overlap=True)
    assert tandem.tolist() == [5.0, 7.0, 9.0]


@given(
    st.lists(
        st.tuples(st.floats(0.0, 5.0), st.floats(0.01, 5.0), st.floats(0.01, 5.0)),
        min_size=1,
        max_size=50,
    )
)
def test_overlap_is_never_slower_and_nothing_is_faster_than_its_own_service(rows):
    gaps, gather, compute = (np.array(column) for column in zip(*rows, strict=True))
    arrival = np.cumsum(gaps)
    serial = queue_ms(arrival, gather, compute, overlap=False)
    tandem = queue_ms(arrival, gather, compute, overlap=True)
    assert (tandem <= serial + 1e-9).all()
    assert (tandem >= gather + compute - 1e-9).all()


def test_overlapped_and_serial_nodes_have_their_own_optimum(make_info, make_requests, costs):
    requests = make_requests(make_info(), 3, 200)
    for model in CostModel:
        found = static_sweep(requests, make_info(cost_model=model), costs)
        assert found.cost_model == model.name.lower()


def test_a_trace_becomes_the_requests_a_server_would_report(make_info):
    from hbm_load.generate import generate
    from hbm_load.scenario import load_scenario
    from hbm_pool.contracts.records import TableMap

    trace = generate(load_scenario("demo"), 3, requests=60)
    info = make_info(
        tables=(
            TableMap("item", trace.catalogue, 0, False),
            TableMap("side", 500, 1, True),
        )
    )
    requests = TraceRequests(trace, info, ("a", "b", "c"))
    assert len(requests) == 60
    homes: dict[int, str] = {}
    for index, request in enumerate(requests):
        sample = request.sample
        assert sample.user == trace.request(index).user
        assert sample.history_tokens <= info.max_sequence_tokens
        assert len(sample.history_keys) == 2 * sample.history_tokens
        assert len(sample.page_fingerprints) == sample.history_tokens // info.page_tokens
        assert request.arrival_s == trace.time_s[index]
        assert homes.setdefault(sample.user, request.node) == request.node
    assert set(homes.values()) == {"a", "b", "c"}
