"""The counts order rows by how often they were asked for, lately."""

from __future__ import annotations

import numpy as np
import pytest
from hbm_pool.host.recent_counts import LEVELS, MAX_PLACES, WAYS, RecentCounts

EVERYTHING = 1 << 22


def everything(counts: RecentCounts) -> list[int]:
    """All rows counted, in the order in which they are chosen."""
    counts.restart()
    keys, looked = counts.sweep(EVERYTHING, counts.cycle)
    assert looked == counts.cycle
    return keys.tolist()


@pytest.mark.parametrize("slots", [4096, 1 << 17])
def test_hottest_rows_come_first(slots: int) -> None:
    counts = RecentCounts(slots, rows=100_000)
    assert counts.direct == (slots > 4096)
    rng = np.random.default_rng(0)
    keys = (rng.pareto(1.0, 20_000) * 10).astype(np.int64) % 100_000
    for part in np.array_split(keys, 40):
        counts.note(part)
    chosen = everything(counts)
    assert len(chosen) == len(set(chosen))
    true = np.bincount(keys, minlength=100_000)
    hot = set(np.flatnonzero(true >= 2 * LEVELS[0]).tolist())
    assert len(hot) > 100
    assert len(hot & set(chosen[: 4 * len(hot)])) >= 0.9 * len(hot)
    assert set(chosen) <= set(np.flatnonzero(true).tolist())


def test_rows_asked_for_once_are_known_where_the_catalogue_is_no_larger_than_the_cache() -> None:
    """A cache that grows can hold them all: the refiller must know more than the hottest."""
    counts = RecentCounts(40_000, rows=50_000)
    once = np.random.default_rng(1).permutation(50_000)[:30_000]
    counts.note(once)
    chosen = everything(counts)
    assert set(chosen) <= set(once.tolist())
    assert len(chosen) > 0.85 * len(once), "few have faded meanwhile"


@pytest.mark.parametrize("rows", [4000, 1 << 20])
def test_old_heat_fades(rows: int) -> None:
    counts = RecentCounts(512, rows)
    counts.note(np.full(100, 7, np.int64))
    rng = np.random.default_rng(0)
    assert 7 in everything(counts)
    for _ in range(300):
        counts.note(rng.integers(1000, 1400, 1000))
    assert 7 not in everything(counts)


def test_memory_is_bounded() -> None:
    assert RecentCounts(10**8, rows=(1 << 30) - 2).nbytes == MAX_PLACES * 6
    assert RecentCounts(10_000, rows=80_000).nbytes == 80_000
    assert RecentCounts(1, rows=1000).nbytes % WAYS == 0


def test_a_sweep_goes_on_where_it_stopped() -> None:
    counts = RecentCounts(100, rows=300)
    counts.note(np.arange(300), 8)
    parts = [counts.sweep(40, 300)[0].tolist() for _ in range(5)]
    assert parts[0] == list(range(40))
    assert parts[4] == list(range(160, 200))
    counts.restart()
    keys, looked = counts.sweep(40, 10)
    assert keys.tolist() == list(range(10))
    assert looked == 10


@pytest.mark.parametrize("rows", [100, 100_000])
def test_weight_counts_for_several(rows: int) -> None:
    counts = RecentCounts(100, rows)
    counts.note(np.array([5], np.int64))
    counts.note(np.array([93], np.int64), 8)
    assert everything(counts) == [93, 5]
