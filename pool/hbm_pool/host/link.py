"""The link between host and device: who used it, and on CPU what its copies would have cost.

One link serves misses of requests, refill and pushed rows. Without a rate it only counts; with
one, a copy waits as long as it would take behind what is already on its way. Copies towards the
device are served in the order in which they come; while something travels the other way, they are
slower (24.8 to about 11 GB/s on an A100's PCIe 4 x16, `docs/results.md`).
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

OPPOSING_FACTOR: Final = 11.0 / 24.8
BUSY_WINDOW_S: Final = 1.0
PUSH_BYTES: Final = 128 << 10
"""Pushed rows travel in pieces of this size: a request waits for one at most."""
_SPIN_S: Final = 50e-6
"""A sleep is late by about this much: what is left at the end is spun away."""


class LinkCounters(NamedTuple):
    """Since the link was made; they only grow, but `busy`."""

    foreground_bytes: int
    foreground_copies: int
    refill_bytes: int
    refill_copies: int
    critical_refill_copies: int
    """Refill copies that a request's copy had to wait for."""
    push_bytes: int
    device_to_host_bytes: int
    busy: float
    """Share of the last second in which something was on its way to the device (0 without rate)."""


class LinkModel:
    """Shared by all that copies; any thread may call, one of them refills.

    `bytes_per_s=None` counts and never waits.

    `device_to_host_bytes_per_s` defaults to the same rate; `opposing_factor` in (0, 1] is what is
    left of the rate while copies run the other way. Raises ValueError for values outside.
    """

    def __init__(
        self,
        bytes_per_s: float | None = None,
        *,
        device_to_host_bytes_per_s: float | None = None,
        opposing_factor: float = OPPOSING_FACTOR,
        clock_s: Callable[[], float] = time.monotonic,
        sleep_s: Callable[[float], None] = time.sleep,
    ) -> None:
        back = device_to_host_bytes_per_s or bytes_per_s
        if bytes_per_s is not None and not 0.0 < bytes_per_s < float("inf"):
            raise ValueError(f"link_bytes_per_s is {bytes_per_s}; use a positive rate, or none")
        if back is not None and not 0.0 < back < float("inf"):
            raise ValueError(f"device_to_host_bytes_per_s is {back}; use a positive rate")
        if not 0.0 < opposing_factor <= 1.0:
            raise ValueError(f"opposing_factor is {opposing_factor}; it must be in (0, 1]")
        self.bytes_per_s = bytes_per_s
        self._back_bytes_per_s = back
        self._opposing_factor = opposing_factor
        self._clock_s = clock_s
        self._sleep_s = sleep_s
        self._lock = threading.Lock()
        self._free_at_s = clock_s()
        self._back_free_at_s = self._free_at_s
        self._refill_end_s = -math.inf  # when the last refill copy will have arrived
        # One entry per request that fetches: appending and popping need no lock.
        self._fetching: list[None] = []
        self._spans: deque[tuple[float, float]] = deque()  # when something was on its way
        self._foreground_bytes = 0
        self._foreground_copies = 0
        self._push_bytes = 0
        self._refill_bytes = 0
        self._refill_copies = 0
        self._critical = 0
        self._back_bytes = 0

    def begin_fetch(self) -> None:
        """A request begins to look rows up, and may need the link soon: refill waits (`quiet`).

        Said this early, a short copy of the refiller that is on its way has arrived before the
        request has looked up and read what it misses.
        """
        self._fetching.append(None)

    def end_fetch(self) -> None:
        """That request has its rows."""
        self._fetching.pop()

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """`begin_fetch` and `end_fetch` around a block."""
        self.begin_fetch()
        try:
            yield
        finally:
            self.end_fetch()

    @property
    def quiet(self) -> bool:
        """No request is fetching rows and nothing is on its way in either direction."""
        with self._lock:
            return self._quiet(self._clock_s())

    def foreground(self, nbytes: int) -> float:
        """Copies rows that a request waits for; returns what it took in seconds."""
        with self._lock:
            now = self._clock_s()
            if now < self._refill_end_s:
                self._critical += 1
                self._refill_end_s = -math.inf  # one copy of the refiller is in the way once
            self._foreground_bytes += nbytes
            self._foreground_copies += 1
            end = self._reserve(now, nbytes)
        return self._wait(now, end)

    def refill(self, nbytes: int, copy: Callable[[], None] | None = None) -> float | None:
        """Copies rows nobody waits for; returns what it took in seconds.

        None, and nothing has happened, unless the link is `quiet`. `copy` does the copy where
        there is a real link, and returns when it has arrived.
        """
        with self._lock:
            now = self._clock_s()
            if not self._quiet(now):
                return None
            self._refill_bytes += nbytes
            self._refill_copies += 1
            end = self._reserve(now, nbytes)
            self._refill_end_s = end if copy is None else math.inf
        if copy is not None:
            try:
                copy()
            finally:
                with self._lock:
                    # Unless a request has met it: then it has been counted.
                    self._refill_end_s = min(self._refill_end_s, end)
        # Nobody waits for these rows, so being late is fine and spinning would only disturb.
        left = end - self._clock_s()
        if left > 0.0:
            self._sleep_s(left)
        return max(0.0, end - now)

    def push(self, nbytes: int) -> float:
        """Copies new values of rows that lie on the device; returns what it took in seconds."""
        took = 0.0
        for start in range(0, nbytes, PUSH_BYTES):
            part = min(PUSH_BYTES, nbytes - start)
            with self._lock:
                now = self._clock_s()
                self._push_bytes += part
                end = self._reserve(now, part)
            took += self._wait(now, end)
        return took

    def device_to_host(self, nbytes: int) -> float:
        """Copies the other way; returns what it took in seconds."""
        with self._lock:
            now = self._clock_s()
            self._back_bytes += nbytes
            end = now
            if self._back_bytes_per_s is not None:
                end = max(now, self._back_free_at_s) + nbytes / self._back_bytes_per_s
                self._back_free_at_s = end
        return self._wait(now, end)

    def counters(self) -> LinkCounters:
        """All counters at once."""
        with self._lock:
            return LinkCounters(
                foreground_bytes=self._foreground_bytes,
                foreground_copies=self._foreground_copies,
                refill_bytes=self._refill_bytes,
                refill_copies=self._refill_copies,
                critical_refill_copies=self._critical,
                push_bytes=self._push_bytes,
                device_to_host_bytes=self._back_bytes,
                busy=self._busy(self._clock_s()),
            )

    def _reserve(self, now: float, nbytes: int) -> float:
        """When a copy that is queued now will have arrived."""
        if self.bytes_per_s is None or nbytes == 0:
            return now
        rate = self.bytes_per_s
        if self._back_free_at_s > now:
            rate *= self._opposing_factor
        start = max(now, self._free_at_s)
        end = start + nbytes / rate
        self._free_at_s = end
        if self._spans and self._spans[-1][1] >= start:
            self._spans[-1] = (self._spans[-1][0], end)
        else:
            self._spans.append((start, end))
        while self._spans and self._spans[0][1] < now - BUSY_WINDOW_S:
            self._spans.popleft()
        return end

    def _quiet(self, now: float) -> bool:
        return not self._fetching and self._free_at_s <= now and self._back_free_at_s <= now

    def _busy(self, now: float) -> float:
        since = now - BUSY_WINDOW_S
        used = sum(max(0.0, min(end, now) - max(start, since)) for start, end in self._spans)
        return min(1.0, used / BUSY_WINDOW_S)

    def _wait(self, now: float, end: float) -> float:
        left = end - now
        while left > 0.0:
            if left > _SPIN_S:
                self._sleep_s(left - _SPIN_S)
            left = end - self._clock_s()
        return max(0.0, end - now)
