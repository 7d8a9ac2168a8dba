"""The queue of keys: each once, never twice at a time, failures again with back-off."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from hbm_operator.controller.queue import LAST_RETRY_S, Key, KeyQueue, Kind

A, B = Key(Kind.PARTITION, "ns", "a"), Key(Kind.PARTITION, "ns", "b")


@asynccontextmanager
async def running(
    work: Callable[[Key], Awaitable[float | None]], concurrency: int = 4
) -> AsyncIterator[tuple[KeyQueue, list[tuple[Key, Exception]]]]:
    errors: list[tuple[Key, Exception]] = []
    queue = KeyQueue(
        work,
        concurrency=concurrency,
        chance=random.Random(1),
        on_error=lambda key, error: errors.append((key, error)),
    )
    task = asyncio.create_task(queue.run())
    try:
        yield queue, errors
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_many_events_about_one_object_are_one_piece_of_work() -> None:
    seen: Counter[Key] = Counter()
    done = asyncio.Event()

    async def work(key: Key) -> None:
        seen[key] += 1
        if seen.keys() == {A, B}:
            done.set()

    async with running(work) as (queue, _):
        for _ in range(100):
            queue.add(A)
        queue.add(B)
        await done.wait()
    assert seen == {A: 1, B: 1}


async def test_a_key_named_while_in_work_is_looked_at_once_more_and_never_at_the_same_time() -> (
    None
):
    at_once = most = runs = 0
    begun, go_on, second = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work(_: Key) -> None:
        nonlocal at_once, most, runs
        at_once, runs = at_once + 1, runs + 1
        most = max(most, at_once)
        begun.set()
        await go_on.wait()
        at_once -= 1
        if runs == 2:
            second.set()

    async with running(work) as (queue, _):
        queue.add(A)
        await begun.wait()
        for _ in range(10):
            queue.add(A)
        assert queue.depth() == 1
        go_on.set()
        await second.wait()
    assert (most, runs) == (1, 2)


async def test_no_more_keys_are_in_work_than_allowed() -> None:
    at_once = most = left = 0
    finished = asyncio.Event()

    async def work(_: Key) -> None:
        nonlocal at_once, most, left
        at_once += 1
        most = max(most, at_once)
        for _ in range(3):
            await asyncio.sleep(0)
        at_once, left = at_once - 1, left - 1
        if not left:
            finished.set()

    async with running(work, concurrency=3) as (queue, _):
        left = 50
        for number in range(left):
            queue.add(Key(Kind.PARTITION, "ns", str(number)))
        await finished.wait()
    assert most == 3


async def test_what_fails_is_tried_again_and_told() -> None:
    tries = 0
    done = asyncio.Event()

    async def work(_: Key) -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise ValueError(f"try {tries}")
        done.set()

    async with running(work) as (queue, errors):
        queue.add(A)
        await done.wait()
    assert [str(error) for _, error in errors] == ["try 1", "try 2", "try 3"]


async def test_the_back_off_grows_to_its_end() -> None:
    async def work(_: Key) -> None: ...

    queue = KeyQueue(work, chance=random.Random(1), on_error=lambda *_: None)
    waits = [queue._retry_s(A) for _ in range(20)]
    assert waits[0] < 0.26
    assert LAST_RETRY_S / 2 <= waits[-1] <= LAST_RETRY_S


async def test_a_later_time_waits_and_an_earlier_one_wins() -> None:
    order: list[Key] = []
    done = asyncio.Event()

    async def work(key: Key) -> float | None:
        order.append(key)
        if len(order) == 3:
            done.set()
        return 0.05 if order.count(A) == 1 and key == A else None  # A: look again soon

    async with running(work) as (queue, _):
        queue.add(A, 3600.0)
        queue.add(B, 0.02)
        assert queue.depth() == 0
        queue.add(A)
        await done.wait()
    assert order == [A, B, A]
