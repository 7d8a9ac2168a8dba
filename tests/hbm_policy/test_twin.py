"""What makes the twin's curve trustworthy."""

from __future__ import annotations

import numpy as np
import pytest
from hbm_policy.twin import Twin
from hbm_policy.twin_users import CROWDED
from hbm_pool.contracts.history import page_fingerprints
from hbm_pool.contracts.identity import row_keys
from hbm_pool.contracts.records import (
    CostModel,
    RequestSample,
    RowClass,
    TableMap,
)

LARGE = {
    "tables": (TableMap("item", 40_001, 0, False),),
    "classes": (RowClass(64, 256, 40_001, (0,)),),
}


def test_a_sample_of_the_rows_predicts_what_all_rows_cost(make_info, make_stream, run_twin) -> None:
    deviations = []
    for seed in range(12):
        info = make_info(**LARGE)
        samples = make_stream(info, seed, 1500, items=30_000, users=150)
        exact = run_twin(info, samples, window_requests=800.0)[1]["rows_missed"][:17, 0]
        found = run_twin(info, samples, window_requests=800.0, rate=0.1)[1]["rows_missed"][:17, 0]
        deviations.append(found / exact - 1.0)
    assert np.abs(np.mean(deviations, axis=0)).max() < 0.05
    assert np.abs(deviations).max() < 0.2


def test_the_curve_does_not_depend_on_how_requests_are_handed_over(
    make_info, make_stream, curves_of, run_twin, costs
) -> None:
    info = make_info()
    samples = make_stream(info, 5, 300)
    _, whole = run_twin(info, samples)
    twin = Twin(info, clock_ns=lambda: 5)
    at = 0
    for size in (1, 2, 63, 64, 65, 7, 98):
        twin.feed(samples[at : at + size], 0, costs)
        at += size
    assert at == len(samples)
    assert curves_of(twin).tobytes() == whole.tobytes()


def test_requests_that_were_lost_fade_the_past_but_do_not_bias_the_curve(
    make_info, make_stream, curves_of, run_twin, costs, one_class
) -> None:
    info = make_info(**one_class)
    complete, thinned = [], []
    for seed in range(5):
        samples = make_stream(info, seed, 900)
        complete.append(run_twin(info, samples, window_requests=300.0)[1]["cost_ms"][:17])
        random = np.random.default_rng(seed)
        twin = Twin(info, window_requests=300.0)
        lost = 0
        for sample in samples:
            if random.random() < 0.3:
                lost += 1
            else:
                twin.feed([sample], lost, costs)
                lost = 0
        record = curves_of(twin)
        assert int(record["requests_lost"]) + lost + twin.requests == 900
        thinned.append(record["cost_ms"][:17])
    ratio = np.mean(thinned, axis=0) / np.mean(complete, axis=0)
    assert np.abs(ratio - 1.0).max() < 0.04


def test_a_long_loss_forgets_old_evidence_and_trust(
    make_info, make_stream, curves_of, run_twin, costs, one_class
) -> None:
    info = make_info(**one_class)
    twin, before = run_twin(info, make_stream(info, 6, 600, items=2500))
    assert before["warm"] == 1.0
    twin.feed([], 500, costs)
    after = curves_of(twin)
    assert after["requests_lost"] == 500
    assert after["window_requests"] == 0
    assert after["warm"] < 0.3
    assert np.isfinite(after["cost_ms"]).all()


def test_warmth_grows_from_nothing_to_one(
    make_info, make_stream, curves_of, costs, one_class
) -> None:
    info = make_info(**one_class)
    twin = Twin(info)
    samples = make_stream(info, 7, 600, items=2500)
    warmth = [float(curves_of(twin)["warm"])]
    for start in range(0, 600, 20):
        twin.feed(samples[start : start + 20], 0, costs)
        warmth.append(float(curves_of(twin)["warm"]))
    assert warmth[0] == 0.0
    assert warmth == sorted(warmth)
    assert warmth[-1] == 1.0


def test_a_serial_curve_is_priced_by_the_newest_constants(
    make_info, make_stream, curves_of, run_twin, costs, one_class
) -> None:
    info = make_info(**one_class)
    samples = make_stream(info, 8, 200)
    dear = costs._replace(token_ms=costs.token_ms * 4, row_ms=(0.2, 0.1))
    twin, _ = run_twin(info, samples)
    twin.feed([], 0, dear)
    fresh = Twin(info, clock_ns=lambda: 5)
    fresh.feed(samples, 0, dear)
    assert curves_of(twin)["cost_ms"] == pytest.approx(curves_of(fresh)["cost_ms"])


def test_an_overlapped_server_pays_the_slower_of_the_two(
    make_info, make_stream, curves_of, run_twin, costs
) -> None:
    samples = make_stream(make_info(), 9, 400)
    serial = run_twin(make_info(), samples)[1]["cost_ms"][:17]
    overlap = run_twin(make_info(cost_model=CostModel.OVERLAP), samples)[1]["cost_ms"][:17]
    compute = costs._replace(row_ms=(0.0, 0.0))
    alone = Twin(make_info())
    alone.feed(samples, 0, compute)
    compute_ms = curves_of(alone)["cost_ms"][:17]
    gather_ms = serial - compute_ms
    assert (overlap < serial).all()
    assert (overlap >= np.maximum(compute_ms, gather_ms) * 0.98).all()


def test_overlap_is_not_taken_in_by_the_noise_of_a_small_sample(
    make_info, make_stream, curves_of, costs
) -> None:
    info = make_info(cost_model=CostModel.OVERLAP, **LARGE)
    samples = make_stream(info, 3, 1500, items=30_000, users=150)
    # Gather and compute cost about the same, so that noise of either would raise the maximum.
    costs = costs._replace(row_ms=(0.05,))
    found = []
    for rate in (1.0, 0.05):
        twin = Twin(info, rate=rate, window_requests=800.0)
        twin.feed(samples, 0, costs)
        found.append(curves_of(twin))
    full, part = found
    gather_error = part["rows_missed"][:17, 0] / full["rows_missed"][:17, 0] - 1.0
    error = part["cost_ms"][:17] / full["cost_ms"][:17] - 1.0
    assert np.abs(error).max() < 0.03 + np.abs(gather_error).max()
    assert np.abs(error).max() < 0.08


def test_two_classes_are_divided_by_each_candidate_for_itself(
    make_info, make_stream, run_twin
) -> None:
    info = make_info()
    samples = make_stream(info, 10, 600, items=2500)
    twin, record = run_twin(info, samples)
    for k in range(17):
        rows = [int(each.slots[k]) for each in twin._rows[:2]]
        extents = rows[0] / 32 + rows[1] / 64
        assert extents == pytest.approx(round(record["alpha"][k] * 64), abs=1e-9)
    assert (record["rows_missed"][:17, :2] > 0).any()
    assert (record["rows_missed"][:17, 2:] == 0).all()


def test_memory_stays_bounded_when_rows_and_users_never_return(make_info, curves_of, costs) -> None:
    info = make_info(
        tables=(TableMap("item", 1 << 30, 0, False),),
        classes=(RowClass(64, 32, 1 << 30, (0,)),),
    )
    twin = Twin(info)
    random = np.random.default_rng(1)
    users = twin._users
    before = (len(users.name), len(users.fingerprints), len(twin._rows[0].key))
    for user in range(1, 3000):
        ids = random.integers(0, 1 << 30, 40)
        keys = row_keys(0, ids)
        prints = page_fingerprints(ids[:32], np.arange(32), None, info.page_tokens)
        positions = np.arange(32, dtype=np.uint32)
        sample = RequestSample(user, 32, 8, 40, 32, prints, keys[:32], positions, keys[32:])
        twin.feed([sample], 0, costs)
    assert (len(users.name), len(users.fingerprints), len(twin._rows[0].key)) == before
    record = curves_of(twin)
    assert record["emb_miss_ratio"][:17] == pytest.approx(1.0, abs=0.01)
    assert (record["kv_hit_ratio"][:17] == 0.0).all()
    assert (users.used <= users.capacity).all()
    assert users.counts[CROWDED] == 0
    # Every entry of both tables can be found again, and none is there twice.
    taken = twin._rows[0]
    assert len(np.unique(taken.key[taken.taken])) == taken.taken.sum()
    assert np.count_nonzero(taken.table) == taken.taken.sum()
    assert np.count_nonzero(users.table) == np.count_nonzero(users.holders)
