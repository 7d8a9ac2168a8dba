"""What the twin refuses, and which candidates it takes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hbm_policy import CostConstants
from hbm_policy.twin import Twin, TwinError, default_alphas
from hbm_pool.contracts.identity import row_keys


def test_a_sample_that_contradicts_itself_is_refused_and_counted(
    make_info, make_stream, run_twin, one_class
) -> None:
    info = make_info(**one_class)
    samples = make_stream(info, 11, 50)
    good = next(each for each in samples if each.history_tokens >= 8)
    bad = [
        good._replace(history_tokens=-1),
        good._replace(history_tokens=info.max_sequence_tokens + 1),
        good._replace(page_fingerprints=good.page_fingerprints[:-1]),
        good._replace(history_positions=good.history_positions[:-1]),
        good._replace(history_rows_total=good.rows_total + 1),
        good._replace(candidates=-4),
    ]
    _, expected = run_twin(info, samples)
    twin, record = run_twin(info, [*bad, *samples])
    assert twin.requests_refused == len(bad)
    assert record["cost_ms"].tobytes() == expected["cost_ms"].tobytes()


def test_rows_of_undeclared_tables_are_left_out(
    make_info, make_stream, run_twin, one_class
) -> None:
    info = make_info(**one_class)
    samples = make_stream(info, 12, 30)
    strange = row_keys(9, np.arange(5, dtype=np.int64))
    odd = [
        each._replace(candidate_keys=np.concatenate([each.candidate_keys, strange]))
        for each in samples
    ]
    assert run_twin(info, odd)[1].tobytes() == run_twin(info, samples)[1].tobytes()


def test_an_empty_twin_publishes_a_cold_curve(make_info, curves_of) -> None:
    record = curves_of(Twin(make_info(), clock_ns=lambda: 77))
    assert record["monotonic_ns"] == 77
    assert record["requests"] == record["window_requests"] == 0
    assert record["warm"] == 0.0
    assert record["points"] == 17


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 0.3, [0.1, 0.15, 0.2, 0.25, 0.3]),
        (0.12, 0.22, [0.12, 0.15, 0.2, 0.22]),
        (0.5, 0.5, [0.5]),
    ],
)
def test_default_candidates_cover_the_bounds(low, high, expected) -> None:
    assert default_alphas(low, high) == pytest.approx(expected)


def test_candidates_are_whole_extents_within_the_bounds(make_info) -> None:
    twin = Twin(make_info(extents=10), [0.0, 0.14, 0.16, 0.5, 1.0])
    assert twin.alphas == (0.1, 0.2, 0.5, 0.9)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alphas": []}, "0 candidates"),
        ({"alphas": [0.1] * 33}, "33 candidates"),
        ({"alphas": [0.5, 0.4]}, "ascending"),
        ({"alphas": [0.5, math.nan]}, "within 0..1"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"rate": 1.5}, "rate is 1.5"),
        ({"window_requests": 0.0}, "window_requests is 0.0"),
    ],
)
def test_impossible_twins_are_refused_with_the_value(make_info, fields, words) -> None:
    with pytest.raises(TwinError, match=words):
        Twin(make_info(), **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"classes": ()}, "0 row classes"),
        ({"alpha_min": 0.9, "alpha_max": 0.1}, "bounds"),
        ({"sample_rate": 0.0}, "samples 0.0"),
        ({"extents": 0}, "extents is 0"),
    ],
)
def test_impossible_servers_are_refused_with_the_value(make_info, fields, words, costs) -> None:
    with pytest.raises(TwinError, match=words):
        Twin(make_info(**fields))


@pytest.mark.parametrize(
    "costs",
    [
        CostConstants(0.5, math.nan, 1e-5, (0.05,)),
        CostConstants(0.5, 0.02, 1e-5, (-1.0,)),
        CostConstants(0.5, 0.02, 1e-5, (1.0,) * 5),
        CostConstants(1.0, 0.0, 0.0, (0.0,)),
    ],
)
def test_constants_that_cannot_price_are_refused(make_info, costs) -> None:
    with pytest.raises(TwinError, match="cannot price"):
        Twin(make_info()).feed([], 0, costs)


def test_a_negative_loss_and_a_foreign_record_are_refused(make_info, costs) -> None:
    twin = Twin(make_info())
    with pytest.raises(TwinError, match="-1 requests lost"):
        twin.feed([], -1, costs)
    with pytest.raises(TwinError, match="CURVES"):
        twin.curves(np.zeros(3))
