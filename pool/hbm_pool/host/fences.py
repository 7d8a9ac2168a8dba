"""When may memory that was given up be used again: not before what reads it has finished.

Work on the pool runs in two lanes. Each piece of host work that will read or write extents is a
span (`begin`, `end`); a fence of a lane is done when every span that had begun before it has ended
and, where work is asynchronous, the device has finished what those spans had queued.

On CPU a span ends when its work is done, so epochs alone decide; the CUDA clock
(`hbm_pool.device.streams`) then waits for events on the streams of the lane as well.
"""

from __future__ import annotations

import threading
from enum import IntEnum
from typing import Protocol


class Lane(IntEnum):
    """Whose work a span is."""

    KV = 0
    """From acquire to commit or abort of a KV handle."""
    EMB = 1
    """One gather, one refill copy, one push of rows."""


class Fence(Protocol):
    """Says whether everything before it has finished; once true it stays true."""

    def done(self) -> bool: ...


class EpochFence:
    """Done when no span of the lane with an epoch up to `epoch` is open."""

    __slots__ = ("_clock", "_epoch", "_lane")

    def __init__(self, clock: EpochClock, lane: Lane, epoch: int) -> None:
        self._clock = clock
        self._lane = lane
        self._epoch = epoch

    def done(self) -> bool:
        return self._clock.oldest_open(self._lane) > self._epoch


class EpochClock:
    """Counts spans per lane. Any thread may call any method; its own lock guards the counters."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = [0, 0]
        self._open: tuple[set[int], set[int]] = (set(), set())

    def begin(self, lane: Lane) -> int:
        """Opens a span; the returned epoch closes it."""
        with self._lock:
            epoch = self._begun[lane] + 1
            self._begun[lane] = epoch
            self._open[lane].add(epoch)
            return epoch

    def end(self, lane: Lane, epoch: int) -> None:
        """Closes a span. Raises KeyError when it is not open."""
        with self._lock:
            self._open[lane].remove(epoch)

    def oldest_open(self, lane: Lane) -> int:
        """Epoch of the oldest open span; one more than the newest epoch when none is open."""
        with self._lock:
            return min(self._open[lane], default=self._begun[lane] + 1)

    def open_spans(self, lane: Lane) -> int:
        """How many spans of the lane are open."""
        with self._lock:
            return len(self._open[lane])

    def fence(self, lane: Lane) -> Fence:
        """A fence behind everything the lane has begun so far."""
        with self._lock:
            return EpochFence(self, lane, self._begun[lane])

    def order(self, lane: Lane) -> None:
        """Makes what the caller queues next in the lane come after all the lane queued before.

        Called before a batch's KV is read or written: pages may change users inside the lane
        without a fence. On CPU there is nothing to do.
        """
