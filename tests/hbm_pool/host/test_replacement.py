"""The TZ kernel against the rules, against LRU, and under its own invariants."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from hbm_pool.host import tz_kernel
from hbm_pool.host.replacement import (
    MAX_KEYS,
    TzCache,
    access,
    allocate,
    at,
    grow,
    stack_of,
    uses_hash_index,
)
from hbm_pool.host.tz_extents import resident
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)


def _beside(name: str) -> ModuleType:
    """A module of this folder (tests are imported by file, not as packages)."""
    full = f"hbm_pool_tests_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


PlainTz = _beside("plain_tz").PlainTz
lru_misses = _beside("lru").lru_misses

KEYS = 200
EXTENTS = 24


class AgainstTheRules(RuleBasedStateMachine):
    """Kernel and plain rules run side by side; hits and residents must be the same."""

    hash_index = False
    max_extents = EXTENTS

    @initialize(rows=st.sampled_from([1, 2, 5]), extents=st.integers(0, 12), seed=st.integers(0, 9))
    def start(self, rows: int, extents: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.cache = TzCache(KEYS, rows, max_extents=self.max_extents, hash_index=self.hash_index)
        self.plain = PlainTz(rows)
        self.free = list(range(EXTENTS))
        self._grow(extents)

    def _grow(self, count: int) -> None:
        taken, self.free = self.free[:count], self.free[count:]
        self.cache.grow(np.array(taken, np.int32))
        self.plain.grow(list(taken))

    def _released(self, extents: npt.NDArray[np.int32], expected: list[int]) -> None:
        assert extents.tolist() == expected
        self.free += expected

    @rule(count=st.integers(1, 150), skew=st.sampled_from([0.5, 1.5]))
    def access(self, count: int, skew: float) -> None:
        keys = (self.rng.pareto(skew, count) * 8).astype(np.int64) % KEYS
        hits, slots = self.cache.access_many(keys.astype(np.uint32))
        assert hits.tolist() == [self.plain.access(int(key)) for key in keys]
        rows = self.cache.rows_per_extent
        where = self.plain.resident()
        last = int(keys[-1])
        assert (slots[-1] >= 0) == (last in where)
        if last in where:
            assert divmod(int(slots[-1]), rows) == where[last]

    @rule(count=st.integers(0, 6))
    def grow(self, count: int) -> None:
        self._grow(count)

    @rule(count=st.integers(0, 8))
    def plan_shrink(self, count: int) -> None:
        assert self.cache.plan_shrink(count) == self.plain.plan_shrink(count)

    @rule(slots=st.integers(1, 40))
    def shrink_slice(self, slots: int) -> None:
        part = self.cache.shrink_slice(slots)
        self._released(part.released, self.plain.shrink_slice(slots))

    @rule()
    def cancel_shrink(self) -> None:
        assert self.cache.cancel_shrink() == self.plain.cancel_shrink()

    @rule(count=st.integers(0, 8))
    def drop(self, count: int) -> None:
        self._released(self.cache.drop(count), self.plain.drop(count))

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert self.cache.check_integrity() == []
        keys, slots = resident(self.cache.tz)
        rows = self.cache.rows_per_extent
        found = {int(k): divmod(int(s), rows) for k, s in zip(keys, slots, strict=True)}
        assert found == self.plain.resident()
        assert self.cache.num_extents + self.cache.draining_extents + len(self.free) == EXTENTS


class AgainstTheRulesHashed(AgainstTheRules):
    """The same with a hash index that has room for the whole catalogue, so that it need not forget
    ghosts."""

    hash_index = True
    max_extents = 50 * EXTENTS


_BUDGET = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAgainstTheRules = AgainstTheRules.TestCase
TestAgainstTheRules.settings = _BUDGET
TestAgainstTheRulesHashed = AgainstTheRulesHashed.TestCase
TestAgainstTheRulesHashed.settings = _BUDGET


def zipf(rng: np.random.Generator, keys: int, s: float, count: int) -> npt.NDArray[np.uint32]:
    weights = 1.0 / np.arange(1, keys + 1) ** s
    drawn = rng.choice(keys, count, p=weights / weights.sum())
    return rng.permutation(keys)[drawn].astype(np.uint32)


@pytest.mark.parametrize("s", [0.65, 0.85, 1.05])
@pytest.mark.parametrize("scan", [0.0, 0.2])
def test_misses_less_than_lru(s: float, scan: float) -> None:
    rng = np.random.default_rng([int(100 * s), int(10 * scan)])
    slots, keys, count = 2048, 8192, 120_000
    trace = zipf(rng, keys, s, count)
    once = rng.random(count) < scan
    trace[once] = keys + np.arange(int(once.sum()), dtype=np.uint32)  # never asked for again
    cache = TzCache(keys + count, 32, max_extents=slots // 32, num_extents=slots // 32)
    hits, _ = cache.access_many(trace)
    skip = count // 2
    assert np.count_nonzero(~hits[skip:]) < lru_misses(trace.tolist(), slots, skip)


def test_row_granular_cache_predicts_the_extent_granular_one() -> None:
    rng = np.random.default_rng(3)
    trace = zipf(rng, 16_000, 0.8, 200_000)
    ratios = []
    for rows in (1, 64):
        cache = TzCache(16_000, rows, max_extents=4096 // rows, num_extents=4096 // rows)
        hits, _ = cache.access_many(trace)
        ratios.append(1.0 - hits[100_000:].mean())
    assert ratios[0] == pytest.approx(ratios[1], abs=0.01)


def test_planned_shrink_keeps_hot_rows_and_a_drop_does_not() -> None:
    rng = np.random.default_rng(4)
    trace = zipf(rng, 16_000, 0.9, 300_000)
    after = {}
    for kind in ("planned", "drop"):
        cache = TzCache(16_000, 64, max_extents=64, num_extents=64)
        cache.access_many(trace[:200_000])
        # In the order of the hand, so that hot extents are among them.
        if kind == "planned":
            assert cache.plan_shrink(20) == 20
            released = []
            while cache.draining_extents:
                released += cache.shrink_slice(100).released.tolist()
        else:
            released = cache.drop(20).tolist()
        assert len(set(released)) == 20
        assert cache.num_extents == 44
        hits, _ = cache.access_many(trace[200_000:210_000])
        after[kind] = hits.mean()
    assert after["planned"] > after["drop"]


def test_last_grown_extents_are_given_up_first() -> None:
    cache = TzCache(4000, 8, max_extents=60, num_extents=40)
    cache.access_many(np.arange(400, dtype=np.uint32))
    cache.grow(np.arange(40, 50))
    given = cache.drop(9).tolist()
    assert set(given) - {0, 1, 2, 3} <= set(range(40, 50))
    assert 49 in given


def test_regrown_extent_makes_no_ghosts() -> None:
    cache = TzCache(1000, 4, max_extents=4, num_extents=4)
    cache.access_many(np.arange(100, dtype=np.uint32))
    cache.grow(np.sort(cache.drop(4)))
    before = cache.counters().ghost_hits
    cache.access_many(np.arange(80, 100, dtype=np.uint32))
    assert cache.counters().ghost_hits == before


def test_batch_goes_round_the_ring_once() -> None:
    cache = TzCache(10_000, 8, max_extents=20, num_extents=20)
    cache.insert_many(np.arange(160, dtype=np.int64))  # fills main, then the ring
    batch = np.arange(1000, 1100, dtype=np.int64)
    placed = cache.insert_many(batch)
    assert np.count_nonzero(placed.slots >= 0) == 16  # two probation extents
    assert cache.counters().conflicts == 84
    assert np.unique(placed.slots[placed.slots >= 0]).size == 16
    assert cache.check_integrity() == []


@given(seed=st.integers(0, 1000), batches=st.integers(1, 12), size=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_copies_and_writes_of_a_batch_reproduce_the_rows(
    seed: int, batches: int, size: int
) -> None:
    """Moves the bytes as a caller would and looks whether every slot holds its row."""
    rng = np.random.default_rng(seed)
    cache = TzCache(300, 3, max_extents=12, num_extents=int(rng.integers(0, 12)))
    arena = np.full(36, -1, np.int64)
    for _ in range(batches):
        keys = rng.choice(300, size=min(size, 300), replace=False).astype(np.int64)
        slots = cache.lookup_many(keys)
        assert (arena[slots[slots >= 0]] == keys[slots >= 0]).all()
        missed = keys[slots < 0]
        placed = cache.insert_many(missed)
        arena[placed.targets] = arena[placed.sources]
        written = placed.slots >= 0
        arena[placed.slots[written]] = missed[written]
        if rng.random() < 0.3:
            cache.plan_shrink(int(rng.integers(0, 4)))
            part = cache.shrink_slice(int(rng.integers(1, 20)))
            arena[part.targets] = arena[part.sources]
        held, where = resident(cache.tz)
        assert (arena[where] == held).all()
        assert cache.check_integrity() == []


def test_hash_index_forgets_the_dead_and_never_the_resident() -> None:
    """A catalogue 500 times the slots: the index is always full of stale entries."""
    cache = TzCache(200_000, 8, max_extents=50, num_extents=50, hash_index=True)
    direct = TzCache(200_000, 8, max_extents=50, num_extents=50, hash_index=False)
    rng = np.random.default_rng(8)
    trace = np.concatenate(
        [rng.integers(0, 200_000, 100_000), rng.integers(0, 300, 100_000)]
    ).astype(np.uint32)
    rng.shuffle(trace)
    hits, _ = cache.access_many(trace)
    expected, _ = direct.access_many(trace)
    assert cache.check_integrity() == []
    assert hits.mean() == pytest.approx(expected.mean(), abs=0.01)
    assert cache.tz.entries.nbytes + cache.tz.hashed.nbytes <= 21 * 400 + 16 * 64


def test_hash_index_conflicts_are_misses_without_a_place() -> None:
    cache = TzCache(1 << 20, 1024, max_extents=1, num_extents=1, hash_index=True)
    # More keys of one hash window than it holds.
    size = cache.tz.hashed.size
    keys = np.arange(1 << 20, dtype=np.int64)
    home = ((keys * 0x9E3779B1 & 0xFFFFFFFF) * size) >> 32
    crowd = keys[home == 5][: 4 * tz_kernel.HASH_WINDOW]
    placed = cache.insert_many(crowd)
    assert np.count_nonzero(placed.slots >= 0) == tz_kernel.HASH_WINDOW
    assert cache.counters().conflicts == crowd.size - tz_kernel.HASH_WINDOW
    assert (cache.lookup_many(crowd[placed.slots >= 0]) >= 0).all()


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="30 bits"):
        TzCache(MAX_KEYS + 1, max_extents=1)
    with pytest.raises(ValueError, match="max_extents is 0"):
        TzCache(10, max_extents=0)
    with pytest.raises(ValueError, match="rows_per_extent"):
        TzCache(10, 0, max_extents=1)


def test_keys_and_extents_outside_are_refused() -> None:
    cache = TzCache(10, 2, max_extents=4, num_extents=2)
    with pytest.raises(ValueError, match="row 10 is outside"):
        cache.access_many(np.array([3, 10], np.uint32))
    with pytest.raises(ValueError, match="row -1 is outside"):
        cache.lookup_many(np.array([-1], np.int64))
    with pytest.raises(ValueError, match="extent 1 is held already"):
        cache.grow(np.array([1]))
    with pytest.raises(ValueError, match="does not exist; they are 0"):
        cache.grow(np.array([4]))
    with pytest.raises(ValueError, match="cannot give up -1"):
        cache.plan_shrink(-1)


def test_index_is_chosen_by_memory() -> None:
    assert not uses_hash_index(10_000_000, 40_000, 2048)
    assert uses_hash_index(1_000_000_000, 1000, 2048)


def test_empty_cache_misses_and_keeps_nothing() -> None:
    cache = TzCache(10, 2, max_extents=4)
    hits, slots = cache.access_many(np.array([1, 1, 1], np.uint32))
    assert not hits.any()
    assert (slots == -1).all()
    assert cache.counters().conflicts == 3
    assert cache.plan_shrink(3) == 0
    assert cache.drop(3).size == 0


def test_stacked_caches_are_independent() -> None:
    caches = []
    for extents in (2, 5):
        tz = allocate(50, 8, 1)
        grow(tz, np.arange(extents, dtype=np.int32))
        caches.append(tz)
    both = stack_of(caches)
    for key in [1, 2, 3, 4, 2]:
        access(at(both, 0), key)
        access(at(both, 1), key)
    assert both.state[0, tz_kernel.HITS] == 0  # the ring of one slot has moved on
    assert both.state[1, tz_kernel.HITS] == 1
