"""Gathers, pushes and moves at the same time, and what is locked meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hbm_pool.errors import RowStoreError
from hbm_pool.host.config import TableSpec
from hbm_pool.host.fences import EpochClock, Lane

from tests.hbm_pool.device.emb_world import EmbWorld

DEADLINE_S = 60.0


def test_lock_is_free_while_a_store_is_read() -> None:
    """A gather of resident rows, growth and a drop go on while another gather waits for its
    store."""
    world = EmbWorld(13)
    world.grow(20)
    world.gather_and_check({"item": torch.arange(30)})
    entered, leave = threading.Event(), threading.Event()
    plain_read = world.stores["item"].read

    def slow_read(ids: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        entered.set()
        assert leave.wait(DEADLINE_S)
        plain_read(ids, out)

    world.stores["item"].read = slow_read
    out = torch.empty(1, 16)
    waiting = threading.Thread(
        target=world.cache.gather, args=({"item": torch.tensor([900])}, {"item": out})
    )
    waiting.start()
    assert entered.wait(DEADLINE_S)
    assert world.gather_and_check({"item": torch.arange(30)}).misses == 0
    world.grow(5)
    world.give_back(world.cache.drop(22))
    world.cache.plan_shrink(1)
    world.give_back(world.cache.shrink_step(1e6))
    leave.set()
    waiting.join(DEADLINE_S)
    assert not waiting.is_alive()
    assert torch.equal(out[0], world.values["item"][900])
    world.stores["item"].read = plain_read
    world.check()


def test_push_beside_a_read_is_taken_over() -> None:
    """The store is read before the push and the row inserted after it: the new value counts."""
    world = EmbWorld(14)
    world.grow(20)
    plain_read = world.stores["item"].read

    def read_then_push(ids: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        plain_read(ids, out)
        world.stores["item"].read = plain_read
        world.cache.push_rows("item", np.array([900]), torch.full((1, 16), 33.0))

    world.stores["item"].read = read_then_push
    out = torch.empty(2, 16)
    world.cache.gather({"item": torch.tensor([901, 900])}, {"item": out})
    assert (out[1] == 33.0).all()
    assert torch.equal(out[0], world.values["item"][901])
    world.values["item"][900] = 33.0
    world.check()
    world.gather_and_check({"item": torch.tensor([900, 901])})


def test_failed_push_beside_a_read_is_read_again() -> None:
    world = EmbWorld(15)
    world.grow(20)
    plain_read = world.stores["item"].read

    def read_then_fail(ids: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        plain_read(ids, out)
        world.stores["item"].read = plain_read
        world.stores["item"].fail_writes = True
        with pytest.raises(RowStoreError):
            world.cache.push_rows("item", np.array([900, 901]), torch.full((2, 16), 33.0))
        world.stores["item"].fail_writes = False

    world.stores["item"].read = read_then_fail
    out = torch.empty(2, 16)
    world.cache.gather({"item": torch.tensor([901, 900])}, {"item": out})
    world.values["item"][900] = 33.0  # the half that got through
    assert torch.equal(out, world.values["item"][[901, 900]])
    world.check()


def test_spans_cover_what_reads_extents() -> None:
    clock = EpochClock()
    world = EmbWorld(16, clock=clock)
    world.grow(20)
    seen: list[int] = []
    plain_read = world.stores["item"].read

    def look(ids: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        seen.append(clock.open_spans(Lane.EMB))
        plain_read(ids, out)

    world.stores["item"].read = look
    world.gather_and_check({"item": torch.arange(5)})
    world.stores["item"].fail_reads = True
    with pytest.raises(RowStoreError):
        world.cache.gather({"item": torch.tensor([99])}, {"item": torch.empty(1, 16)})
    assert seen
    assert min(seen) == 1
    assert clock.open_spans(Lane.EMB) == 0


def test_many_threads(index: str) -> None:
    """Gathers, pushes, moves and refill at once. Every row of a gather is whole and never older
    than the newest value whose push had returned before the gather began."""
    rows, width = 400, 16
    world = EmbWorld(17, index=index, tables=(TableSpec("item", rows, width),))
    # A row's value is its version, in every column; version v is only ever followed by v + 1.
    start = torch.zeros(rows, width)
    world.cache.push_rows("item", torch.arange(rows), start)
    world.grow(20)
    published = np.zeros(rows, np.int64)  # newest version whose push has returned
    stop = threading.Event()
    errors: list[BaseException] = []
    rounds = 600 if index == "host" else 150

    def guarded(work: Any) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)
                stop.set()

        return threading.Thread(target=run)

    def gather(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(rounds):
            if stop.is_set():
                return
            ids = (rng.pareto(0.8, 150) * 20).astype(np.int64) % rows
            floor = published[ids].copy()
            out = torch.empty(150, width)
            world.cache.gather({"item": torch.from_numpy(ids)}, {"item": out})
            found = out.numpy()
            assert (found == found[:, :1]).all(), "half a row"
            assert (found[:, 0] >= floor).all(), "a stale row"

    def push() -> None:
        rng = np.random.default_rng(99)
        version = 0
        while not stop.is_set():
            version += 1
            ids = np.unique(rng.integers(0, rows, 30))
            world.cache.push_rows("item", ids, torch.full((ids.size, width), float(version)))
            published[ids] = version

    def move() -> None:
        rng = np.random.default_rng(98)
        while not stop.is_set():
            choice = int(rng.integers(0, 5))
            if choice == 0:
                world.grow(min(4, len(world.free)))
            elif choice == 1:
                world.cache.plan_shrink(4)
            elif choice == 2:
                world.give_back(world.cache.drop(2))
            else:
                world.give_back(world.cache.shrink_step(300.0))

    def refill() -> None:
        while not stop.is_set():
            for number, keys in world.cache.refill_candidates(50):
                world.cache.refill(number, keys)

    gathers = [guarded(lambda seed=seed: gather(seed)) for seed in range(3)]
    others = [guarded(work) for work in (push, move, refill)]
    for thread in gathers + others:
        thread.start()
    for thread in gathers:
        thread.join(DEADLINE_S)
    stop.set()
    for thread in others:
        thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in gathers + others)
    assert not errors, errors
    world.values["item"] = torch.from_numpy(published.astype(np.float32))[:, None].expand(-1, width)
    world.cache.cancel_shrink()
    world.check()
