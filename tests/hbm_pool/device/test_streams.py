"""Fences on CUDA: nothing is reused while a stream still has work queued on it."""

from __future__ import annotations

import pytest
import torch
from hbm_pool import ExtentLedger
from hbm_pool.device.streams import StreamClock
from hbm_pool.host.extents import Owner
from hbm_pool.host.fences import Lane

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

LONG_CYCLES = 400_000_000


def test_extents_wait_for_the_host_and_then_for_the_stream() -> None:
    clock = StreamClock(torch.device("cuda", 0))
    ledger = ExtentLedger(4)
    taken = ledger.take(Owner.EMB, 4)
    side = torch.cuda.Stream()
    span = clock.begin(Lane.EMB)
    ledger.give_back(taken, clock.fence(Lane.EMB))
    assert ledger.reap() == 0
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG_CYCLES)
        clock.end(Lane.EMB, span)
    # The span has ended on the host, its kernel still runs.
    assert ledger.reap() == 0
    side.synchronize()
    assert ledger.reap() == 4


def test_a_fence_covers_all_streams_of_its_lane_and_no_other() -> None:
    clock = StreamClock(torch.device("cuda", 0))
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in (first, second):
        with torch.cuda.stream(stream):
            clock.end(Lane.EMB, clock.begin(Lane.EMB))
    with torch.cuda.stream(second):
        torch.cuda._sleep(LONG_CYCLES)
    fence = clock.fence(Lane.EMB)
    assert not fence.done()
    assert clock.fence(Lane.KV).done()
    second.synchronize()
    assert fence.done()


def test_a_second_stream_of_the_kv_lane_comes_after_the_first() -> None:
    clock = StreamClock(torch.device("cuda", 0))
    page = torch.zeros(1, device="cuda")
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        clock.order(Lane.KV)
        torch.cuda._sleep(LONG_CYCLES)
        page.fill_(1.0)
    with torch.cuda.stream(second):
        clock.order(Lane.KV)
        page.mul_(2.0)
    second.synchronize()
    assert page.item() == 2.0
