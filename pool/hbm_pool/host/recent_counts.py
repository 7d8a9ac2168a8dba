"""Which rows were asked for most, lately: bounded, ageing counts of accesses.

A catalogue of up to `DIRECT_ROWS_PER_SLOT` rows per slot of the cache has a byte per row. Of a
larger one only some rows can be told apart: a set-associative table of (key, count), where a key
hashes to one set of `WAYS` places, and where all are taken the smallest count is lowered and the
place changes hands at zero (the step of Misra-Gries). Ageing rides on noting: each note pays for
a part of halving all counts: the half-life is `HALF_LIFE` notes per place, and no note is slow.

The places must be about as many as the cache has slots: the hottest rows are in the cache anyway,
and what a growth of it can win are those of middling heat behind them.
"""

from __future__ import annotations

from typing import Final

import numba
import numpy as np
import numpy.typing as npt

from hbm_pool.host.tz_kernel import wide

WAYS: Final = 8
HALF_LIFE: Final = 4
MIN_PLACES: Final = 1 << 10
MAX_PLACES: Final = 1 << 24
"""Of the table: 100 MB."""
DIRECT_ROWS_PER_SLOT: Final = 8
"""A byte for each of so many rows takes half of what the index of the slot takes."""
LEVELS: Final = (4, 1)
"""Counts of the rows that are chosen first, and of those that come after them."""
_MAX_COUNT: Final = 60_000
_MAX_DIRECT: Final = 255
_AT: Final = 0
_LEVEL: Final = 1


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _note(
    held: npt.NDArray[np.uint32],
    counts: npt.NDArray[np.uint16],
    clock: npt.NDArray[np.int64],
    keys: npt.NDArray[np.int64],
    weight: int,
) -> None:
    sets = held.size // WAYS
    for i in range(keys.size):
        key = np.uint32(keys[i] + 1)
        start = (((keys[i] * 0x9E3779B1) & 0xFFFFFFFF) * sets >> 32) * WAYS
        lowest = start
        for place in range(start, start + WAYS):
            if held[place] == key:
                counts[place] = min(_MAX_COUNT, wide(counts[place]) + weight)
                lowest = -1
                break
            if counts[place] < counts[lowest]:
                lowest = place
        if lowest >= 0:
            if counts[lowest] <= weight:
                held[lowest] = key
                counts[lowest] = weight
            else:
                counts[lowest] -= np.uint16(weight)
        clock[0] += 1
        if clock[0] == HALF_LIFE * WAYS:
            clock[0] = 0
            first = clock[1] * WAYS
            for place in range(first, first + WAYS):
                counts[place] >>= 1
            clock[1] = (clock[1] + 1) % sets


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _note_directly(
    counts: npt.NDArray[np.uint8],
    clock: npt.NDArray[np.int64],
    keys: npt.NDArray[np.int64],
    weight: int,
) -> None:
    for i in range(keys.size):
        counts[keys[i]] = min(_MAX_DIRECT, wide(counts[keys[i]]) + weight)
        clock[0] += 1
        if clock[0] == HALF_LIFE:
            clock[0] = 0
            counts[clock[1]] >>= 1
            clock[1] = (clock[1] + 1) % counts.size


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _sweep(
    held: npt.NDArray[np.uint32],
    counts: npt.NDArray[np.uint8],
    sweep: npt.NDArray[np.int64],
    levels: tuple[int, ...],
    places: int,
    keys: npt.NDArray[np.int64],
) -> tuple[int, int]:
    """Fills `keys` from the next places on. -> how many, places looked at."""
    found = looked = 0
    at, level = sweep[_AT], sweep[_LEVEL]
    while looked < places and found < keys.size:
        looked += 1
        count = counts[at]
        # What was above a level has had its turn in the round before.
        if count >= levels[level] and (level == 0 or count < levels[level - 1]):
            key = at if held.size == 0 else wide(held[at]) - 1
            if key >= 0:
                keys[found] = key
                found += 1
        at += 1
        if at == counts.size:
            at = 0
            level = (level + 1) % len(levels)
    sweep[_AT], sweep[_LEVEL] = at, level
    return found, looked


class RecentCounts:
    """Counts of one width class, bounded by the slots of its cache whatever the catalogue.

    Not exact, and it need not be: it orders rows for the refiller. Not thread-safe for `note`.
    """

    def __init__(self, slots: int, rows: int) -> None:
        """`rows`: of the catalogue; keys are below that."""
        self.direct = rows <= DIRECT_ROWS_PER_SLOT * slots
        if self.direct:
            self._held = np.zeros(0, np.uint32)
            self._counts: npt.NDArray[np.uint8 | np.uint16] = np.zeros(rows, np.uint8)
        else:
            places = min(MAX_PLACES, max(MIN_PLACES, 2 * slots))
            places -= places % WAYS
            self._held = np.zeros(places, np.uint32)
            self._counts = np.zeros(places, np.uint16)
        self._clock = np.zeros(2, np.int64)
        self._at = np.zeros(2, np.int64)

    @property
    def cycle(self) -> int:
        """Places of a sweep in which each row has had one turn."""
        return len(LEVELS) * self._counts.size

    @property
    def nbytes(self) -> int:
        return self._held.nbytes + self._counts.nbytes

    def note(self, keys: npt.NDArray[np.int64], weight: int = 1) -> None:
        """Counts accesses, `[n] int64` keys below 2**30."""
        if self.direct:
            _note_directly(self._counts, self._clock, keys, weight)
        else:
            _note(self._held, self._counts, self._clock, keys, weight)

    def restart(self) -> None:
        """The next sweep begins with the hottest rows."""
        self._at[:] = 0

    def sweep(self, limit: int, places: int) -> tuple[npt.NDArray[np.int64], int]:
        """At most `limit` keys out of the next `places` places, and how many it has looked at:
        round by round those of the next of `LEVELS`, then from the first again. O(places)."""
        keys = np.empty(limit, np.int64)
        found, looked = _sweep(self._held, self._counts, self._at, LEVELS, places, keys)
        return keys[:found], looked
