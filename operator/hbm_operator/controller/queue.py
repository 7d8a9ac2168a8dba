"""One queue of keys: each key is there once, and never worked on twice at the same time.

A key says *where* to look, never what happened: whoever works on it looks at the newest state. So
any number of events about one object are one piece of work, and a failed piece is simply looked at
again, later each time.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Final, NamedTuple

FIRST_RETRY_S: Final = 0.25
LAST_RETRY_S: Final = 60.0


class Kind(StrEnum):
    """What a key is about."""

    PARTITION = "partition"
    """A pod and its HBMPartition, which bear the same name."""
    POLICY = "policy"
    NAMESPACE = "namespace"
    """What a namespace with injected pods needs; the name is empty."""


class Key(NamedTuple):
    """Where to look."""

    kind: Kind
    namespace: str
    name: str = ""


Work = Callable[[Key], Awaitable[float | None]]
"""Looks at a key. Returns after how many seconds to look again, or None. Raises: again, later."""


class KeyQueue:
    """Deduplicates keys and works them off with bounded concurrency.

    Args:
        work: see `Work`; what it raises is given to `on_error` and tried again with back-off.
        concurrency: keys in work at the same time.
        chance: for the jitter of the back-off.
    """

    def __init__(
        self,
        work: Work,
        *,
        concurrency: int = 32,
        chance: random.Random,
        on_error: Callable[[Key, Exception], None],
    ) -> None:
        self._work = work
        self._slots = asyncio.Semaphore(concurrency)
        self._chance = chance
        self._on_error = on_error
        self._due: dict[Key, float] = {}
        """When each waiting key is due; the heap may hold outdated entries of it."""
        self._heap: list[tuple[float, Key]] = []
        self._in_work: set[Key] = set()
        self._again: dict[Key, float] = {}
        """Keys named while in work, and when they are due."""
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Event()

    def add(self, key: Key, delay_s: float = 0.0) -> None:
        """Look at the key in `delay_s` seconds, or earlier if it is due earlier already."""
        when = asyncio.get_running_loop().time() + delay_s
        if key in self._in_work:
            self._again[key] = min(when, self._again.get(key, when))
        elif when < self._due.get(key, float("inf")):
            self._due[key] = when
            heapq.heappush(self._heap, (when, key))
            self._changed.set()

    def depth(self) -> int:
        """Keys that are due or in work; those that wait for their time do not count."""
        now = asyncio.get_running_loop().time()
        return len(self._in_work) + sum(when <= now for when in self._due.values())

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._slots.acquire()
                tasks.create_task(self._look(await self._next()))

    async def _look(self, key: Key) -> None:
        try:
            later = await self._work(key)
        except Exception as error:
            self._on_error(key, error)
            later = self._retry_s(key)
        else:
            self._failures.pop(key, None)
        finally:
            self._in_work.discard(key)
            self._slots.release()
        now = asyncio.get_running_loop().time()
        if key in self._again:
            self.add(key, self._again.pop(key) - now)
        if later is not None:
            self.add(key, later)

    def _retry_s(self, key: Key) -> float:
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        ceiling = min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** (failures - 1))
        return ceiling * self._chance.uniform(0.5, 1.0)

    async def _next(self) -> Key:
        """The key that is due first, taken out of the queue."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            wait_s: float | None = None
            while self._heap:
                when, key = self._heap[0]
                if self._due.get(key) != when:
                    heapq.heappop(self._heap)  # was named anew for an earlier time
                elif when > loop.time():
                    wait_s = when - loop.time()
                    break
                else:
                    heapq.heappop(self._heap)
                    del self._due[key]
                    self._in_work.add(key)
                    return key
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            except TimeoutError:
                pass
