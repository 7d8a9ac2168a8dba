"""The twin against a plain model of the same rules."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hbm_policy import CostConstants
from hbm_policy.twin import default_alphas
from hbm_policy.twin_rows import probation_rows
from hbm_pool.contracts.identity import sampled
from hbm_pool.contracts.records import (
    RequestSample,
    ServerInfo,
)


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


@pytest.mark.parametrize("eviction", ["tail", "whole"])
@pytest.mark.parametrize(("rate", "seed"), [(1.0, 1), (1.0, 2), (0.4, 3)])
def test_every_candidate_is_what_the_rules_say(
    make_info, eviction, rate, seed, make_stream, run_twin, costs, one_class
) -> None:
    info = make_info(sample_rate=rate, kv_eviction=eviction, **one_class)
    samples = make_stream(info, seed, 400)
    plain = PlainTwin(info, rate, 50.0)
    plain.feed(samples, costs)

    twin, record = run_twin(info, samples, window_requests=50.0)

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


def test_a_lower_rate_of_ours_takes_a_part_of_what_the_server_samples(
    make_info, make_stream, run_twin, costs, one_class
) -> None:
    info = make_info(**one_class)
    samples = make_stream(info, 4, 200)
    plain = PlainTwin(info, 0.3, 32.0)
    plain.feed(samples, costs)
    _, record = run_twin(info, samples, rate=0.3)
    assert record["cost_ms"][:17] == pytest.approx(plain.column("cost_ms"))
