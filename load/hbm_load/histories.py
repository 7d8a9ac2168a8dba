"""What users have seen: drawn from a seed when asked for, or stored from a log.

A drawn history costs no memory until it is read, so a trace of millions of one-off users with
thousands of items each fits.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hbm_load.popularity import RankedItems, ZipfMandelbrot

_GAP_LOG_MEAN = 7.0
"""Items of a first history are about exp(7) s (18 minutes) apart: assumed."""
_GAP_LOG_SD = 1.5


class Events(NamedTuple):
    """Items and when they were seen, oldest first."""

    items: npt.NDArray[np.int64]  # [T]
    timestamps: npt.NDArray[np.int64]  # [T] Unix s, ascending


class Histories(Protocol):
    """All users' histories."""

    def name(self, user: int) -> str:
        """The user id that goes into X-User-ID."""
        ...

    def events(self, user: int, length: int) -> Events:
        """The first `length` events of the user: a longer history starts with a shorter one."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class StoredHistories:
    """Histories that lie in memory, one stretch of two flat arrays per user."""

    names: tuple[str, ...]
    offsets: npt.NDArray[np.int64]  # [users + 1]
    items: npt.NDArray[np.int64]
    timestamps: npt.NDArray[np.int64]

    def name(self, user: int) -> str:
        """See `Histories`."""
        return self.names[user]

    def events(self, user: int, length: int) -> Events:
        """See `Histories`."""
        start = int(self.offsets[user])
        available = int(self.offsets[user + 1]) - start
        if length > available:
            raise IndexError(f"user {user} has {available} events, {length} were asked for")
        return Events(self.items[start : start + length], self.timestamps[start : start + length])


@dataclasses.dataclass(frozen=True, slots=True)
class DrawnHistories:
    """A first part drawn per user from the seed, followed by what the user added in the trace."""

    seed: int
    catalogue: RankedItems
    keys: npt.NDArray[np.int64]  # [users] what the user's own random stream is named by
    first_length: npt.NDArray[np.int64]  # [users]
    first_seen_s: npt.NDArray[np.int64]  # [users] Unix s; the first part lies before it
    zipf_s: npt.NDArray[np.float64]  # [users] popularity when first seen
    zipf_q: npt.NDArray[np.float64]  # [users]
    churned: npt.NDArray[np.int64]  # [users] rank changes so far (RankedItems)
    added_offsets: npt.NDArray[np.int64]  # [users + 1] into the arrays below
    added_items: npt.NDArray[np.int64]
    added_timestamps: npt.NDArray[np.int64]

    def name(self, user: int) -> str:
        """See `Histories`."""
        return f"u{self.keys[user]}"

    def events(self, user: int, length: int) -> Events:
        """See `Histories`."""
        first = int(self.first_length[user])
        drawn = self._first(user)
        if length <= first:
            return Events(drawn.items[:length], drawn.timestamps[:length])
        start = int(self.added_offsets[user])
        stop = start + length - first
        if stop > int(self.added_offsets[user + 1]):
            raise IndexError(f"user {user} never has {length} events in this trace")
        return Events(
            np.concatenate([drawn.items, self.added_items[start:stop]]),
            np.concatenate([drawn.timestamps, self.added_timestamps[start:stop]]),
        )

    def _first(self, user: int) -> Events:
        length = int(self.first_length[user])
        random = np.random.Generator(np.random.Philox(key=[self.seed, int(self.keys[user])]))
        popularity = ZipfMandelbrot(
            self.catalogue.n, float(self.zipf_s[user]), float(self.zipf_q[user])
        )
        ranks = popularity.draw(random, length)
        gaps = np.exp(random.standard_normal(length) * _GAP_LOG_SD + _GAP_LOG_MEAN)
        before = np.cumsum(np.maximum(1, gaps.astype(np.int64)))[::-1]
        return Events(
            self.catalogue.items(ranks, int(self.churned[user])),
            int(self.first_seen_s[user]) - before,
        )
