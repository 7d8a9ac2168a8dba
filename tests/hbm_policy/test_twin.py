"""The twin against a plain model of the same rules, and what makes its curve trustworthy."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hbm_policy import CostConstants
from hbm_policy.twin import Twin, TwinError, default_alphas
from hbm_policy.twin_rows import probation_rows
from hbm_policy.twin_users import CROWDED
from hbm_pool.contracts.history import page_fingerprints, table_rows
from hbm_pool.contracts.identity import row_keys, sampled
from hbm_pool.contracts.records import (
    CURVES,
    CostModel,
    RequestSample,
    RowClass,
    ServerInfo,
    TableMap,
)

COSTS = CostConstants(0.5, 0.02, 1e-5, (0.05, 0.03))
ONE_CLASS = {
    "tables": (TableMap("item", 3000, 0, False),),
    "classes": (RowClass(64, 32, 3000, (0,)),),
}


class PlainRows:
    """TZ row by row, with lists and a dict."""

    def __init__(self, ring: int, main: int) -> None:
        self.ring: list[int | None] = [None] * ring
        self.ring_count = [0] * ring
        self.laps = [0] * ring
        self.ring_at = 0
        self.main: list[int | None] = [None] * main
        self.main_count = [0] * main
        self.hand = 0
        self.filled = 0
        self.where: dict[int, tuple[str, int, int]] = {}

    def hit(self, key: int) -> bool:
        zone, index, _ = self.where.get(key, ("", 0, 0))
        if zone == "ring" and self.ring[index] == key:
            self.ring_count[index] = min(3, self.ring_count[index] + 1)
            return True
        if zone == "main" and self.main[index] == key:
            self.main_count[index] = min(3, self.main_count[index] + 1)
            return True
        return False

    @property
    def room(self) -> int:
        return len(self.main) - self.filled + max(1, len(self.ring))

    def insert(self, key: int) -> None:
        zone, index, lap = self.where.get(key, ("", 0, 0))
        if (zone == "ring" and 1 <= self.laps[index] - lap <= 9) or self.filled < len(self.main):
            self.into_main(key)
        else:
            self.into_ring(key)

    def into_main(self, key: int) -> None:
        if self.filled < len(self.main):
            slot = self.filled
            self.filled += 1
        else:
            lowest, slot = 4, -1
            for _ in range(16):
                here = self.hand
                self.hand = (self.hand + 1) % len(self.main)
                if self.main_count[here] < lowest:
                    lowest, slot = self.main_count[here], here
                if self.main_count[here] == 0:
                    break
                self.main_count[here] -= 1
        self.main[slot] = key
        self.main_count[slot] = 0
        self.where[key] = ("main", slot, 0)

    def into_ring(self, key: int) -> None:
        at = self.ring_at
        self.laps[at] += 1
        old = self.ring[at]
        if old is not None and self.ring_count[at] > 0:
            self.into_main(old)
        self.ring[at] = key
        self.ring_count[at] = 0
        self.where[key] = ("ring", at, self.laps[at])
        self.ring_at = (at + 1) % len(self.ring)


class PlainUsers:
    """KV of users in extents, coldest first."""

    def __init__(self, extents: int, info: ServerInfo) -> None:
        self.extents = extents
        self.info = info
        self.users: OrderedDict[int, list[Any]] = OrderedDict()

    def serve(self, sample: RequestSample) -> int:
        info = self.info
        if sample.user == 0:
            return 0
        needed = math.ceil(sample.history_tokens / (info.page_tokens * info.pages_per_extent))
        prints = sample.page_fingerprints.tolist()
        if needed > self.extents:
            return 0
        _, pages, known = self.users.pop(sample.user, [0, 0, []])
        agreed = 0
        while agreed < min(pages, len(prints)) and known[agreed] == prints[agreed]:
            agreed += 1
        while (short := needed + sum(each[0] for each in self.users.values()) - self.extents) > 0:
            victim = next(iter(self.users))
            entry = self.users[victim]
            if info.kv_eviction == "whole" or entry[0] <= short:
                del self.users[victim]
            else:
                entry[0] -= short
                entry[1] = min(entry[1], entry[0] * info.pages_per_extent)
        if prints:
            self.users[sample.user] = [needed, len(prints), prints]
        return agreed * info.page_tokens


class PlainTwin:
    """One width class; every statistic as a faded sum over requests."""

    def __init__(self, info: ServerInfo, rate: float, window: float) -> None:
        self.info, self.rate = info, rate
        self.fade = math.exp(-1.0 / window)
        self.weight = 0.0
        self.pairs = []
        for alpha in default_alphas(info.alpha_min, info.alpha_max):
            low = math.ceil(info.alpha_min * info.extents)
            high = math.floor(info.alpha_max * info.extents)
            emb = min(max(round(alpha * info.extents), low), high)
            per_extent = info.classes[0].rows_per_extent * rate
            slots = max(2, round(emb * per_extent))
            ring = probation_rows(emb, slots, per_extent)
            pair = (PlainRows(ring, slots - ring), PlainUsers(info.extents - emb, info), {})
            self.pairs.append(pair)

    def feed(self, samples: Sequence[RequestSample], costs: CostConstants) -> None:
        for sample in samples:
            self.weight = self.weight * self.fade + 1.0
            last: dict[int, float] = {}
            for key in reversed(sample.candidate_keys.tolist()):
                last.setdefault(key, math.inf)
            positions = sample.history_positions.tolist()
            for key, position in zip(
                reversed(sample.history_keys.tolist()), reversed(positions), strict=True
            ):
                last.setdefault(key, position)
            kept = sampled(np.array(list(last), np.uint64), self.rate)
            last = {key: at for (key, at), keep in zip(last.items(), kept, strict=True) if keep}
            for rows, users, sums in self.pairs:
                self.serve(sample, last, rows, users, sums, costs)

    def serve(self, sample, last, rows, users, sums, costs) -> None:
        tokens, candidates = sample.history_tokens, sample.candidates
        cached = users.serve(sample)
        missed = [k for k, position in last.items() if position >= cached and not rows.hit(k)]
        for key in missed[: rows.room]:
            rows.insert(key)
        new = tokens - cached
        context = sum(range(cached + 1, tokens + 1)) + candidates * tokens
        rows_missed = len(missed) / self.rate
        looked_up = sample.rows_total - sample.history_rows_total
        looked_up += sample.history_rows_total * new / tokens if tokens else 0
        values = {
            "compute_tokens": new + candidates,
            "context_tokens": context,
            "rows_missed": rows_missed,
            "kv_hit_ratio": cached > 0,
            "lookups": looked_up,
            "cost_ms": costs.fixed_ms
            + costs.token_ms * (new + candidates)
            + costs.token_context_ms * context
            + costs.row_ms[0] * rows_missed,
        }
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) * self.fade + value

    def column(self, name: str) -> list[float]:
        return [sums[name] / self.weight for _, _, sums in self.pairs]


def make_stream(
    info: ServerInfo, seed: int, requests: int, *, users: int = 12, items: int = 300
) -> list[RequestSample]:
    """Users with growing histories, a few of them anonymous, new or with a changed past."""
    random = np.random.default_rng(seed)
    popularity = np.cumsum(1.0 / np.arange(1, items + 1) ** 0.8)
    known: dict[int, npt.NDArray[np.int64]] = {}
    samples = []

    def draw(count: int) -> npt.NDArray[np.int64]:
        ranks = np.searchsorted(popularity, random.random(count) * popularity[-1])
        # Other seeds make other rows hot: a sample of rows is not judged by one draw of them.
        return (ranks * 7 + seed * 131) % info.tables[0].rows

    def keys_of(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        columns = [
            row_keys(index, table_rows(ids, index, table.rows, table.hashed))
            for index, table in enumerate(info.tables)
        ]
        return np.stack(columns, axis=1).reshape(-1)

    for _ in range(requests):
        user = int(random.integers(0, users + 1))
        history = known.get(user, draw(int(random.integers(0, 60))))
        if random.random() < 0.05:
            history = draw(len(history))
        history = np.concatenate([history, draw(int(random.integers(0, 6)))])
        history = history[-info.max_sequence_tokens :]
        known[user] = history
        candidates = draw(8)
        rows, wanted = keys_of(history), keys_of(candidates)
        chosen = np.flatnonzero(sampled(rows, info.sample_rate))
        samples.append(
            RequestSample(
                user=user,
                history_tokens=len(history),
                candidates=len(candidates),
                rows_total=len(rows) + len(wanted),
                history_rows_total=len(rows),
                page_fingerprints=page_fingerprints(
                    history, np.arange(len(history)), None, info.page_tokens
                ),
                history_keys=rows[chosen],
                history_positions=(chosen // len(info.tables)).astype(np.uint32),
                candidate_keys=wanted[sampled(wanted, info.sample_rate)],
            )
        )
    return samples


def curves_of(twin: Twin) -> npt.NDArray[Any]:
    record = np.zeros((), CURVES)
    twin.curves(record)
    return record


def run(
    info: ServerInfo, samples: Sequence[RequestSample], **fields: Any
) -> tuple[Twin, npt.NDArray[Any]]:
    twin = Twin(info, clock_ns=lambda: 5, **fields)
    twin.feed(samples, 0, COSTS)
    return twin, curves_of(twin)


@pytest.mark.parametrize("eviction", ["tail", "whole"])
@pytest.mark.parametrize(("rate", "seed"), [(1.0, 1), (1.0, 2), (0.4, 3)])
def test_every_candidate_is_what_the_rules_say(make_info, eviction, rate, seed) -> None:
    info = make_info(sample_rate=rate, kv_eviction=eviction, **ONE_CLASS)
    samples = make_stream(info, seed, 400)
    plain = PlainTwin(info, rate, 50.0)
    plain.feed(samples, COSTS)

    twin, record = run(info, samples, window_requests=50.0)

    points = int(record["points"])
    assert points == len(plain.pairs)
    for name in ("compute_tokens", "context_tokens", "kv_hit_ratio", "cost_ms"):
        assert record[name][:points] == pytest.approx(plain.column(name), rel=1e-9), name
    assert record["rows_missed"][:points, 0] == pytest.approx(plain.column("rows_missed"))
    ratio = np.array(plain.column("rows_missed")) / np.array(plain.column("lookups"))
    assert record["emb_miss_ratio"][:points] == pytest.approx(ratio)
    assert twin.requests == record["requests"] == 400
    # The stream is one in which candidates differ and both caches evict.
    assert record["kv_hit_ratio"][0] > record["kv_hit_ratio"][points - 1]
    assert record["emb_miss_ratio"][0] > record["emb_miss_ratio"][points - 1]


def test_a_lower_rate_of_ours_takes_a_part_of_what_the_server_samples(make_info) -> None:
    info = make_info(**ONE_CLASS)
    samples = make_stream(info, 4, 200)
    plain = PlainTwin(info, 0.3, 32.0)
    plain.feed(samples, COSTS)
    _, record = run(info, samples, rate=0.3)
    assert record["cost_ms"][:17] == pytest.approx(plain.column("cost_ms"))


LARGE = {
    "tables": (TableMap("item", 40_001, 0, False),),
    "classes": (RowClass(64, 256, 40_001, (0,)),),
}


def test_a_sample_of_the_rows_predicts_what_all_rows_cost(make_info) -> None:
    deviations = []
    for seed in range(12):
        info = make_info(**LARGE)
        samples = make_stream(info, seed, 1500, items=30_000, users=150)
        exact = run(info, samples, window_requests=800.0)[1]["rows_missed"][:17, 0]
        found = run(info, samples, window_requests=800.0, rate=0.1)[1]["rows_missed"][:17, 0]
        deviations.append(found / exact - 1.0)
    assert np.abs(np.mean(deviations, axis=0)).max() < 0.05
    assert np.abs(deviations).max() < 0.2


def test_the_curve_does_not_depend_on_how_requests_are_handed_over(make_info) -> None:
    info = make_info()
    samples = make_stream(info, 5, 300)
    _, whole = run(info, samples)
    twin = Twin(info, clock_ns=lambda: 5)
    at = 0
    for size in (1, 2, 63, 64, 65, 7, 98):
        twin.feed(samples[at : at + size], 0, COSTS)
        at += size
    assert at == len(samples)
    assert curves_of(twin).tobytes() == whole.tobytes()


def test_requests_that_were_lost_fade_the_past_but_do_not_bias_the_curve(make_info) -> None:
    info = make_info(**ONE_CLASS)
    complete, thinned = [], []
    for seed in range(5):
        samples = make_stream(info, seed, 900)
        complete.append(run(info, samples, window_requests=300.0)[1]["cost_ms"][:17])
        random = np.random.default_rng(seed)
        twin = Twin(info, window_requests=300.0)
        lost = 0
        for sample in samples:
            if random.random() < 0.3:
                lost += 1
            else:
                twin.feed([sample], lost, COSTS)
                lost = 0
        record = curves_of(twin)
        assert int(record["requests_lost"]) + lost + twin.requests == 900
        thinned.append(record["cost_ms"][:17])
    ratio = np.mean(thinned, axis=0) / np.mean(complete, axis=0)
    assert np.abs(ratio - 1.0).max() < 0.04


def test_a_long_loss_forgets_old_evidence_and_trust(make_info) -> None:
    info = make_info(**ONE_CLASS)
    twin, before = run(info, make_stream(info, 6, 600, items=2500))
    assert before["warm"] == 1.0
    twin.feed([], 500, COSTS)
    after = curves_of(twin)
    assert after["requests_lost"] == 500
    assert after["window_requests"] == 0
    assert after["warm"] < 0.3
    assert np.isfinite(after["cost_ms"]).all()


def test_warmth_grows_from_nothing_to_one(make_info) -> None:
    info = make_info(**ONE_CLASS)
    twin = Twin(info)
    samples = make_stream(info, 7, 600, items=2500)
    warmth = [float(curves_of(twin)["warm"])]
    for start in range(0, 600, 20):
        twin.feed(samples[start : start + 20], 0, COSTS)
        warmth.append(float(curves_of(twin)["warm"]))
    assert warmth[0] == 0.0
    assert warmth == sorted(warmth)
    assert warmth[-1] == 1.0


def test_a_serial_curve_is_priced_by_the_newest_constants(make_info) -> None:
    info = make_info(**ONE_CLASS)
    samples = make_stream(info, 8, 200)
    dear = COSTS._replace(token_ms=COSTS.token_ms * 4, row_ms=(0.2, 0.1))
    twin, _ = run(info, samples)
    twin.feed([], 0, dear)
    fresh = Twin(info, clock_ns=lambda: 5)
    fresh.feed(samples, 0, dear)
    assert curves_of(twin)["cost_ms"] == pytest.approx(curves_of(fresh)["cost_ms"])


def test_an_overlapped_server_pays_the_slower_of_the_two(make_info) -> None:
    samples = make_stream(make_info(), 9, 400)
    serial = run(make_info(), samples)[1]["cost_ms"][:17]
    overlap = run(make_info(cost_model=CostModel.OVERLAP), samples)[1]["cost_ms"][:17]
    compute = COSTS._replace(row_ms=(0.0, 0.0))
    alone = Twin(make_info())
    alone.feed(samples, 0, compute)
    compute_ms = curves_of(alone)["cost_ms"][:17]
    gather_ms = serial - compute_ms
    assert (overlap < serial).all()
    assert (overlap >= np.maximum(compute_ms, gather_ms) * 0.98).all()


def test_overlap_is_not_taken_in_by_the_noise_of_a_small_sample(make_info) -> None:
    info = make_info(cost_model=CostModel.OVERLAP, **LARGE)
    samples = make_stream(info, 3, 1500, items=30_000, users=150)
    # Gather and compute cost about the same, so that noise of either would raise the maximum.
    costs = COSTS._replace(row_ms=(0.05,))
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


def test_two_classes_are_divided_by_each_candidate_for_itself(make_info) -> None:
    info = make_info()
    samples = make_stream(info, 10, 600, items=2500)
    twin, record = run(info, samples)
    for k in range(17):
        rows = [int(each.slots[k]) for each in twin._rows[:2]]
        extents = rows[0] / 32 + rows[1] / 64
        assert extents == pytest.approx(round(record["alpha"][k] * 64), abs=1e-9)
    assert (record["rows_missed"][:17, :2] > 0).any()
    assert (record["rows_missed"][:17, 2:] == 0).all()


def test_memory_stays_bounded_when_rows_and_users_never_return(make_info) -> None:
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
        twin.feed([sample], 0, COSTS)
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


def test_a_sample_that_contradicts_itself_is_refused_and_counted(make_info) -> None:
    info = make_info(**ONE_CLASS)
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
    _, expected = run(info, samples)
    twin, record = run(info, [*bad, *samples])
    assert twin.requests_refused == len(bad)
    assert record["cost_ms"].tobytes() == expected["cost_ms"].tobytes()


def test_rows_of_undeclared_tables_are_left_out(make_info) -> None:
    info = make_info(**ONE_CLASS)
    samples = make_stream(info, 12, 30)
    strange = row_keys(9, np.arange(5, dtype=np.int64))
    odd = [
        each._replace(candidate_keys=np.concatenate([each.candidate_keys, strange]))
        for each in samples
    ]
    assert run(info, odd)[1].tobytes() == run(info, samples)[1].tobytes()


def test_an_empty_twin_publishes_a_cold_curve(make_info) -> None:
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
def test_impossible_servers_are_refused_with_the_value(make_info, fields, words) -> None:
    with pytest.raises(TwinError, match=words):
        Twin(make_info(**fields))


@pytest.mark.parametrize(
    "costs",
    [
        COSTS._replace(token_ms=math.nan),
        COSTS._replace(row_ms=(-1.0,)),
        COSTS._replace(row_ms=(1.0,) * 5),
        CostConstants(1.0, 0.0, 0.0, (0.0,)),
    ],
)
def test_constants_that_cannot_price_are_refused(make_info, costs) -> None:
    with pytest.raises(TwinError, match="cannot price"):
        Twin(make_info()).feed([], 0, costs)


def test_a_negative_loss_and_a_foreign_record_are_refused(make_info) -> None:
    twin = Twin(make_info())
    with pytest.raises(TwinError, match="-1 requests lost"):
        twin.feed([], -1, COSTS)
    with pytest.raises(TwinError, match="CURVES"):
        twin.curves(np.zeros(3))
