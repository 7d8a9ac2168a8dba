"""Which rows were asked for most, lately: a bounded, ageing sketch of access counts.

A set-associative table of (key, count): a key hashes to one set of `WAYS` places; where all are
taken, the smallest count is lowered, and the place changes hands at zero (the step of
Misra-Gries). Ageing rides on noting: each note pays for a part of halving all counts, so that the
half-life is `HALF_LIFE` notes per place and no note is slow.
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
MAX_PLACES: Final = 1 << 20
_MAX_COUNT: Final = 60_000


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


class RecentCounts:
    """Counts of one width class, 6 bytes per place; places are bounded whatever the catalogue.

    Not exact, and it need not be: it orders rows for the refiller. Not thread-safe for `note`.
    """

    def __init__(self, slots: int) -> None:
        places = min(MAX_PLACES, max(MIN_PLACES, 2 * slots))
        places -= places % WAYS
        self._held = np.zeros(places, np.uint32)
        self._counts = np.zeros(places, np.uint16)
        self._clock = np.zeros(2, np.int64)

    @property
    def nbytes(self) -> int:
        return self._held.nbytes + self._counts.nbytes

    def note(self, keys: npt.NDArray[np.int64], weight: int = 1) -> None:
        """Counts accesses, `[n] int64` keys below 2**30."""
        _note(self._held, self._counts, self._clock, keys, weight)

    def snapshot(self, least: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
        """Keys counted at least that often, hottest first, and their counts."""
        places = np.flatnonzero(self._counts >= least)
        keys = self._held[places].astype(np.int64) - 1
        counts = self._counts[places]
        known = keys >= 0
        order = np.argsort(counts[known], kind="stable")[::-1]
        return keys[known][order], counts[known][order]
