"""TZ, continued: extents that come and go (rules 5 and 6 of `tz_kernel`), and integrity."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .tz_batch import keep_last
from .tz_kernel import (
    DRAIN_AT,
    DRAIN_OFFSET,
    DRAINING,
    EMPTY_WORD,
    EXTENT_BITS,
    EXTENT_MASK,
    FRESH_HEAD,
    FRESH_TAIL,
    GENERATION_MASK,
    GROWTHS,
    HAND_AT,
    HAND_OFFSET,
    IN_DRAIN,
    IN_MAIN,
    IN_RING,
    MAIN,
    MAX_KEYS,
    NOWHERE,
    PROBATION,
    REGROWN_SKIP,
    RELOCATIONS,
    RING_AT,
    RING_OFFSET,
    ROWS,
    STACKED,
    Tz,
    find,
    kernel,
    lookup,
    main_hole,
    place_row,
    probation_extents,
    wide,
)


@kernel
def _open_gap(array: npt.NDArray[np.int32], used: int, start: int, width: int) -> None:
    for i in range(used - 1, start - 1, -1):
        array[i + width] = array[i]


@kernel
def _into_ring(tz: Tz, extents: npt.NDArray[np.int32]) -> None:
    """Puts extents where the ring overwrites next."""
    state = tz.state
    count = extents.size
    start = state[RING_AT]
    if state[IN_RING] > 0 and state[RING_OFFSET] > 0:
        start += 1
    _open_gap(tz.ring, state[IN_RING], start, count)
    for i in range(count):
        tz.ring[start + i] = extents[i]
        tz.zone[extents[i]] = PROBATION
    state[IN_RING] += count


@kernel
def _behind_hand(tz: Tz, extents: npt.NDArray[np.int32]) -> None:
    """Puts extents where the hand comes last; the extent under the hand keeps its place."""
    state = tz.state
    count = extents.size
    start = state[HAND_AT]
    _open_gap(tz.order, state[IN_MAIN], start, count)
    for i in range(count):
        tz.order[start + i] = extents[i]
        tz.zone[extents[i]] = MAIN
    if state[IN_MAIN] > 0:
        state[HAND_AT] += count
    state[IN_MAIN] += count


@kernel
def _mark_grown(tz: Tz, extent: int) -> None:
    state = tz.state
    if state[STACKED] == tz.stack.size:
        kept = 0
        for i in range(state[STACKED]):
            item = tz.stack[i]
            if tz.grown[item & EXTENT_MASK] == item >> EXTENT_BITS:
                tz.stack[kept] = item
                kept += 1
        state[STACKED] = kept
    state[GROWTHS] += 1
    tz.grown[extent] = state[GROWTHS]
    tz.stack[state[STACKED]] = (state[GROWTHS] << EXTENT_BITS) | extent
    state[STACKED] += 1


@kernel
def _keep_fresh(tz: Tz) -> None:
    """Moves the queue of fresh extents to the front of its array and drops those that left."""
    state = tz.state
    kept = 0
    for i in range(state[FRESH_HEAD], state[FRESH_TAIL]):
        extent = tz.fresh[i]
        if tz.zone[extent] == MAIN and tz.fill[extent] < state[ROWS]:
            tz.fresh[kept] = extent
            kept += 1
    state[FRESH_HEAD] = 0
    state[FRESH_TAIL] = kept


@kernel
def grow(tz: Tz, extents: npt.NDArray[np.int32]) -> None:
    """Takes over extents, whatever their slot words hold (rule 6). O(extents)."""
    state = tz.state
    total = state[IN_RING] + state[IN_MAIN] + extents.size
    to_ring = min(extents.size, max(0, probation_extents(total) - state[IN_RING]))
    for i in range(extents.size):
        extent = extents[i]
        tz.fill[extent] = 0
        tz.generation[extent] = (tz.generation[extent] + REGROWN_SKIP) & GENERATION_MASK
    _into_ring(tz, extents[:to_ring])
    _keep_fresh(tz)
    _behind_hand(tz, extents[to_ring:])
    for i in range(to_ring, extents.size):
        tz.fresh[state[FRESH_TAIL]] = extents[i]
        state[FRESH_TAIL] += 1
        _mark_grown(tz, wide(extents[i]))


@kernel
def _compact(array: npt.NDArray[np.int32], zone: npt.NDArray[np.int8], used: int, kind: int) -> int:
    kept = 0
    for i in range(used):
        if zone[array[i]] == kind:
            array[kept] = array[i]
            kept += 1
    return kept


@kernel
def _take(tz: Tz, count: int, victims: npt.NDArray[np.int32]) -> int:
    """Chooses extents to give up and takes them out of their zones (rule 5). -> how many."""
    state = tz.state
    total = state[IN_RING] + state[IN_MAIN]
    count = min(count, total)
    from_ring = min(state[IN_RING], max(0, state[IN_RING] - probation_extents(total - count)))
    from_main = count - from_ring
    if from_main > state[IN_MAIN]:
        from_ring += from_main - state[IN_MAIN]
        from_main = state[IN_MAIN]
    taken = 0
    # Oldest probation: what the ring would overwrite next; the extent it is in comes last.
    at = state[RING_AT]
    if state[RING_OFFSET] > 0:
        at += 1
    for _ in range(from_ring):
        if at >= state[IN_RING]:
            at = 0
        extent = tz.ring[at]
        tz.zone[extent] = NOWHERE
        victims[taken] = extent
        taken += 1
        at += 1
    # Last-grown main extents, newest first.
    while taken < count and state[STACKED] > 0:
        state[STACKED] -= 1
        item = tz.stack[state[STACKED]]
        extent = np.int32(item & EXTENT_MASK)
        if tz.grown[extent] == item >> EXTENT_BITS and tz.zone[extent] == MAIN:
            tz.zone[extent] = NOWHERE
            victims[taken] = extent
            taken += 1
    # Then the order of the hand.
    at = state[HAND_AT]
    while taken < count:
        extent = tz.order[at]
        if tz.zone[extent] == MAIN:
            tz.zone[extent] = NOWHERE
            victims[taken] = extent
            taken += 1
        at += 1
        if at == state[IN_MAIN]:
            at = 0
    for i in range(taken):
        tz.grown[victims[i]] = 0
    _close_ring(tz)
    _close_main(tz)
    _keep_fresh(tz)
    return taken


@kernel
def _close_ring(tz: Tz) -> None:
    """Removes extents that left from the ring; it goes on where it was, or at the next one."""
    state = tz.state
    used = state[IN_RING]
    before = 0
    for i in range(min(state[RING_AT], used)):
        if tz.zone[tz.ring[i]] == PROBATION:
            before += 1
    if used > 0 and tz.zone[tz.ring[state[RING_AT]]] != PROBATION:
        state[RING_OFFSET] = 0
    state[IN_RING] = _compact(tz.ring, tz.zone, used, PROBATION)
    state[RING_AT] = before if before < state[IN_RING] else 0


@kernel
def _close_main(tz: Tz) -> None:
    state = tz.state
    used = state[IN_MAIN]
    before = 0
    for i in range(min(state[HAND_AT], used)):
        if tz.zone[tz.order[i]] == MAIN:
            before += 1
    if used > 0 and tz.zone[tz.order[state[HAND_AT]]] != MAIN:
        state[HAND_OFFSET] = 0
    state[IN_MAIN] = _compact(tz.order, tz.zone, used, MAIN)
    state[HAND_AT] = before if before < state[IN_MAIN] else 0


@kernel
def drop(tz: Tz, count: int, released: npt.NDArray[np.int32]) -> int:
    """Gives up extents with all their rows, for emergencies. O(extents). -> how many.

    Extents a planned shrink was emptying go first: their rows are on the way out already.
    """
    state = tz.state
    done = 0
    while done < count and state[DRAIN_AT] < state[IN_DRAIN]:
        state[IN_DRAIN] -= 1
        released[done] = tz.drain[state[IN_DRAIN]]
        done += 1
        if state[DRAIN_AT] == state[IN_DRAIN]:
            state[DRAIN_OFFSET] = 0
    if state[DRAIN_AT] == state[IN_DRAIN]:
        state[DRAIN_AT] = 0
        state[IN_DRAIN] = 0
    done += _take(tz, count - done, released[done:])
    for i in range(done):
        tz.fill[released[i]] = 0
        tz.zone[released[i]] = NOWHERE
    return done


@kernel
def plan_shrink(tz: Tz, count: int) -> int:
    """Marks extents to be emptied by `drain_rows`; their rows still hit until then. -> how many."""
    state = tz.state
    if state[DRAIN_AT] > 0:
        left = state[IN_DRAIN] - state[DRAIN_AT]
        for i in range(left):
            tz.drain[i] = tz.drain[state[DRAIN_AT] + i]
        state[DRAIN_AT] = 0
        state[IN_DRAIN] = left
    taken = _take(tz, count, tz.drain[state[IN_DRAIN] :])
    for i in range(taken):
        tz.zone[tz.drain[state[IN_DRAIN] + i]] = DRAINING
    state[IN_DRAIN] += taken
    return taken


@kernel
def cancel_shrink(tz: Tz, back: npt.NDArray[np.int32]) -> int:
    """Puts extents not yet emptied back into their zones; `back` is scratch. -> how many."""
    state = tz.state
    left: int = state[IN_DRAIN] - state[DRAIN_AT]
    for i in range(left):
        back[i] = tz.drain[state[DRAIN_AT] + i]
    state[DRAIN_AT] = 0
    state[IN_DRAIN] = 0
    state[DRAIN_OFFSET] = 0
    total = state[IN_RING] + state[IN_MAIN] + left
    to_ring = min(left, max(0, probation_extents(total) - state[IN_RING]))
    rows = state[ROWS]
    for i in range(left):
        # Main and ring hold only full extents outside the fresh queue; what a fresh extent never
        # held becomes an empty slot.
        extent = back[i]
        for slot in range(extent * rows + tz.fill[extent], (extent + 1) * rows):
            tz.words[slot] = EMPTY_WORD
        tz.fill[extent] = rows
    _into_ring(tz, back[:to_ring])
    _behind_hand(tz, back[to_ring:left])
    return left


@kernel
def drain_rows(
    tz: Tz,
    limit: int,
    sources: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    moved: npt.NDArray[np.int64],
    released: npt.NDArray[np.int32],
) -> tuple[int, int, int]:
    """One slice of a planned shrink: looks at up to `limit` slots (rule 5).

    Referenced rows get a main hole and lose one count; `sources[:c]`, `targets[:c]` ask for the
    copies, all reads before all writes; `moved` is scratch of the same size.
    -> (slots looked at, copies c, extents emptied).
    """
    state = tz.state
    rows = state[ROWS]
    looked = 0
    copies = 0
    emptied = 0
    while state[DRAIN_AT] < state[IN_DRAIN] and looked < limit:
        extent = wide(tz.drain[state[DRAIN_AT]])
        end = min(wide(tz.fill[extent]), state[DRAIN_OFFSET] + limit - looked)
        for offset in range(state[DRAIN_OFFSET], end):
            slot = extent * rows + offset
            word = wide(tz.words[slot])
            key = word >> 2
            if word & 3 != 0 and key != MAX_KEYS:
                to_extent, to_offset = main_hole(tz)
                if to_extent >= 0:
                    place = find(tz, key)
                    target = place_row(tz, key, (word & 3) - 1, to_extent, to_offset, place)
                    sources[copies] = slot
                    targets[copies] = target
                    moved[copies] = key
                    copies += 1
            tz.words[slot] = EMPTY_WORD
        looked += max(end - state[DRAIN_OFFSET], 0)
        state[DRAIN_OFFSET] = end
        if end >= tz.fill[extent]:
            tz.fill[extent] = 0
            tz.zone[extent] = NOWHERE
            released[emptied] = extent
            emptied += 1
            state[DRAIN_AT] += 1
            state[DRAIN_OFFSET] = 0
    state[RELOCATIONS] += copies
    if state[DRAIN_AT] == state[IN_DRAIN]:
        state[DRAIN_AT] = 0
        state[IN_DRAIN] = 0
    return looked, keep_last(tz, sources, targets, moved, copies), emptied


def resident(tz: Tz) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows held, as (keys, slots), by scanning every held extent."""
    rows = int(tz.state[ROWS])
    slots: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    for extent in np.flatnonzero(tz.zone != NOWHERE):
        slots.append(extent * rows + np.arange(tz.fill[extent], dtype=np.int64))
    every = np.concatenate(slots)
    keys = tz.words[every].astype(np.int64) >> 2
    used = keys != MAX_KEYS
    return keys[used], every[used]


@kernel
def _unreachable(tz: Tz, keys: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]) -> int:
    for i in range(keys.size):
        if lookup(tz, keys[i]) != slots[i]:
            return i
    return -1


def violations(tz: Tz) -> list[str]:
    """What is wrong with the structure, in words; empty when it is sound. O(slots)."""
    found: list[str] = []
    state = tz.state
    rows = int(state[ROWS])
    zones = (
        ("ring", tz.ring[: state[IN_RING]], PROBATION),
        ("main", tz.order[: state[IN_MAIN]], MAIN),
        ("drain", tz.drain[state[DRAIN_AT] : state[IN_DRAIN]], DRAINING),
    )
    for name, extents, kind in zones:
        members = np.flatnonzero(tz.zone == kind)
        if not np.array_equal(np.sort(extents), members):
            found.append(f"{name} lists {extents.size} extents, {members.size} are in that zone")
    for name, at, size in (
        ("ring", RING_AT, int(state[IN_RING])),
        ("hand", HAND_AT, int(state[IN_MAIN])),
    ):
        if not 0 <= state[at] < max(1, size):
            found.append(f"the {name} stands at {int(state[at])} of {size}")
        if not 0 <= state[at + 1] < rows:
            found.append(f"the {name} stands at row {int(state[at + 1])} of {rows}")
    fresh = tz.fresh[state[FRESH_HEAD] : state[FRESH_TAIL]]
    partial = np.flatnonzero((tz.zone == MAIN) & (tz.fill < rows))
    if not np.array_equal(np.sort(fresh), partial):
        found.append(f"{fresh.size} extents wait to be filled, {partial.size} are not full")
    if np.any(tz.fill[tz.zone == NOWHERE]):
        found.append("an extent that was given up still has valid slots")
    if np.any(tz.fill > rows) or np.any(tz.fill < 0):
        found.append(f"an extent has more than {rows} valid slots")
    keys, slots = resident(tz)
    twice = keys.size - np.unique(keys).size
    if twice:
        found.append(f"{twice} rows are resident twice")
    lost = _unreachable(tz, keys, slots)
    if lost >= 0:
        found.append(f"row {int(keys[lost])} in slot {int(slots[lost])} cannot be looked up")
    return found
