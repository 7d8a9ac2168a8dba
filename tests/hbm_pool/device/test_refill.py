"""The refiller: what it copies, when it yields, and that it ends. Steps run on a test's clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hbm_pool.device.refill import BURST_S, COPY_BYTES, FAULT_S, LOOK_S, YIELD_S, Refiller
from hbm_pool.host.config import TableSpec
from hbm_pool.host.link import LinkModel

from tests.hbm_pool.device.emb_world import EmbWorld

DEADLINE_S = 60.0
ROW_BYTES = 64


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Ticking(Clock):
    """Goes on a little with every look, so that spinning ends."""

    def __call__(self) -> float:
        self.now_s += 1e-6
        return self.now_s


def hot_world(seed: int = 0, hot: int = 200, **options: Any) -> Any:
    """A world in which rows 0..hot-1 were asked for often and found little room."""
    world = EmbWorld(seed, tables=(TableSpec("item", 1500, 16),), **options)
    world.grow(2)
    for _ in range(4):
        world.gather_and_check({"item": torch.arange(hot)})
    return world


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, "did not happen in time"
        time.sleep(0.001)


def test_fills_won_extents_with_hot_rows_and_evicts_nothing() -> None:
    world = hot_world()
    clock = Clock()
    refiller = Refiller(world.cache, 1e9, clock_s=clock)
    assert refiller.step() == LOOK_S  # nothing was won yet
    world.grow(10)
    resident = set(world.cache.resident_ids("item").tolist())
    evicted = world.cache.counters().evictions
    waits = []
    for _ in range(20):
        clock.now_s += 1.0
        waits.append(refiller.step())
        world.check()
    assert 0.0 in waits
    assert waits[-1] == LOOK_S
    now = set(world.cache.resident_ids("item").tolist())
    assert resident <= now
    assert len(now & set(range(200))) >= 180  # the counts are a sketch
    counters = refiller.counters()
    assert counters.rows == len(now) - len(resident)
    assert counters.bytes == counters.rows * ROW_BYTES
    assert counters.critical_copies == counters.faults == counters.backlog_rows == 0
    assert world.cache.counters().evictions == evicted


def test_hottest_rows_are_first() -> None:
    world = hot_world(hot=300)
    for _ in range(10):
        world.gather_and_check({"item": torch.arange(250, 300)})
    # Everything leaves the cache, the counts stay.
    world.give_back(world.cache.drop(100))
    world.grow(3)
    number, keys = world.cache.refill_candidates(50)[0]
    assert number == 0
    assert np.count_nonzero(keys >= 250) >= 40


def test_budget_is_kept() -> None:
    world = hot_world()
    world.grow(20)
    clock = Clock()
    rate = 20 * ROW_BYTES / BURST_S  # the bucket holds 20 rows
    refiller = Refiller(world.cache, rate, clock_s=clock)
    assert refiller.step() > 0.0  # the bucket starts empty
    for _ in range(3000):
        clock.now_s += 0.001
        while refiller.step() == 0.0:
            pass
        spent = refiller.counters().bytes
        # A copy larger than the bucket leaves it in debt, never more than one copy.
        assert spent <= rate * (clock.now_s + BURST_S) + COPY_BYTES
    assert refiller.counters().rows > 0


def test_rests_without_a_rate() -> None:
    world = hot_world()
    world.grow(20)
    clock = Clock()
    refiller = Refiller(world.cache, 0.0, clock_s=clock)
    clock.now_s += 100.0
    assert refiller.step() == LOOK_S
    assert refiller.counters().copies == 0
    refiller.set_rate(1e9)
    clock.now_s += 1.0
    assert refiller.step() == 0.0


def test_yields_to_requests_and_to_the_other_direction() -> None:
    clock = Ticking()
    during_sleep: list[Callable[[], None]] = []

    def sleep(seconds: float) -> None:
        for act in during_sleep:
            act()
        clock.now_s += seconds + 1e-3

    link = LinkModel(1e9, clock_s=clock, sleep_s=sleep)
    world = hot_world(1, link=link)
    world.grow(20)
    refiller = Refiller(world.cache, 1e9, clock_s=clock)
    clock.now_s += 1.0
    with link.fetching():
        assert refiller.step() == YIELD_S
    waits: list[float] = []
    during_sleep.append(lambda: waits.append(refiller.step()))
    link.device_to_host(1 << 20)
    link.foreground(1 << 20)
    during_sleep.clear()
    assert waits == [YIELD_S, YIELD_S]
    assert refiller.counters().yields == 3
    assert refiller.counters().copies == 0
    assert refiller.step() == 0.0


def test_yields_from_the_first_look_of_a_request_to_its_last_row() -> None:
    """While a request reads its missed rows, the link it will need stays free."""
    clock = Clock()
    world = hot_world(1)
    world.grow(20)
    refiller = Refiller(world.cache, 1e9, clock_s=clock)
    clock.now_s += 1.0
    waits: list[float] = []
    store = world.stores["item"]
    read = store.read

    def read_beside(ids: Any, out: Any) -> None:
        store.read = read
        waits.append(refiller.step())
        read(ids, out)

    store.read = read_beside
    world.gather_and_check({"item": torch.arange(1000, 1010)})
    assert waits == [YIELD_S]
    assert refiller.step() == 0.0


def test_fault_of_the_store_is_counted_and_survived() -> None:
    world = hot_world()
    world.grow(10)
    clock = Clock()
    refiller = Refiller(world.cache, 1e9, clock_s=clock)
    clock.now_s += 1.0
    world.stores["item"].fail_reads = True
    assert refiller.step() == FAULT_S
    world.stores["item"].fail_reads = False
    world.check()
    assert refiller.counters().faults == 1
    assert refiller.step() == 0.0
    world.check()


def test_thread_fills_stops_starts_and_closes() -> None:
    world = hot_world()
    refiller = Refiller(world.cache, 1e9)
    before = threading.active_count()
    refiller.start()
    refiller.start()
    assert threading.active_count() == before + 1
    world.grow(10)
    refiller.wake()
    wait_until(lambda: len(set(range(200)) & set(world.cache.resident_ids("item").tolist())) >= 180)
    refiller.stop()
    refiller.stop()
    assert threading.active_count() == before
    world.grow(1)
    refiller.start()
    refiller.close()
    refiller.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        refiller.start()
    world.check()


def test_closes_while_it_waits_for_its_budget() -> None:
    world = hot_world()
    world.grow(10)
    refiller = Refiller(world.cache, 1e-3)  # the first copy would be allowed in hours
    refiller.start()
    wait_until(lambda: refiller.backlog > 0)
    refiller.close()
    assert refiller.counters().copies == 0


def test_few_copies_are_on_the_critical_path() -> None:
    """Requests that miss all the time beside a refill on the same modelled link."""
    link = LinkModel(200e6)
    world = EmbWorld(5, tables=(TableSpec("item", 1500, 16),), link=link)
    world.grow(2)
    for _ in range(4):
        world.gather_and_check({"item": torch.arange(1000)})
    refiller = Refiller(world.cache, 4e6)
    refiller.start()
    try:
        end_s = time.monotonic() + DEADLINE_S
        while refiller.counters().rows < 300:
            assert time.monotonic() < end_s
            if world.free:
                world.grow(1)
            world.gather_and_check({"item": world.draw("item", 20, 0.3)}, beside_refill=True)
    finally:
        refiller.close()
    counters = link.counters()
    assert counters.refill_copies > 0
    assert counters.critical_refill_copies <= counters.refill_copies
    world.check()


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_impossible_rates_are_refused(rate: float) -> None:
    world = EmbWorld()
    with pytest.raises(ValueError, match="refill_bytes_per_s"):
        Refiller(world.cache, rate)
