"""TZ over arrays of keys: accesses in turn for simulation, look-up and insertion of a batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .tz_kernel import (
    CONFLICTS,
    EMPTY_WORD,
    FRESH_HEAD,
    FRESH_TAIL,
    HITS,
    IN_RING,
    MISSES,
    ROWS,
    Tz,
    claim,
    free_slots,
    fresh_slot,
    insert,
    kernel,
    lookup,
    place_row,
    touch,
    wide,
)


@kernel
def access_many(
    tz: Tz,
    keys: npt.NDArray[np.uint32],
    hits: npt.NDArray[np.bool_],
    slots: npt.NDArray[np.int64],
) -> int:
    """`access` for each key in turn, `[n]` each; slot -1 where a miss found no place. -> hits."""
    total = 0
    for i in range(keys.size):
        key = wide(keys[i])
        slot = lookup(tz, key)
        if slot >= 0:
            touch(tz, slot)
            hits[i] = True
            total += 1
        else:
            hits[i] = False
            slot, _, _ = insert(tz, key)
        slots[i] = slot
    tz.state[HITS] += total
    tz.state[MISSES] += keys.size - total
    return total


@kernel
def lookup_many(tz: Tz, keys: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]) -> int:
    """Slots of distinct keys, -1 for misses; hits are counted once each. -> hits."""
    total = 0
    for i in range(keys.size):
        slot = lookup(tz, keys[i])
        slots[i] = slot
        if slot >= 0:
            touch(tz, slot)
            total += 1
    tz.state[HITS] += total
    tz.state[MISSES] += keys.size - total
    return total


@kernel
def insert_many(
    tz: Tz,
    keys: npt.NDArray[np.int64],
    slots: npt.NDArray[np.int64],
    sources: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    moved: npt.NDArray[np.int64],
) -> int:
    """Inserts distinct missed keys of one batch, `[n]` each. -> copies c.

    Admission: a batch may fill what is unused and go once round the ring, so that it never
    overwrites a row it has just inserted; what is beyond that, and what the hash index has no room
    for, is a conflict. `slots[i]` is where row i is to be written, -1 when it is not to be written
    (a conflict, resident already, or overwritten within the batch). `sources[:c]`, `targets[:c]`
    ask for copies between slots: all reads, then all writes, then the new rows. `moved` is
    scratch.
    """
    state = tz.state
    room = free_slots(tz) + max(1, state[IN_RING]) * state[ROWS]
    copies = 0
    for i in range(keys.size):
        slots[i] = -1
        if room == 0:
            state[CONFLICTS] += 1
            continue
        if lookup(tz, keys[i]) >= 0:
            continue
        slot, source, target = insert(tz, keys[i])
        slots[i] = slot
        if slot >= 0:
            room -= 1
        if target >= 0:
            sources[copies] = source
            targets[copies] = target
            moved[copies] = wide(tz.words[target]) >> 2
            copies += 1
    # The hand may have gone round a small main: only the last row of a slot is written.
    for i in range(keys.size):
        if slots[i] >= 0 and wide(tz.words[slots[i]]) >> 2 != keys[i]:
            slots[i] = -1
    return keep_last(tz, sources, targets, moved, copies)


@kernel
def keep_last(
    tz: Tz,
    sources: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    moved: npt.NDArray[np.int64],
    copies: int,
) -> int:
    """Keeps the copies whose target still holds the row that was moved there. -> how many."""
    kept = 0
    for i in range(copies):
        if wide(tz.words[targets[i]]) >> 2 == moved[i]:
            sources[kept] = sources[i]
            targets[kept] = targets[i]
            kept += 1
    return kept


@kernel
def discard_many(tz: Tz, keys: npt.NDArray[np.int64]) -> int:
    """Empties the slots of the keys that are resident. -> how many."""
    done = 0
    for i in range(keys.size):
        slot = lookup(tz, keys[i])
        if slot >= 0:
            tz.words[slot] = EMPTY_WORD
            done += 1
    return done


@kernel
def slots_of(tz: Tz, keys: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]) -> None:
    """Slots of keys, -1 where a key is not resident; no counter changes."""
    for i in range(keys.size):
        slots[i] = lookup(tz, keys[i])


@kernel
def fill_many(tz: Tz, keys: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]) -> None:
    """Puts keys into unused slots of grown main extents as long as there are any (refill).

    `slots[i]` is -1 for a key that is resident already or found no unused slot.
    """
    for i in range(keys.size):
        slots[i] = -1
        if tz.state[FRESH_HEAD] < tz.state[FRESH_TAIL] and lookup(tz, keys[i]) < 0:
            place = claim(tz, keys[i])
            if place >= 0:
                extent, offset = fresh_slot(tz)
                slots[i] = place_row(tz, keys[i], 0, extent, offset, place)
