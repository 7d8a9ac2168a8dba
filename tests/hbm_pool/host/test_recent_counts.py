"""The sketch orders rows by how often they were asked for, lately."""

from __future__ import annotations

import numpy as np
from hbm_pool.host.recent_counts import MAX_PLACES, WAYS, RecentCounts


def test_hottest_rows_come_first() -> None:
    counts = RecentCounts(4096)
    rng = np.random.default_rng(0)
    keys = (rng.pareto(1.0, 20_000) * 10).astype(np.int64) % 100_000
    for part in np.array_split(keys, 40):
        counts.note(part)
    hottest, found = counts.snapshot(2)
    assert (np.diff(found.astype(np.int64)) <= 0).all()
    true = np.bincount(keys, minlength=100_000)
    best = set(np.argsort(true)[::-1][:50].tolist())
    assert len(best & set(hottest[:60].tolist())) >= 45


def test_old_heat_fades() -> None:
    counts = RecentCounts(512)
    counts.note(np.full(1000, 7, np.int64))
    before = dict(zip(*(a.tolist() for a in counts.snapshot(1)), strict=True))[7]
    rng = np.random.default_rng(0)
    for _ in range(30):
        counts.note(rng.integers(1000, 1400, 1000))
    after = dict(zip(*(a.tolist() for a in counts.snapshot(1)), strict=True)).get(7, 0)
    assert after < before / 4


def test_memory_is_bounded() -> None:
    assert RecentCounts(10**9).nbytes == MAX_PLACES * 6
    assert RecentCounts(1).nbytes % WAYS == 0


def test_weight_counts_for_several() -> None:
    counts = RecentCounts(100)
    counts.note(np.array([3], np.int64), 8)
    keys, found = counts.snapshot(8)
    assert (keys.tolist(), found.tolist()) == ([3], [8])
