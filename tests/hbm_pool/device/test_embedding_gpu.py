"""The embedding cache on CUDA: streams, events and page-locked copies."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from hbm_pool.device.refill import Refiller
from hbm_pool.device.streams import StreamClock
from hbm_pool.errors import RowStoreError
from hbm_pool.host.config import TableSpec
from hbm_pool.host.fences import Lane

from tests.hbm_pool.device.emb_world import EmbWorld

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEADLINE_S = 60.0


@pytest.fixture(params=["host", "device"])
def index(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def world(index: str) -> Any:
    made = EmbWorld(1, index=index, device="cuda")
    made.grow(30)
    return made


def test_rows_are_those_of_the_tables_through_moves_and_pushes(world: Any) -> None:
    for step in range(120):
        world.gather_and_check(world.batch(100, 0.6))
        if step % 10 == 3:
            world.cache.plan_shrink(4)
        world.give_back(world.cache.shrink_step(200.0))
        if step % 10 == 7:
            world.give_back(world.cache.drop(2))
            world.grow(min(8, len(world.free)))
        ids = world.draw("item", 20)
        new = torch.full((20, 16), float(step))
        world.cache.push_rows("item", ids, new)
        world.values["item"][ids] = float(step)
        if step % 20 == 0:
            world.check()
    world.check()
    assert world.cache.counters().evictions > 0


def test_ids_may_lie_on_the_gpu(world: Any) -> None:
    ids = world.draw("text", 200)
    out = world.buffers({"text": ids})
    world.cache.gather({"text": ids.cuda()}, out)
    assert torch.equal(out["text"].cpu(), world.values["text"][ids])


def test_gathers_on_several_streams(world: Any) -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]
    waiting = []
    for step in range(60):
        with torch.cuda.stream(streams[step % 3]):
            ids = world.batch(80, 0.5)
            out = world.buffers(ids)
            world.cache.gather(ids, out)
            waiting.append((ids, out))
    torch.cuda.synchronize()
    for ids, out in waiting:
        for name, wanted in ids.items():
            assert torch.equal(out[name].cpu(), world.values[name][wanted])
    world.check()


def test_slots_are_not_reused_while_a_stream_is_behind(world: Any) -> None:
    """A gather queued behind long work reads its slots late; what is inserted meanwhile on another
    stream must wait for it."""
    slow, fast = torch.cuda.Stream(), torch.cuda.Stream()
    hot = {"item": torch.arange(200)}
    world.gather_and_check(hot)
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(slow):
        for _ in range(50):
            busy = busy @ busy / busy.norm()
        out = torch.empty(200, 16, device="cuda")
        world.cache.gather(hot, {"item": out})
    with torch.cuda.stream(fast):
        for start in range(200, 1400, 200):
            ids = {"item": torch.arange(start, start + 200)}
            world.cache.gather(ids, {"item": torch.empty(200, 16, device="cuda")})
    torch.cuda.synchronize()
    assert torch.equal(out.cpu(), world.values["item"][:200])
    world.check()


def test_fence_waits_for_the_stream_that_reads(index: str) -> None:
    clock = StreamClock(torch.device("cuda", torch.cuda.current_device()))
    world = EmbWorld(2, index=index, device="cuda", clock=clock)
    world.grow(30)
    world.gather_and_check({"item": torch.arange(200)})
    stream = torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(200):
            busy = busy @ busy / busy.norm()
        world.cache.gather(
            {"item": torch.arange(200)}, {"item": torch.empty(200, 16, device="cuda")}
        )
    world.cache.drop(5)
    fence = clock.fence(Lane.EMB)
    late = not stream.query()
    assert fence.done() is not late or stream.query()
    torch.cuda.synchronize()
    assert fence.done()


def test_faults_leave_the_cache_as_it_was(world: Any) -> None:
    world.gather_and_check({"item": torch.arange(50)})
    world.stores["item"].fail_reads = True
    with pytest.raises(RowStoreError, match="the disk is gone"):
        world.cache.gather(
            {"item": torch.tensor([3, 700])}, {"item": torch.empty(2, 16, device="cuda")}
        )
    world.stores["item"].fail_reads = False
    world.check()
    world.gather_and_check({"item": torch.tensor([3, 700])})


def test_refiller_on_its_own_stream(index: str) -> None:
    world = EmbWorld(3, index=index, device="cuda", tables=(TableSpec("item", 1500, 16),))
    world.grow(4)
    hot = {"item": torch.arange(300)}
    for _ in range(6):
        world.gather_and_check(hot)
    refiller = Refiller(world.cache, 1e9)
    refiller.start()
    try:
        world.grow(25)
        refiller.wake()
        end_s = time.monotonic() + DEADLINE_S
        while refiller.counters().rows < 100:
            assert time.monotonic() < end_s
            world.gather_and_check({"item": world.draw("item", 5)})
    finally:
        refiller.close()
    world.check()


def test_many_threads_on_streams_of_their_own(index: str) -> None:
    world = EmbWorld(4, index=index, device="cuda", tables=(TableSpec("item", 800, 16),))
    world.grow(20)
    stop = threading.Event()
    errors: list[BaseException] = []

    def gather(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(100):
                    ids = torch.from_numpy((rng.pareto(0.8, 150) * 20).astype(np.int64) % 800)
                    out = torch.empty(150, 16, device="cuda")
                    world.cache.gather({"item": ids}, {"item": out})
                    assert torch.equal(out.cpu(), world.values["item"][ids])
        except BaseException as error:
            errors.append(error)

    def move() -> None:
        try:
            while not stop.is_set():
                world.cache.plan_shrink(3)
                world.give_back(world.cache.shrink_step(300.0))
                world.give_back(world.cache.drop(1))
                torch.cuda.synchronize()  # nobody reads what was given up
                world.grow(min(4, len(world.free)))
        except BaseException as error:
            errors.append(error)

    gathers = [threading.Thread(target=gather, args=(seed,)) for seed in range(3)]
    mover = threading.Thread(target=move)
    for thread in [*gathers, mover]:
        thread.start()
    for thread in gathers:
        thread.join(DEADLINE_S)
    stop.set()
    mover.join(DEADLINE_S)
    assert not errors, errors
    world.cache.cancel_shrink()
    world.check()
