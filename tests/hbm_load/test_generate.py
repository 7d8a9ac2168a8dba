from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hbm_load.arrivals import arrival_times
from hbm_load.errors import ScenarioError
from hbm_load.generate import START_UNIX_S, generate
from hbm_load.popularity import RankedItems, ZipfMandelbrot
from hbm_load.scenario import Arrivals, Scenario, load_scenario
from hypothesis import given, settings
from hypothesis import strategies as st


def test_equal_seeds_make_equal_traces_in_another_process_too() -> None:
    mine = generate(load_scenario("demo"), 7, duration_s=10).fingerprint()
    code = (
        "from hbm_load import generate, load_scenario;"
        "print(generate(load_scenario('demo'), 7, duration_s=10).fingerprint())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == mine
    assert generate(load_scenario("demo"), 8, duration_s=10).fingerprint() != mine


def test_the_walk_decides_order_share_and_settled_parts(scenario: Scenario) -> None:
    trace = generate(scenario, 1)
    assert trace.labels == ("strangers", "regulars", "again")
    assert np.all(np.diff(trace.regime) >= 0)
    assert np.all(np.diff(trace.time_s) >= 0)
    counts = np.bincount(trace.regime)
    # 50/s over 15, 15 and 30 s; five standard deviations of a Poisson count (and of the
    # wandering rate of the second).
    assert counts[0] == pytest.approx(750, abs=140)
    assert counts[2] == pytest.approx(1500, abs=200)
    for label, (low, high) in enumerate([(0, 15), (15, 30), (30, 60)]):
        times = trace.time_s[trace.regime == label]
        assert low <= times.min() <= times.max() < high
        settled = trace.settled[trace.regime == label]
        np.testing.assert_array_equal(settled, times >= (low + high) / 2)


def test_a_number_of_requests_can_be_asked_for(scenario: Scenario) -> None:
    trace = generate(scenario, 1, requests=1001)
    assert len(trace) == 1001
    assert trace.duration_s == pytest.approx(1001 / 50, rel=0.1)


def test_rate_scale_multiplies_the_rates(scenario: Scenario) -> None:
    assert len(generate(scenario, 1, rate_scale=3)) == pytest.approx(9000, rel=0.15)


def test_histories_of_a_user_only_grow_and_lie_in_the_past(scenario: Scenario) -> None:
    trace = generate(scenario, 3)
    last: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    grown = 0
    for index in range(len(trace)):
        request = trace.request(index)
        assert len(request.items) == len(request.timestamps) > 0
        assert np.all(np.diff(request.timestamps) >= 0)
        assert request.timestamps[-1] <= request.query_time
        assert request.query_time == START_UNIX_S + int(trace.time_s[index])
        assert request.items.min() >= 0
        assert max(request.items.max(), request.candidates.max()) < scenario.catalogue
        if request.user_id in last:
            items, timestamps = last[request.user_id]
            np.testing.assert_array_equal(request.items[: len(items)], items)
            np.testing.assert_array_equal(request.timestamps[: len(items)], timestamps)
            grown += len(request.items) - len(items)
        last[request.user_id] = (request.items, request.timestamps)
    assert grown > 1000


def test_regimes_have_the_users_they_describe(scenario: Scenario) -> None:
    trace = generate(scenario, 4)
    strangers = trace.user[trace.regime == 0]
    assert len(np.unique(strangers)) > 0.99 * len(strangers)
    regulars = trace.user[(trace.regime == 1) & trace.settled]
    assert len(np.unique(regulars)) == 20


def test_hot_users_may_differ_in_activity(scenario: Scenario) -> None:
    raw = scenario.model_dump()
    raw["regimes"]["regulars"]["users"]["hot_zipf_s"] = 1.0
    trace = generate(Scenario.model_validate(raw), 4, requests=8000)
    counts = np.bincount(trace.user[(trace.regime == 1) & trace.settled])
    share = np.sort(counts)[::-1] / counts.sum()
    # 1 / H(20) of all visits are the most active user's.
    assert share[0] == pytest.approx(0.278, abs=0.06)


def test_revisits_come_back_at_the_distance_asked_for() -> None:
    raw = load_scenario("demo").model_dump()
    raw["regimes"] = {"only": raw["regimes"]["steady"]}
    raw["regimes"]["only"]["users"] = {
        "revisit": 0.5,
        "revisit_distance": 20,
        "revisit_sigma": 0.0,
        "one_off_users": 1 << 30,
    }
    raw["walk"] = [{"regime": "only"}]
    trace = generate(Scenario.model_validate(raw), 5, requests=4000)
    same = trace.user[21:] == trace.user[:-21]
    assert same.mean() == pytest.approx(0.5, abs=0.05)


def test_the_shelf_takes_its_share_of_candidates(scenario: Scenario) -> None:
    trace = generate(scenario, 6)
    stop = trace.candidate_offsets[np.searchsorted(trace.regime, 1)]
    on_shelf = trace.candidates[:stop] >= scenario.catalogue - 500
    # 25 % by choice, and a tenth of the rest by chance.
    assert on_shelf.mean() == pytest.approx(0.25 + 0.75 * 0.1, abs=0.03)


def test_histories_longer_than_the_limit_lose_whole_blocks(scenario: Scenario) -> None:
    import dataclasses

    full = generate(scenario, 3)
    short = dataclasses.replace(full, history_limit=64, history_block=16)
    longest = int(np.argmax(full.history_length))
    whole, kept = full.request(longest), short.request(longest)
    assert 48 < len(kept.items) <= 64 < len(whole.items)
    assert (len(whole.items) - len(kept.items)) % 16 == 0
    np.testing.assert_array_equal(whole.items[-len(kept.items) :], kept.items)


def test_a_subset_holds_the_same_requests(scenario: Scenario) -> None:
    trace = generate(scenario, 3)
    chosen = np.arange(5, len(trace), 7)
    part = trace.subset(chosen)
    for place in (0, 11, len(part) - 1):
        mine, whole = part.request(place), trace.request(int(chosen[place]))
        assert mine.user_id == whole.user_id
        assert mine.regime == whole.regime
        np.testing.assert_array_equal(mine.items, whole.items)
        np.testing.assert_array_equal(mine.candidates, whole.candidates)


def test_impossible_wishes_are_refused(scenario: Scenario) -> None:
    with pytest.raises(ScenarioError, match="duration is -1"):
        generate(scenario, 1, duration_s=-1)
    with pytest.raises(ScenarioError, match="2 requests"):
        generate(scenario, 1, requests=2)
    with pytest.raises(ScenarioError, match="no request arrives"):
        generate(scenario, 1, duration_s=1e-6)
    with pytest.raises(ScenarioError, match="not both"):
        generate(scenario, 1, requests=10, duration_s=1)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 3000),
    s=st.one_of(st.floats(0.0, 3.0), st.just(1.0)),
    q=st.floats(0.0, 100.0),
    seed=st.integers(0, 100),
)
def test_zipf_mandelbrot_has_its_distribution(n: int, s: float, q: float, seed: int) -> None:
    count = 20_000
    ranks = ZipfMandelbrot(n, s, q).draw(np.random.default_rng(seed), count)
    assert 0 <= ranks.min() <= ranks.max() < n
    weight = (np.arange(n) + 1 + q) ** -s
    expected = np.cumsum(weight) / weight.sum()
    found = np.cumsum(np.bincount(ranks, minlength=n)) / count
    # Kolmogorov-Smirnov distance; 2.5 / sqrt(n) is exceeded once in about 1e5 samples.
    assert np.abs(found - expected).max() < 2.5 / np.sqrt(count)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 5000), first=st.integers(0, 1 << 38), salt=st.integers(0, 99))
def test_ranks_are_a_permutation_until_they_churn(n: int, first: int, salt: int) -> None:
    ranked = RankedItems.over(first, n, salt)
    items = ranked.items(np.arange(n), 0)
    np.testing.assert_array_equal(np.sort(items), np.arange(first, first + n))


def test_churn_replaces_as_many_ranks_as_it_says() -> None:
    ranked = RankedItems.over(0, 100_000, 1)
    before, after = (ranked.items(np.arange(100_000), churned) for churned in (0, 5000))
    assert (before != after).sum() == pytest.approx(5000, rel=0.1)


def test_catalogues_of_40_bits_do_not_overflow() -> None:
    n = (1 << 40) - 1
    items = RankedItems.over(0, n, 3).items(np.array([0, 1, n - 1]), 0)
    assert len(set(items.tolist())) == 3
    assert items.min() >= 0
    assert items.max() < n


def test_modulated_and_swinging_arrivals_keep_their_mean_rate() -> None:
    arrivals = Arrivals(
        rate_per_s=100, modulation_sd=0.4, modulation_correlation_s=1, swing=0.6, swing_period_s=50
    )
    random = np.random.default_rng(1)
    times = arrival_times(lambda _: arrivals, 500, random)
    # 1,000 correlation times: the mean factor has a standard error of about 2 %.
    assert len(times) == pytest.approx(50_000, rel=0.08)
    per_second = np.bincount(times.astype(int))
    assert per_second.var() > 4 * per_second.mean()


def test_flash_crowds_come_on_top_and_fade() -> None:
    calm = Arrivals(rate_per_s=10)
    crowds = Arrivals(rate_per_s=10, flashes_per_s=0.05, flash_requests=300, flash_decay=3)
    random = np.random.default_rng(2)
    quiet = len(arrival_times(lambda _: calm, 400, random))
    busy = arrival_times(lambda _: crowds, 400, random)
    assert len(busy) > quiet + 2000
    assert np.bincount(busy.astype(int)).max() > 60
