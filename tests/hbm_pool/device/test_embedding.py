"""The embedding cache: whatever happens, the rows of a gather are those of the tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hbm_pool.errors import RowStoreError
from hbm_pool.host.config import TableSpec
from hbm_pool.host.link import LinkModel

from tests.hbm_pool.device.emb_world import EmbWorld


def test_hot_rows_stay(index: str) -> None:
    world = EmbWorld(1, index=index)
    world.grow(30)
    for _ in range(60):
        world.gather_and_check(world.batch(100))
    stats = [world.gather_and_check(world.batch(100)) for _ in range(20)]
    assert sum(s.misses for s in stats) < 0.2 * sum(s.accesses for s in stats)
    counters = world.cache.counters()
    assert counters.hits + counters.misses == counters.accesses
    assert counters.evictions > 0
    assert counters.ghost_hits > 0
    assert len(counters.classes) == 3


def test_both_indices_miss_alike() -> None:
    misses = {}
    for index in ("host", "device"):
        world = EmbWorld(2, index=index)
        world.grow(25)
        misses[index] = sum(world.gather_and_check(world.batch(80)).misses for _ in range(150))
    assert misses["device"] == pytest.approx(misses["host"], rel=0.1)


def test_repeated_rows_are_fetched_once(index: str) -> None:
    world = EmbWorld(3, index=index)
    world.grow(30)
    stats = world.gather_and_check({"item": torch.tensor([5, 9, 5, 5, 9])})
    assert (stats.accesses, stats.unique, stats.misses, stats.hits) == (5, 2, 2, 3)
    assert stats.bytes == 2 * 64
    assert stats.class_misses == (2, 0, 0)
    assert world.gather_and_check({"item": torch.tensor([9, 5])}).misses == 0


def test_without_extents_every_row_is_a_conflict(index: str) -> None:
    world = EmbWorld(4, index=index)
    ids = {"item": torch.tensor([1, 2, 3])}
    assert world.gather_and_check(ids).misses == 3
    assert world.gather_and_check(ids).misses == 3
    world.gather_and_check(ids)
    assert world.cache.counters().conflict_misses >= 6


def test_fault_is_that_batch_s_alone(index: str) -> None:
    world = EmbWorld(5, index=index)
    world.grow(30)
    world.gather_and_check({"item": torch.arange(50)})
    world.stores["item"].fail_reads = True
    hits = {"item": torch.arange(50)}
    world.gather_and_check(hits)
    with pytest.raises(RowStoreError, match="table 'item': 1 rows could not be read"):
        world.cache.gather({"item": torch.tensor([3, 700])}, {"item": torch.empty(2, 16)})
    world.stores["item"].fail_reads = False
    world.check()
    assert world.gather_and_check({"item": torch.tensor([3, 700])}).misses == 1


def test_planned_shrink_keeps_what_is_referenced(index: str) -> None:
    world = EmbWorld(6, index=index, tables=(TableSpec("item", 1500, 16),))
    world.grow(30)
    hot = torch.arange(700, 800)  # in extents that are given up
    world.gather_and_check({"item": torch.arange(900)})
    for _ in range(3):
        world.gather_and_check({"item": hot})
    assert world.cache.plan_shrink(20) == 20
    while world.cache.num_extents > 10:
        world.give_back(world.cache.shrink_step(50.0))
        world.check()
    assert world.gather_and_check({"item": hot}).misses == 0
    assert world.cache.counters().relocated_rows > 0


def test_shrink_stops_when_its_budget_is_spent(index: str) -> None:
    """A slice that took longer than the whole budget is the last one; what is left is still
    promised, and still hits."""
    now_s = 0.0
    slice_s = 2.0

    def clock_s() -> float:
        nonlocal now_s
        now_s += slice_s
        return now_s

    world = EmbWorld(25, index=index, tables=(TableSpec("item", 1500, 16),), clock_s=clock_s)
    world.grow(30)
    ids = {"item": torch.arange(900)}
    for _ in range(2):
        world.gather_and_check(ids)
    assert world.cache.plan_shrink(20) == 20
    released = world.cache.shrink_step(1e6)
    world.give_back(released)
    world.check()
    assert 0 < released.size < 20
    world.gather_and_check(ids)
    slice_s = 1e-4
    world.give_back(world.cache.shrink_step(1e6))
    assert world.cache.num_extents == 10
    world.check()


def test_rows_in_extents_being_emptied_are_pushed_too(index: str) -> None:
    world = EmbWorld(23, index=index, tables=(TableSpec("item", 1500, 16),))
    world.grow(10)
    ids = torch.arange(50)
    world.gather_and_check({"item": ids})
    assert world.cache.plan_shrink(10) == 10
    world.values["item"][:50] = 7.0
    world.cache.push_rows("item", ids, torch.full((50, 16), 7.0))
    assert world.gather_and_check({"item": ids}).misses == 0


def test_ghosts_and_promotions_beside_unused_slots(index: str) -> None:
    """Batches that use the last unused slots up and need holes of main as well."""
    world = EmbWorld(24, index=index, tables=(TableSpec("item", 1500, 16),))
    world.grow(5)
    for step in range(120):
        world.gather_and_check({"item": world.draw("item", 60, 0.5)})
        if step % 5 == 0 and world.free:
            world.grow(1)
        if step % 7 == 0:
            world.give_back(world.cache.drop(1))
        world.check()


def test_extents_on_their_way_to_another_class_can_be_given_up() -> None:
    world = EmbWorld(7)
    world.grow(40)
    # All the demand is on one class, so that the others have too much.
    for _ in range(80):
        world.gather_and_check({"text": world.draw("text", 200, 0.3)})
    before = world.cache.class_extents()
    for _ in range(200):
        world.cache.rebalance(200.0)
        world.check()
    after = world.cache.class_extents()
    assert after[1] > before[1]
    assert sum(after) == 40
    world.cache.set_row_prices([1000.0, 1e-6, 1e-6])
    world.gather_and_check({"item": world.draw("item", 200, 0.3)})
    world.cache.rebalance(0.0)
    assert world.cache.plan_shrink(15) == 15
    released = [world.cache.shrink_step(1e6)]
    world.give_back(np.concatenate(released))
    assert world.cache.num_extents == 25
    world.check()


def test_prefetched_rows_hit(index: str) -> None:
    world = EmbWorld(8, index=index)
    world.grow(30)
    ids = {"item": torch.arange(40), "text": torch.arange(10)}
    assert world.cache.prefetch(ids) == 50
    assert world.cache.prefetch(ids) == 0
    assert world.gather_and_check(ids).misses == 0


def test_refill_brings_the_hottest_rows_into_won_extents(index: str) -> None:
    world = EmbWorld(9, index=index, tables=(TableSpec("item", 1500, 16),))
    world.grow(4)
    hot = torch.arange(300)
    for _ in range(4):
        world.gather_and_check({"item": hot})
    assert world.cache.refill_candidates(1000) == []
    world.grow(20)
    candidates = world.cache.refill_candidates(1000)
    assert [number for number, _ in candidates] == [0]
    keys = candidates[0][1]
    assert set(keys.tolist()) <= set(range(300))
    kept = world.cache.refill(0, keys)
    assert kept == keys.size
    world.check()
    assert world.gather_and_check({"item": torch.from_numpy(np.sort(keys))}).misses == 0


def test_refill_stops_when_no_slot_is_unused(index: str) -> None:
    world = EmbWorld(10, index=index, tables=(TableSpec("item", 1500, 16),))
    world.grow(3)
    free = world.cache.free_slots()
    assert free > 0
    resident = world.cache.resident_ids("item").size
    assert world.cache.refill(0, np.arange(1000, dtype=np.int64)) == free
    assert world.cache.resident_ids("item").size == resident + free
    assert world.cache.refill(0, np.arange(1000, 1100, dtype=np.int64)) == 0
    world.check()


def test_shard_rows_count_every_resident_row(index: str) -> None:
    world = EmbWorld(11, index=index)
    world.grow(30)
    world.gather_and_check(world.batch(200))
    shards = world.cache.shard_rows(16)
    resident = sum(world.cache.resident_ids(name).size for name in world.values)
    assert shards.dtype == np.uint32
    assert int(shards.sum()) == resident > 0


def test_link_is_charged_for_pushed_rows_that_are_resident() -> None:
    link = LinkModel(None)
    world = EmbWorld(3, link=link)
    world.grow(20)
    world.gather_and_check({"text": torch.arange(10)})
    values = torch.zeros((20, 64), dtype=torch.bfloat16)
    world.cache.push_rows("text", torch.arange(20), values)
    assert link.counters().push_bytes == 10 * 128


def test_link_is_charged_for_misses_alone() -> None:
    link = LinkModel(None)
    world = EmbWorld(12, link=link)
    world.grow(30)
    stats = world.gather_and_check({"item": torch.arange(20)})
    assert link.counters().foreground_bytes == stats.bytes == 20 * 64
    world.gather_and_check({"item": torch.arange(20)})
    assert link.counters().foreground_bytes == 20 * 64
    world.grow(5)
    world.cache.refill(0, np.arange(100, 110, dtype=np.int64))
    assert link.counters().refill_bytes == 10 * 64
