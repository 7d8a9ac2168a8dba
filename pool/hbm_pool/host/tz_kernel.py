"""TZ, the replacement rule of embedding rows: two zones in place, no lists.

One set of numba functions over plain arrays serves the pool, the twin and the simulator, so that
they cannot disagree. The rules (numbered as the comments below cite them):

1. A slot word is `key:30 | cnt:2`. An index entry is a slot and the generation its extent had. A
   hit is a slot word whose key matches; it raises `cnt` to at most 3 and writes only on a change.
   Eviction never touches the index.
2. Probation, a tenth of the extents, is a ring of rows; an extent's generation goes up when its
   overwriting starts. Main, the rest, is a 2-bit CLOCK over slots.
3. A miss whose stale entry points into a probation extent and is 1..9 generations old is a ghost
   hit and goes to a main hole. Any other overwrites the next slot of the ring; if the row there
   has `cnt >= 1`, that row is first copied to a main hole with `cnt = 0`.
4. A main hole: advance the hand, decrementing; the first `cnt == 0`, or after 16 steps the lowest
   seen.
5. A planned shrink takes a tenth from the oldest probation and the rest from main, last-grown
   extents first, then in the order of the hand; rows with `cnt > 0` are copied to main holes with
   `cnt - 1`. The mark "last-grown" is cleared when the hand has swept the extent.
6. Growth puts main extents behind the hand, where misses fill them directly; every extent that
   comes back skips 10 generations, so that no old entry takes it for a ghost.

Handing extents over costs O(extents) whatever they held: `fill[extent]` says how many of its slots
are valid, and 0 voids them all. With `rows_per_extent = 1` the same code is the row-granular
miniature of the twin (exact row counts for the zones).

Index entry, 63 bits: `generation:15 | extent:24 | offset + 1:24`; 0 means never seen. Memory:
8 bytes per catalogue row with the direct map, about 21 bytes per slot with the hash index (1.75
entries per slot, 12 bytes each), 4 bytes per slot for the words.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, TypeVar

import numba
import numpy as np
import numpy.typing as npt

Function = TypeVar("Function")

KEY_BITS: Final = 30
MAX_KEYS: Final = (1 << KEY_BITS) - 1
"""Catalogue rows one kernel can tell apart; the highest 30-bit key marks an empty slot."""
EMPTY_WORD: Final = MAX_KEYS << 2
OFFSET_BITS: Final = 24
EXTENT_BITS: Final = 24
GENERATION_BITS: Final = 15
GENERATION_MASK: Final = (1 << GENERATION_BITS) - 1
OFFSET_MASK: Final = (1 << OFFSET_BITS) - 1
EXTENT_MASK: Final = (1 << EXTENT_BITS) - 1
EXTENT_SHIFT: Final = OFFSET_BITS
_GENERATION_SHIFT: Final = OFFSET_BITS + EXTENT_BITS
GHOST_GENERATIONS: Final = 9
REGROWN_SKIP: Final = 10
HAND_STEPS: Final = 16
HASH_WINDOW: Final = 16
HASH_ENTRIES_PER_SLOT: Final = 1.75

# Zones of an extent.
NOWHERE: Final = 0
PROBATION: Final = 1
MAIN: Final = 2
DRAINING: Final = 3

# Places in `Tz.state`.
ROWS: Final = 0  # rows per extent
IN_RING: Final = 1  # probation extents
IN_MAIN: Final = 2  # main extents
RING_AT: Final = 3  # ring extent being overwritten
RING_OFFSET: Final = 4
HAND_AT: Final = 5  # main extent under the hand
HAND_OFFSET: Final = 6
FRESH_HEAD: Final = 7  # main extents with unused slots: fresh[head:tail]
FRESH_TAIL: Final = 8
IN_DRAIN: Final = 9
DRAIN_AT: Final = 10
DRAIN_OFFSET: Final = 11
GROWTHS: Final = 12  # sequence of growth marks
STACKED: Final = 13  # entries on the stack of growth marks
# Counters, never reset by the kernel.
HITS: Final = 16
MISSES: Final = 17
GHOST_HITS: Final = 18
CONFLICTS: Final = 19  # misses that found no place: not inserted
EVICTIONS: Final = 20  # rows overwritten
PROMOTIONS: Final = 21  # rows copied from probation to main
RELOCATIONS: Final = 22  # rows copied by planned shrinks
INSERTIONS: Final = 23
SWEPT: Final = 24  # slots the hand has passed
STATE_SIZE: Final = 32


class Tz(NamedTuple):
    """The arrays of one cache. Every function below takes it first; nothing else is state."""

    words: npt.NDArray[np.uint32]  # [extents * rows_per_extent] key:30 | cnt:2
    entries: npt.NDArray[np.int64]  # [num_keys] or [hash entries]
    hashed: npt.NDArray[np.uint32]  # [hash entries] key + 1, or [0] with the direct map
    fill: npt.NDArray[np.int32]  # [extents] valid slots
    generation: npt.NDArray[np.int32]  # [extents]
    zone: npt.NDArray[np.int8]  # [extents]
    ring: npt.NDArray[np.int32]  # [extents] probation in overwriting order
    order: npt.NDArray[np.int32]  # [extents] main in hand order
    fresh: npt.NDArray[np.int32]  # [extents] queue of main extents with unused slots
    drain: npt.NDArray[np.int32]  # [extents] extents a planned shrink is emptying
    grown: npt.NDArray[np.int64]  # [extents] growth mark, 0 when swept since
    stack: npt.NDArray[np.int64]  # [2 * extents] marks in order of growth: mark << 24 | extent
    state: npt.NDArray[np.int64]  # [STATE_SIZE]


def kernel(function: Function) -> Function:
    """Compiled without the interpreter lock, cached on disk, inlined where it is called.

    Inlining matters: a `Tz` travels as some 90 arguments, and without it a hit costs ten times
    more. `_nrt=False`: these functions allocate nothing, so they need no reference counting.
    """
    compiled: Any = numba.njit(
        function, nogil=True, cache=True, error_model="numpy", forceinline=True, _nrt=False
    )
    return compiled  # type: ignore[no-any-return]


def allocate(
    num_keys: int, max_extents: int, rows_per_extent: int, *, hash_index: bool = False
) -> Tz:
    """Arrays of an empty cache; memory is touched only as it is used.

    Raises ValueError when a size does not fit the packed words.
    """
    if not 1 <= num_keys <= MAX_KEYS:
        raise ValueError(
            f"a width class has {num_keys} rows, but keys have {KEY_BITS} bits: at most "
            f"{MAX_KEYS} rows per class. Split the tables over classes of different width"
        )
    if not 1 <= max_extents <= EXTENT_MASK:
        raise ValueError(f"max_extents is {max_extents}; it must be in 1..{EXTENT_MASK}")
    if not 1 <= rows_per_extent < OFFSET_MASK:
        raise ValueError(f"rows_per_extent is {rows_per_extent}; it must be 1..{OFFSET_MASK - 1}")
    slots = max_extents * rows_per_extent
    hash_entries = hash_index_entries(slots) if hash_index else 0
    if hash_entries >= 1 << 31:
        raise ValueError(f"{slots} slots are too many for the hash index; use the direct map")
    tz = Tz(
        words=np.zeros(slots, np.uint32),
        entries=np.zeros(hash_entries or num_keys, np.int64),
        hashed=np.zeros(hash_entries, np.uint32),
        fill=np.zeros(max_extents, np.int32),
        generation=np.zeros(max_extents, np.int32),
        zone=np.zeros(max_extents, np.int8),
        ring=np.zeros(max_extents, np.int32),
        order=np.zeros(max_extents, np.int32),
        fresh=np.zeros(max_extents, np.int32),
        drain=np.zeros(max_extents, np.int32),
        grown=np.zeros(max_extents, np.int64),
        stack=np.zeros(2 * max_extents, np.int64),
        state=np.zeros(STATE_SIZE, np.int64),
    )
    tz.state[ROWS] = rows_per_extent
    return tz


def hash_index_entries(slots: int) -> int:
    """Entries of the hash index (12 bytes each) for that many slots."""
    return max(4 * HASH_WINDOW, int(slots * HASH_ENTRIES_PER_SLOT))


def stack_of(caches: list[Tz]) -> Tz:
    """Equal-shaped caches as one `Tz` with a leading axis; `at` gives one of them back in njit."""
    return Tz(*(np.stack(arrays) for arrays in zip(*caches, strict=True)))


@kernel
def wide(value: Any) -> int:
    """As a signed 64-bit number: mixed with unsigned ones, numba would go to floating point."""
    return np.int64(value)  # type: ignore[return-value]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def at(stacked: Tz, index: int) -> Tz:
    """View of one cache of `stack_of`. Make it once per array of keys, not once per key."""
    return Tz(
        stacked.words[index],
        stacked.entries[index],
        stacked.hashed[index],
        stacked.fill[index],
        stacked.generation[index],
        stacked.zone[index],
        stacked.ring[index],
        stacked.order[index],
        stacked.fresh[index],
        stacked.drain[index],
        stacked.grown[index],
        stacked.stack[index],
        stacked.state[index],
    )


@kernel
def probation_extents(total: int) -> int:
    """Rule 2: a tenth of the extents, rounded, at least one of two; a single extent is main."""
    if total < 2:
        return 0
    return max(1, (total + 5) // 10)


@kernel
def _hash_home(tz: Tz, key: int) -> int:
    return (((key * 0x9E3779B1) & 0xFFFFFFFF) * tz.hashed.size) >> 32


@kernel
def find(tz: Tz, key: int) -> int:
    """Place of the key's entry in `tz.entries`, -1 when the hash index does not know the key."""
    size = tz.hashed.size
    if size == 0:
        return key
    place = _hash_home(tz, key)
    for _ in range(HASH_WINDOW):
        held = tz.hashed[place]
        if held == key + 1:
            return place
        if held == 0:
            return -1
        place += 1
        if place == size:
            place = 0
    return -1


@kernel
def entry_slot(tz: Tz, entry: int, key: int) -> int:
    """Slot the entry points at if that slot still holds the key, else -1 (rule 1)."""
    if entry == 0:
        return -1
    extent = (entry >> EXTENT_SHIFT) & EXTENT_MASK
    offset = (entry & OFFSET_MASK) - 1
    slot: int = extent * tz.state[ROWS] + offset
    if (wide(tz.words[slot]) >> 2) == key and offset < tz.fill[extent]:
        return slot
    return -1


@kernel
def ghost_age(tz: Tz, entry: int) -> int:
    """Generations since the entry's row was put into probation; 0 when it is no ghost."""
    if entry == 0:
        return 0
    extent = (entry >> EXTENT_SHIFT) & EXTENT_MASK
    if tz.zone[extent] != PROBATION:
        return 0
    age = (tz.generation[extent] - (entry >> _GENERATION_SHIFT)) & GENERATION_MASK
    return age if age <= GHOST_GENERATIONS else 0


@kernel
def lookup(tz: Tz, key: int) -> int:
    """Slot of the key, or -1; no counter changes."""
    place = find(tz, key)
    if place < 0:
        return -1
    return entry_slot(tz, tz.entries[place], key)


@kernel
def touch(tz: Tz, slot: int) -> None:
    """Counts a hit in the slot word (rule 1)."""
    word = tz.words[slot]
    if word & 3 != 3:
        tz.words[slot] = word + 1


@kernel
def claim(tz: Tz, key: int) -> int:
    """Place for the key's entry; -1 when its whole hash window is resident (a conflict)."""
    size = tz.hashed.size
    if size == 0:
        return key
    place = _hash_home(tz, key)
    dead = -1
    oldest = -1
    oldest_age = 0
    for _ in range(HASH_WINDOW):
        held = wide(tz.hashed[place])
        if held == key + 1:
            return place
        if held == 0:
            if dead < 0:
                dead = place
            break
        if dead < 0:
            entry = tz.entries[place]
            if entry_slot(tz, entry, held - 1) < 0:
                age = ghost_age(tz, entry)
                if age == 0:
                    dead = place
                elif age > oldest_age:
                    oldest_age = age
                    oldest = place
        place += 1
        if place == size:
            place = 0
    if dead < 0:
        dead = oldest
    if dead >= 0:
        tz.hashed[dead] = key + 1
        tz.entries[dead] = 0
    return dead


@kernel
def _point(tz: Tz, place: int, extent: int, offset: int) -> None:
    generation = wide(tz.generation[extent])
    tz.entries[place] = (
        (generation << _GENERATION_SHIFT) | (wide(extent) << EXTENT_SHIFT) | (offset + 1)
    )


@kernel
def free_slots(tz: Tz) -> int:
    """Unused slots of grown main extents, where misses and refill go first (rule 6)."""
    rows = tz.state[ROWS]
    total = 0
    for i in range(tz.state[FRESH_HEAD], tz.state[FRESH_TAIL]):
        total += rows - tz.fill[tz.fresh[i]]
    return total


@kernel
def fresh_slot(tz: Tz) -> tuple[int, int]:
    """Next unused slot of a grown main extent as (extent, offset), or (-1, 0)."""
    state = tz.state
    if state[FRESH_HEAD] == state[FRESH_TAIL]:
        return -1, 0
    extent = wide(tz.fresh[state[FRESH_HEAD]])
    offset = wide(tz.fill[extent])
    tz.fill[extent] = offset + 1
    if offset + 1 == state[ROWS]:
        state[FRESH_HEAD] += 1
    return extent, offset


@kernel
def _advance_hand(tz: Tz) -> None:
    state = tz.state
    state[SWEPT] += 1
    state[HAND_OFFSET] += 1
    if state[HAND_OFFSET] == state[ROWS]:
        tz.grown[tz.order[state[HAND_AT]]] = 0
        state[HAND_OFFSET] = 0
        state[HAND_AT] += 1
        if state[HAND_AT] == state[IN_MAIN]:
            state[HAND_AT] = 0


@kernel
def main_hole(tz: Tz) -> tuple[int, int]:
    """A slot of main to be overwritten as (extent, offset), or (-1, 0) without main (rule 4)."""
    extent, offset = fresh_slot(tz)
    state = tz.state
    if extent >= 0 or state[IN_MAIN] == 0:
        return extent, offset
    rows = state[ROWS]
    lowest = wide(4)
    for _ in range(HAND_STEPS):
        here = wide(tz.order[state[HAND_AT]])
        there = state[HAND_OFFSET]
        slot = here * rows + there
        count = wide(tz.words[slot]) & 3
        _advance_hand(tz)
        if count < lowest:
            lowest = count
            extent = here
            offset = there
        if count == 0:
            break
        tz.words[slot] -= np.uint32(1)
    slot = extent * rows + offset
    if tz.words[slot] >> 2 != MAX_KEYS:
        state[EVICTIONS] += 1
    return extent, offset


@kernel
def place_row(tz: Tz, key: int, count: int, extent: int, offset: int, place: int) -> int:
    slot: int = extent * tz.state[ROWS] + offset
    tz.words[slot] = (key << 2) | count
    _point(tz, place, extent, offset)
    return slot


@kernel
def insert(tz: Tz, key: int) -> tuple[int, int, int]:
    """Gives a missed key a slot (rule 3): (slot, source, target).

    `slot` is -1 when the key found no place. `target` >= 0 asks for the row in slot `source` to be
    copied to slot `target` before `slot` (which equals `source`) is overwritten.
    """
    state = tz.state
    if state[IN_MAIN] + state[IN_RING] == 0:
        state[CONFLICTS] += 1
        return -1, -1, -1
    place = claim(tz, key)
    if place < 0:
        state[CONFLICTS] += 1
        return -1, -1, -1
    state[INSERTIONS] += 1
    ghost = ghost_age(tz, tz.entries[place]) > 0
    if ghost:
        state[GHOST_HITS] += 1
    extent = wide(-1)
    offset = wide(0)
    if (ghost and state[IN_MAIN] > 0) or state[IN_RING] == 0:
        extent, offset = main_hole(tz)
    else:
        extent, offset = fresh_slot(tz)
    if extent >= 0:
        return place_row(tz, key, 0, extent, offset, place), -1, -1
    return _overwrite_ring(tz, key, place)


@kernel
def _overwrite_ring(tz: Tz, key: int, place: int) -> tuple[int, int, int]:
    state = tz.state
    rows = state[ROWS]
    extent = wide(tz.ring[state[RING_AT]])
    offset = state[RING_OFFSET]
    slot = extent * rows + offset
    if offset == 0:
        tz.generation[extent] = (tz.generation[extent] + 1) & GENERATION_MASK
    target = wide(-1)
    if offset == tz.fill[extent]:
        tz.fill[extent] = offset + 1
    else:
        word = wide(tz.words[slot])
        old = word >> 2
        if old != MAX_KEYS:
            # A row hit in probation is copied; it needs its entry, which the hash index may have
            # given away only if the row was not resident.
            if word & 3 != 0 and state[IN_MAIN] > 0:
                to_extent, to_offset = main_hole(tz)
                target = place_row(tz, old, 0, to_extent, to_offset, find(tz, old))
                state[PROMOTIONS] += 1
            else:
                state[EVICTIONS] += 1
    place_row(tz, key, 0, extent, offset, place)
    state[RING_OFFSET] += 1
    if state[RING_OFFSET] == rows:
        state[RING_OFFSET] = 0
        state[RING_AT] += 1
        if state[RING_AT] == state[IN_RING]:
            state[RING_AT] = 0
    return slot, (slot if target >= 0 else -1), target


@kernel
def access(tz: Tz, key: int) -> bool:
    """One access of a simulated cache: True on a hit; a miss is inserted."""
    slot = lookup(tz, key)
    if slot >= 0:
        tz.state[HITS] += 1
        touch(tz, slot)
        return True
    tz.state[MISSES] += 1
    insert(tz, key)
    return False
