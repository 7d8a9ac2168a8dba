"""Compiled copies of rows between an arena in host memory and contiguous buffers.

Rows are arrays of equal words (the widest unsigned integer that divides both the row and the
distance between rows), flat and one-dimensional: `stride` words from one row of the arena to the
next, `width` words of payload. No function holds the interpreter lock.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from hbm_pool.host.tz_kernel import HITS, MISSES, Tz, lookup, touch

Slots = npt.NDArray[np.int64]
Words = npt.NDArray[Any]


def word_dtype(row_bytes: int, stride_bytes: int) -> np.dtype[Any]:
    """The widest unsigned word that divides a row and the distance between rows."""
    return np.dtype(f"u{math.gcd(row_bytes, stride_bytes, 8)}")


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def first_outside(ids: Slots, rows: int) -> int:
    """Place of the first id that is not in 0..rows-1, or -1."""
    for i in range(ids.size):
        if ids[i] < 0 or ids[i] >= rows:
            return i
    return -1


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def lookup_batch(
    tz: Tz,
    ids: Slots,
    first_key: int,
    keys: Slots,
    slots: Slots,
    inverse: npt.NDArray[np.int32],
    table: npt.NDArray[np.int32],
) -> tuple[int, int]:
    """Looks a batch up, one hit per distinct row.

    `table` is scratch for telling repeated ids apart: zeros, a power of two of at least twice the
    ids. Afterwards `keys[:u]` are the distinct keys in order of first use, `slots[:u]` their slots
    (-1: missed) and `inverse[i]` says which of them id i is. -> (u, hits).
    """
    mask = table.size - 1
    unique = 0
    hits = 0
    for i in range(ids.size):
        key = ids[i] + first_key
        place = ((key * 0x9E3779B1) >> 12) & mask
        while True:
            held = table[place]
            if held == 0:
                table[place] = unique + 1
                slot = lookup(tz, key)
                if slot >= 0:
                    touch(tz, slot)
                    hits += 1
                keys[unique] = key
                slots[unique] = slot
                inverse[i] = unique
                unique += 1
                break
            if keys[held - 1] == key:
                inverse[i] = held - 1
                break
            place = (place + 1) & mask
    tz.state[HITS] += hits
    tz.state[MISSES] += unique - hits
    return unique, hits


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def gather_rows(
    arena: Words, stride: int, width: int, slots: Slots, inverse: npt.NDArray[np.int32], out: Words
) -> None:
    """Copies the row of each id that has a slot: `out[i] = arena[slots[inverse[i]]]`."""
    for i in range(inverse.size):
        slot = slots[inverse[i]]
        if slot >= 0:
            source = slot * stride
            target = i * width
            for j in range(width):
                out[target + j] = arena[source + j]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def spread_rows(
    fetched: Words, width: int, place: Slots, inverse: npt.NDArray[np.int32], out: Words
) -> None:
    """Copies fetched rows to the ids that missed: `out[i] = fetched[place[inverse[i]]]`, where
    `place` is -1 for rows that were hit."""
    for i in range(inverse.size):
        row = place[inverse[i]]
        if row >= 0:
            source = row * width
            target = i * width
            for j in range(width):
                out[target + j] = fetched[source + j]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def store_rows(arena: Words, stride: int, width: int, slots: Slots, rows: Words) -> None:
    """Writes `rows[i]` to slot `slots[i]` where that is not negative."""
    for i in range(slots.size):
        if slots[i] >= 0:
            target = slots[i] * stride
            source = i * width
            for j in range(width):
                arena[target + j] = rows[source + j]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def move_rows(arena: Words, stride: int, width: int, sources: Slots, targets: Slots) -> None:
    """Copies rows between slots. No target is a source of the same call, so order is free."""
    for i in range(sources.size):
        source = sources[i] * stride
        target = targets[i] * stride
        for j in range(width):
            arena[target + j] = arena[source + j]
