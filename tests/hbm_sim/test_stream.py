"""Streams: repeatable, histories that only grow, popularity and churn as asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hbm_load.scenario import Items
from hbm_pool.contracts.identity import sampled
from hbm_sim.row_mix import SampledRows, zipf_mass
from hbm_sim.stream import Stream, make_stream
from hbm_sim.workload import WorkloadError

from tests.hbm_sim.small_workload import regime, small_workload


def _history(stream: Stream, i: int) -> tuple[list[int], list[int]]:
    span = slice(stream.history_at[i], stream.history_at[i + 1])
    return stream.history_rows[span].tolist(), stream.history_positions[span].tolist()


def test_equal_inputs_make_equal_streams() -> None:
    workload = small_workload()
    first, second = make_stream(workload, 3, qps=20.0), make_stream(workload, 3, qps=20.0)
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != make_stream(workload, 4, qps=20.0).fingerprint()
    assert first.fingerprint() != make_stream(workload, 3, qps=21.0).fingerprint()


def test_load_moves_arrivals_and_nothing_else() -> None:
    workload = small_workload()
    slow, fast = make_stream(workload, 1, qps=10.0), make_stream(workload, 1, qps=20.0)
    assert fast.arrival_s * 2.0 == pytest.approx(slow.arrival_s)
    assert np.array_equal(slow.history_rows, fast.history_rows)
    assert np.array_equal(slow.user, fast.user)
    assert 1.0 / np.diff(slow.arrival_s).mean() == pytest.approx(10.0, rel=0.15)


def test_all_rows_are_there_at_rate_one() -> None:
    stream = make_stream(small_workload(), 1, qps=20.0)
    assert np.array_equal(np.diff(stream.history_at), stream.history_lookups)
    assert np.array_equal(np.diff(stream.candidate_at), stream.candidate_lookups)
    rows, positions = _history(stream, 50)
    # Two lookups per token, in order of position.
    assert positions == [position for token in range(len(rows) // 2) for position in (token,) * 2]


def test_a_history_begins_with_what_it_was_at_the_visit_before() -> None:
    stream = make_stream(small_workload(), 1, qps=20.0)
    last: dict[int, int] = {}
    grown = cut = 0
    for i in range(len(stream)):
        before = last.get(int(stream.user[i]))
        last[int(stream.user[i])] = i
        if before is None:
            assert stream.new_tokens[i] == stream.tokens[i] + stream.dropped[i]
            continue
        rows, _ = _history(stream, i)
        old, positions = _history(stream, before)
        gone = int(stream.dropped[i] - stream.dropped[before])
        kept = [row for row, at in zip(old, positions, strict=True) if at >= gone]
        assert rows[: len(kept)] == kept
        assert stream.tokens[i] == stream.tokens[before] - gone + 4
        grown += gone == 0
        cut += gone > 0
    assert grown > 100
    assert cut > 0
    assert stream.tokens.max() <= 128


def test_users_come_back_and_hot_ones_more_often() -> None:
    stream = make_stream(small_workload(), 1, qps=20.0)

    def revisits(name: str) -> float:
        mask = stream.of_regime(name, settled=False)
        seen_first = np.unique(stream.user, return_index=True)[1]
        first = np.zeros(len(stream), bool)
        first[seen_first] = True
        return float((~first[mask]).mean())

    assert revisits("quiet") < 0.6
    assert revisits("busy") > 0.7


def test_marks_say_what_counts() -> None:
    stream = make_stream(small_workload(), 1, qps=20.0)
    assert stream.warm_up == 100
    assert stream.counted.sum() == 800
    assert stream.of_regime("quiet").sum() == 200
    assert stream.of_regime("quiet", settled=False).sum() == 400
    assert len(make_stream(small_workload(), 1, qps=20.0, requests=450)) == 550


def test_a_sample_holds_its_share_of_rows_and_of_lookups() -> None:
    workload = small_workload(rows=400_000, sample_rate=0.05)
    whole = make_stream(workload, 1, 1.0, qps=20.0)
    part = make_stream(workload, 1, 0.05, qps=20.0)
    assert sampled(part.row_keys, 0.05).all()
    assert len(part.row_keys) == pytest.approx(20_000, rel=0.05)
    assert np.array_equal(part.tokens, whole.tokens)
    assert np.array_equal(part.history_lookups, whole.history_lookups)
    # Popularity is skewed, so the share of lookups scatters more than that of rows.
    assert len(part.history_rows) == pytest.approx(0.05 * len(whole.history_rows), rel=0.5)


def test_rows_are_as_popular_as_their_rank_says() -> None:
    rows = SampledRows(50_000, 1.0, 0, seed=1)
    popularity = rows.catalogue(Items(zipf_s=0.9, zipf_q=3.0), 0)
    share = np.zeros(50_000)
    np.add.at(share, popularity.rows, popularity.accept)
    np.add.at(share, popularity.rows[popularity.alias], 1.0 - popularity.accept)
    share = np.sort(share / share.sum())[::-1]
    expected = (np.arange(50_000) + 4.0) ** -0.9
    assert share == pytest.approx(expected / expected.sum(), rel=1e-6)


def test_the_mass_of_a_large_catalogue_is_its_sum() -> None:
    n = 300_000
    for s, q in ((0.65, 0.0), (1.0, 2.0), (1.2, 50.0)):
        exact = float(((np.arange(n) + 1.0 + q) ** -s).sum())
        assert zipf_mass(n, s, q) == pytest.approx(exact, rel=1e-9)


def test_churn_moves_popularity_to_other_rows() -> None:
    rows = SampledRows(50_000, 1.0, 0, seed=1)
    items = Items(zipf_s=0.9, churn=10.0)

    def hottest(churned: int) -> set[int]:
        found = rows.catalogue(items, churned)
        share = np.zeros(50_000)
        np.add.at(share, found.rows, found.accept)
        np.add.at(share, found.rows[found.alias], 1.0 - found.accept)
        return set(np.argsort(-share)[:1000].tolist())

    fresh = hottest(0)
    assert 0.65 < len(fresh & hottest(12_500)) / 1000 < 0.85
    assert len(fresh & hottest(50_000)) / 1000 < 0.1


def test_a_shelf_takes_its_share_of_candidates_and_new_tokens() -> None:
    sale = regime(revisit=0.2, hot=0.1, zipf_s=0.6, new_share=0.5, new_items=200, new_zipf_s=0.3)
    workload = small_workload(regimes={"quiet": sale, "busy": sale})
    stream = make_stream(workload, 1, qps=20.0)
    shelf = stream.row_keys[stream.candidate_rows] >= 3800
    assert shelf.mean() == pytest.approx(0.5 + 0.5 * 200 / 4000, abs=0.05)
    # What a user brought along was not bought from the shelf.
    assert (stream.row_keys[stream.history_rows] >= 3800).mean() < 0.25


@pytest.mark.parametrize(
    "values", [{"rate": 0.0}, {"rate": 1.5}, {"qps": 0.0}, {"load": -1.0}, {"requests": 0}]
)
def test_impossible_values_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(WorkloadError, match=next(iter(values))):
        make_stream(
            small_workload(), 1, **({"qps": 20.0} | values if "load" not in values else values)
        )  # type: ignore[arg-type]
