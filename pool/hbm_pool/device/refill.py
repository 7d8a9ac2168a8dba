"""Background copies of hot rows into newly won extents.

After a growth the new slots would fill by misses alone. The refiller fills them with the hottest
rows that are not in the cache, as far as a token bucket allows, and only while nobody needs the
link: it looks before every copy, and copies are so short that they have arrived before a request
that has just begun needs the link. It never evicts anything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final, NamedTuple

import torch

from hbm_pool.device.embedding import EmbeddingCache
from hbm_pool.device.row_index import Keys
from hbm_pool.errors import RowStoreError

COPY_BYTES: Final = 128 << 10
COPY_S: Final = 50e-6
"""One copy is at most this long on a modelled link, and at most `COPY_BYTES`: shorter than it
takes a request that comes right behind it to look its rows up and to read what it misses."""
BURST_S: Final = 0.05
"""What the token bucket holds, as time at the set rate."""
LIST_ROWS: Final = 4096
"""Rows chosen at a time; the choice is made anew when they are used up."""
LOOK_S: Final = 0.02
"""How often an idle refiller looks whether there is something to do."""
YIELD_S: Final = 200e-6
"""How often a refiller that yields looks at the link."""
FAULT_S: Final = 1.0
"""Rest after a store could not be read."""


class RefillCounters(NamedTuple):
    """Since the refiller was made, but `backlog_rows` and `bytes_per_s`."""

    rows: int
    bytes: int
    copies: int
    critical_copies: int
    """Copies that a request had to wait for."""
    yields: int
    """Times it left the link to somebody else."""
    faults: int
    """Times a store could not be read."""
    backlog_rows: int
    bytes_per_s: float


class Refiller:
    """One thread (on CUDA with a stream of its own) that refills `cache` at `bytes_per_s`.

    0 bytes per second rests. `start` and `stop` may follow each other; `close` ends it for good.
    Raises ValueError for a rate below 0 or not finite.
    """

    def __init__(
        self,
        cache: EmbeddingCache,
        bytes_per_s: float = 0.0,
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._clock_s = clock_s
        self._changed = threading.Condition()
        self._rate = _checked(bytes_per_s)
        self._tokens = 0.0
        self._filled_s = clock_s()
        self._lists: list[tuple[int, Keys]] = []
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._closed = False
        self._rows = 0
        self._bytes = 0
        self._copies = 0
        self._yields = 0
        self._faults = 0
        self._stream: torch.cuda.Stream | None = None
        if cache.device.type == "cuda":
            self._stream = torch.cuda.Stream(cache.device)  # type: ignore[no-untyped-call]

    def set_rate(self, bytes_per_s: float) -> None:
        """New budget; takes effect at once."""
        rate = _checked(bytes_per_s)
        with self._changed:
            self._fill_bucket()
            self._rate = rate
            self._tokens = min(self._tokens, rate * BURST_S)
            self._changed.notify_all()

    def start(self) -> None:
        """Starts the thread if it does not run. Raises RuntimeError after `close`."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the refiller is closed; make a new one")
            if self._thread is not None:
                return
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name="hbm-refill", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the copy under way; returns when it has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def close(self) -> None:
        """`stop`, for good."""
        with self._changed:
            self._closed = True
        self.stop()

    def wake(self) -> None:
        """Says that extents have been won, so that an idle refiller looks now."""
        with self._changed:
            self._changed.notify_all()

    @property
    def backlog(self) -> int:
        """Rows chosen and not copied yet."""
        with self._changed:
            return sum(keys.size for _, keys in self._lists)

    def counters(self) -> RefillCounters:
        """All counters at once."""
        with self._changed:
            return RefillCounters(
                rows=self._rows,
                bytes=self._bytes,
                copies=self._copies,
                critical_copies=self._cache.link.counters().critical_refill_copies,
                yields=self._yields,
                faults=self._faults,
                backlog_rows=sum(keys.size for _, keys in self._lists),
                bytes_per_s=self._rate,
            )

    def step(self) -> float:
        """One copy if there is something to copy, room, budget and a quiet link; what the thread
        does. Returns how long to wait before the next one may be possible, 0.0 for none, in s."""
        with self._changed:
            if self._rate == 0.0:
                return LOOK_S
            self._fill_bucket()
        if not self._cache.free_slots():
            with self._changed:
                self._lists = []
            return LOOK_S
        if not self._lists:
            if not self._cache.link.quiet:  # choosing costs time on the processor, too
                return self._yield()
            chosen = self._cache.refill_candidates(LIST_ROWS)
            with self._changed:
                self._lists = chosen
            if not chosen:
                return LOOK_S
        number, keys = self._lists[-1]
        row_bytes = self._cache.classes[number].row_bytes
        part = keys[: max(1, self._copy_bytes() // row_bytes)]
        nbytes = part.size * row_bytes
        with self._changed:
            # A row larger than the bucket waits until it is full and leaves it in debt.
            missing = min(nbytes, max(self._rate * BURST_S, 1.0)) - self._tokens
            if missing > 0.0:
                return missing / self._rate
        if not self._cache.link.quiet:
            return self._yield()
        return self._copy(number, part, nbytes)

    def _yield(self) -> float:
        with self._changed:
            self._yields += 1
        return YIELD_S

    def _copy(self, number: int, part: Keys, nbytes: int) -> float:
        try:
            kept = self._cache.refill(number, part)
        except RowStoreError:
            with self._changed:
                self._faults += 1
                self._lists = []
            return FAULT_S
        if kept is None:
            return self._yield()
        with self._changed:
            self._tokens -= nbytes
            self._bytes += nbytes
            self._copies += 1
            self._rows += kept
            rest = self._lists[-1][1][part.size :]
            if rest.size and kept:
                self._lists[-1] = (number, rest)
            else:  # used up, or no unused slot is left
                self._lists.pop()
        return 0.0

    def _copy_bytes(self) -> int:
        rate = self._cache.link.bytes_per_s
        return COPY_BYTES if rate is None else min(COPY_BYTES, int(rate * COPY_S))

    def _fill_bucket(self) -> None:
        now = self._clock_s()
        earned = (now - self._filled_s) * self._rate
        self._tokens = min(self._rate * BURST_S, self._tokens + earned)
        self._filled_s = now

    def _run(self) -> None:
        with self._side_stream():
            while True:
                wait_s = self.step()
                with self._changed:
                    if not self._stopping and wait_s > 0.0:
                        self._changed.wait(wait_s)
                    if self._stopping:
                        return

    def _side_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _checked(bytes_per_s: float) -> float:
    if not 0.0 <= bytes_per_s < float("inf"):
        raise ValueError(
            f"refill_bytes_per_s is {bytes_per_s}; use a finite rate, or 0 for no refill"
        )
    return float(bytes_per_s)
