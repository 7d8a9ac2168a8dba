"""A simulated node, alone and beside the twin that is to predict it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hbm_policy import class_division
from hbm_policy.class_division import ClassDivision
from hbm_policy.twin import Twin
from hbm_pool.contracts.records import CURVES, CostModel, RowClass, TableMap
from hbm_sim import Node
from hbm_sim.node import prices
from hbm_sim.requests import RowNumbers

ONE_CLASS = {
    "tables": (TableMap("item", 3000, 0, False),),
    "classes": (RowClass(64, 32, 3000, (0,)),),
}


def test_what_a_request_costs_is_what_the_server_would_count(make_info, make_requests, costs):
    info = make_info()
    sample = make_requests(info, 1, 1)[0].sample
    tokens, candidates = sample.history_tokens, sample.candidates
    compute_ms, gather_ms = prices(costs, sample, 8, [10, 4])
    attended = sum(position + 1 for position in range(8, tokens)) + candidates * tokens
    computed = tokens - 8 + candidates
    assert compute_ms == pytest.approx(0.5 + 0.02 * computed + 1e-5 * attended)
    assert gather_ms == pytest.approx(10 * 0.05 + 4 * 0.03)


def test_a_returning_user_reuses_whole_pages_and_skips_their_rows(make_info, make_requests, costs):
    info = make_info()
    numbers = RowNumbers(info)
    request = make_requests(info, 2, 1)[0]
    node = Node(info, costs, 0.5)
    lists = numbers.lists(request.sample)
    first = node.serve(request.sample, lists)
    second = node.serve(request.sample, lists)
    assert first.cached_tokens == 0
    pages = request.sample.history_tokens // info.page_tokens
    assert second.cached_tokens == pages * info.page_tokens
    assert second.lookups < first.lookups
    assert second.misses == (0, 0)
    assert second.service_ms < first.service_ms


def test_overlap_costs_the_slower_part(make_info, make_requests, costs):
    info = make_info(cost_model=CostModel.OVERLAP)
    served = Node(info, costs, 0.5).serve(
        (sample := make_requests(info, 3, 1)[0].sample), RowNumbers(info).lists(sample)
    )
    assert served.service_ms == max(served.compute_ms, served.gather_ms)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_the_index_code_stays_sound(make_info, make_requests, costs, alpha):
    info = make_info()
    node, numbers = Node(info, costs, alpha), RowNumbers(info)
    for request in make_requests(info, 4, 400):
        node.serve(request.sample, numbers.lists(request.sample))
    assert node.check_integrity() == []
    assert sum(node.class_extents) == round(alpha * info.extents)


def test_row_lists_are_distinct_rows_at_their_last_position(make_info, make_requests):
    info = make_info()
    sample = make_requests(info, 5, 1)[0].sample
    item, side = RowNumbers(info).lists(sample)
    keys = sample.history_keys.tolist()
    items = [key for key in keys if key >> 40 == 0]
    for row, position in zip(item.rows.tolist(), item.positions.tolist(), strict=True):
        if position < 1 << 40:
            last = len(items) - 1 - items[::-1].index(row)
            assert position == last
        else:
            assert row in sample.candidate_keys.tolist()
    assert len(set(item.rows.tolist())) == len(item.rows)
    assert side.rows.max() < 500


@pytest.mark.parametrize("eviction", ["tail", "whole"])
def test_the_twin_at_rate_one_predicts_every_node(make_info, make_requests, costs, eviction):
    """Same KV to the token; rows but for the grain of the zones (rows there, extents here)."""
    info = make_info(kv_eviction=eviction, **ONE_CLASS)
    requests = make_requests(info, 6, 600)
    twin = Twin(info, window_requests=1e9)
    twin.feed([request.sample for request in requests], 0, costs)
    record = np.zeros((), CURVES)
    twin.curves(record)
    numbers = RowNumbers(info)
    for index, alpha in enumerate(twin.alphas):
        node = Node(info, costs, alpha)
        served = [node.serve(each.sample, numbers.lists(each.sample)) for each in requests]
        hits = np.mean([each.cached_tokens > 0 for each in served])
        computed = np.mean(
            [
                request.sample.history_tokens - each.cached_tokens + request.sample.candidates
                for request, each in zip(requests, served, strict=True)
            ]
        )
        assert record["kv_hit_ratio"][index] == pytest.approx(hits)
        assert record["compute_tokens"][index] == pytest.approx(computed)
        missed = np.mean([sum(each.misses) for each in served])
        assert record["rows_missed"][index, 0] == pytest.approx(missed, rel=0.06, abs=0.2)


def test_twin_and_node_divide_two_classes_alike(make_info, make_requests, costs):
    info = make_info(
        tables=(TableMap("item", 6000, 0, False), TableMap("side", 4000, 1, True)),
        classes=(RowClass(64, 32, 6000, (0,)), RowClass(32, 64, 4000, (1,))),
    )
    requests = make_requests(info, 7, 1200, zipf=0.9)
    twin = Twin(info, window_requests=300.0)
    twin.feed([request.sample for request in requests], 0, costs)
    record = np.zeros((), CURVES)
    twin.curves(record)
    numbers = RowNumbers(info)
    for index in (2, 8, 14):
        node = Node(info, costs, twin.alphas[index])
        served = [node.serve(each.sample, numbers.lists(each.sample)) for each in requests]
        late = np.mean([each.service_ms for each in served[600:]])
        assert record["cost_ms"][index] == pytest.approx(late, rel=0.06)


def test_the_division_follows_the_class_that_misses_dearly(make_info):
    info = make_info()
    division = ClassDivision(info, 60)
    before = division.extents
    assert sum(before) == 60
    for _ in range(40):
        division.count([1000.0, 1000.0], [10.0, 500.0], [1.0, 300.0])
        change = division.rebalance(64)
        assert sum(division.extents) == 60
        if change is None:
            break
        assert sum(change) == 0
    assert division.extents[1] > before[1]


def test_one_class_has_nothing_to_divide(make_info):
    division = ClassDivision(make_info(**ONE_CLASS), 40)
    assert division.extents == [40]
    division.count([10.0], [5.0], [1.0])
    assert division.rebalance(64) is None


def test_the_division_uses_the_numbers_of_the_pool():
    width_class = pytest.importorskip("hbm_pool.device.width_class")
    from hbm_pool.device import class_extents

    for name in ("RECENT_ROWS", "PROBATION_SPARE", "ROW_PRICE_BYTES"):
        assert getattr(class_division, name) == getattr(width_class, name)
    for name in ("REBALANCE_DEAD_BAND", "REBALANCE_EXTENTS"):
        assert getattr(class_division, name) == getattr(class_extents, name)


def test_a_node_is_what_its_info_says(make_info, costs):
    node = Node(dataclasses.replace(make_info(), extents=64), costs, 0.33)
    assert node.alpha == 21 / 64
