"""Rows pushed while others read them: what lets a push be atomic without stopping readers.

A reader (a gather, a refill) registers before it looks rows up and reads the store without any
lock. A push registers its rows before it writes the store. Before the reader uses what it read,
it replaces every row that a push has touched in the meantime by the pushed value. So no reader
sees half a row, nor an old row after the push has returned, nor puts an old row into the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class Push:
    """One push: class, keys ascending, and their values `[n, row_bytes] uint8`."""

    __slots__ = ("ended", "failed", "keys", "kind", "values")

    def __init__(self, kind: int, keys: Keys, values: Bytes) -> None:
        self.kind = kind
        self.keys = keys
        self.values = values
        self.ended: int | None = None
        """Sequence at which the store had it all; None while it is being written."""
        self.failed = False


class Patch(NamedTuple):
    """What a reader has to do about pushes it overlapped with."""

    patched: int
    """Rows replaced in place."""
    suspect: npt.NDArray[np.int64]
    """Places of rows whose push failed: to be read again."""


class PushLog:
    """Pushes that readers in flight may have missed. Guarded by the cache's lock."""

    def __init__(self) -> None:
        self._sequence = 0
        self._readers: dict[int, int] = {}  # ticket -> sequence at registration
        self._tickets = 0
        self._pushes: list[Push] = []

    @property
    def pending(self) -> int:
        """Pushes still remembered."""
        return len(self._pushes)

    def begin_read(self) -> int:
        """Registers a reader; the ticket ends it."""
        self._tickets += 1
        self._readers[self._tickets] = self._sequence
        return self._tickets

    def end_read(self, ticket: int) -> None:
        """The reader is done; forgets pushes nobody needs any more."""
        del self._readers[ticket]
        self._forget()

    def renew_read(self, ticket: int) -> None:
        """The reader starts over: what it reads from now on holds all pushes that have ended."""
        self._readers[ticket] = self._sequence
        self._forget()

    def begin_push(self, kind: int, keys: Keys, values: Bytes) -> Push:
        """From now on readers get these values. `keys` distinct and ascending."""
        push = Push(kind, keys, values)
        self._pushes.append(push)
        return push

    def end_push(self, push: Push, *, failed: bool = False) -> None:
        """The store holds the rows, or, `failed`, holds nobody knows what."""
        self._sequence += 1
        push.ended = self._sequence
        push.failed = failed
        self._forget()

    def patch(self, ticket: int, kind: int, keys: Keys, rows: Bytes) -> Patch:
        """Brings rows a reader has read, `[n]` keys and `[n, row_bytes]`, up to date in place."""
        since = self._readers[ticket]
        patched = 0
        suspect = np.zeros(keys.size, np.bool_)
        for push in self._pushes:
            if push.kind != kind or (push.ended is not None and push.ended <= since):
                continue
            places = np.minimum(np.searchsorted(push.keys, keys), push.keys.size - 1)
            same = push.keys[places] == keys
            if push.failed:
                suspect |= same
            else:
                suspect &= ~same
                rows[same] = push.values[places[same]]
                patched += int(np.count_nonzero(same))
        return Patch(patched, np.flatnonzero(suspect))

    def _forget(self) -> None:
        oldest = min(self._readers.values(), default=self._sequence)
        self._pushes = [push for push in self._pushes if push.ended is None or push.ended > oldest]
