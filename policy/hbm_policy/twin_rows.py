"""The EMB half of the twin: K virtual row caches per width class over the hash-sampled rows.

Each runs the pool's own replacement rule (`hbm_pool.host.replacement`) row by row: as many slots
as the extents of that candidate hold rows, times the sampling rate, with the zones in the pool's
own proportion. Sampled row keys are numbered densely; the numbering is bounded, and the number of
a row that no virtual cache holds is given away when another one needs it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.records import RowClass
from hbm_pool.host.replacement import (
    Tz,
    allocate,
    drain_rows,
    grow,
    insert,
    lookup,
    plan_shrink,
    probation_extents,
    touch,
)
from hbm_pool.host.tz_kernel import (
    FRESH_HEAD,
    FRESH_TAIL,
    IN_MAIN,
    IN_RING,
    MAIN,
    NOWHERE,
    PROBATION,
    kernel,
    wide,
)

from hbm_policy.twin_users import home

Ints = npt.NDArray[np.int64]
LAST: Final = 1 << 40
"""Position of a candidate's row: behind the whole history."""
# Places in `Rows.counts`.
REQUEST: Final = 0  # number of the request being simulated
UNNUMBERED: Final = 1  # rows for which no number was left
COUNTS: Final = 2


class Rows(NamedTuple):
    """One width class. N numbers, K candidates, H hash entries."""

    caches: Tz  # leading axis K; entries [N, K], so that one row's K entries lie together
    slots: npt.NDArray[np.int64]  # [K] rows each holds
    key: npt.NDArray[np.uint64]  # [N] row key of a number, 0 with `taken` False
    taken: npt.NDArray[np.bool_]  # [N]
    stamp: npt.NDArray[np.int64]  # [N] request in which the row was seen last
    table: npt.NDArray[np.int32]  # [H] number + 1, 0: empty
    hand: npt.NDArray[np.int64]  # [1] next number to be given away
    counts: npt.NDArray[np.int64]  # [COUNTS]


def sampled_slots(extents: npt.NDArray[np.int64], rows_per_extent: float) -> Ints:
    """Slots of caches of that many extents, `[K]`; `rows_per_extent` is times the rate."""
    return np.maximum(np.round(extents * rows_per_extent), 2).astype(np.int64)


def allocate_rows(row_class: RowClass, class_extents: Ints, most_extents: int, rate: float) -> Rows:
    """Empty virtual caches of `class_extents[k]` extents each, scaled by the sampling rate.

    They may be resized to any size up to `most_extents`.
    """
    points = len(class_extents)
    per_extent = row_class.rows_per_extent * rate
    slots = sampled_slots(class_extents, per_extent)
    most = max(int(sampled_slots(np.array([most_extents]), per_extent)[0]), int(slots.max()))
    # Every sampled row of the catalogue (three standard deviations more than expected), or a
    # multiple of what the caches hold together where that is less.
    expected = row_class.catalogue_rows * rate
    numbers = int(min(expected + 3.0 * expected**0.5 + 16.0, 3.0 * most + 4096.0))
    numbers = max(numbers, most + 1)
    template = allocate(numbers, most, 1)
    arrays = {
        name: np.zeros((points, *array.shape), array.dtype)
        for name, array in template._asdict().items()
    }
    arrays["entries"] = np.zeros((numbers, points), np.int64)
    caches = Tz(**arrays)
    caches.state[:] = template.state
    for k in range(points):
        ring = probation_rows(int(class_extents[k]), int(slots[k]), per_extent)
        _seed(caches, k, ring, int(slots[k]))
    return Rows(
        caches=caches,
        slots=slots,
        key=np.zeros(numbers, np.uint64),
        taken=np.zeros(numbers, np.bool_),
        stamp=np.zeros(numbers, np.int64),
        table=np.zeros(1 << (2 * numbers - 1).bit_length(), np.int32),
        hand=np.zeros(1, np.int64),
        counts=np.zeros(COUNTS, np.int64),
    )


def probation_rows(extents: int, slots: int, rows_per_extent: float) -> int:
    """Slots on probation: those of the pool's own number of probation extents."""
    return min(max(round(probation_extents(extents) * rows_per_extent), 1), slots - 1)


def _seed(caches: Tz, k: int, ring: int, slots: int) -> None:
    """Slots 0..ring-1 are probation, the others empty main slots that misses fill first."""
    main = slots - ring
    caches.ring[k, :ring] = np.arange(ring)
    caches.zone[k, :ring] = PROBATION
    caches.order[k, :main] = np.arange(ring, slots)
    caches.fresh[k, :main] = np.arange(ring, slots)
    caches.zone[k, ring:slots] = MAIN
    caches.state[k, IN_RING] = ring
    caches.state[k, IN_MAIN] = main
    caches.state[k, FRESH_TAIL] = main


@kernel
def view(caches: Tz, k: int) -> Tz:
    """One of the K caches. Make it once per request, not once per row."""
    return Tz(
        caches.words[k],
        caches.entries[:, k],
        caches.hashed[k],
        caches.fill[k],
        caches.generation[k],
        caches.zone[k],
        caches.ring[k],
        caches.order[k],
        caches.fresh[k],
        caches.drain[k],
        caches.grown[k],
        caches.stack[k],
        caches.state[k],
    )


@kernel
def _find(rows: Rows, key: np.uint64) -> int:
    """Number of a row key, or -1."""
    mask = rows.table.size - 1
    place = home(wide(key), mask)
    while rows.table[place] != 0:
        number = wide(rows.table[place]) - 1
        if rows.key[number] == key:
            return number
        place = (place + 1) & mask
    return -1


@kernel
def _unname(rows: Rows, number: int) -> None:
    """Takes a number's key out of the table; closes the gap (no tombstones)."""
    mask = rows.table.size - 1
    place = home(wide(rows.key[number]), mask)
    while rows.table[place] != number + 1:
        place = (place + 1) & mask
    hole = place
    while True:
        place = (place + 1) & mask
        moved = wide(rows.table[place])
        if moved == 0:
            break
        wanted = home(wide(rows.key[moved - 1]), mask)
        if ((place - wanted) & mask) >= ((place - hole) & mask):
            rows.table[hole] = moved
            hole = place
    rows.table[hole] = 0
    rows.taken[number] = False


@kernel
def _resident(rows: Rows, number: int) -> bool:
    for k in range(rows.slots.size):
        if rows.caches.entries[number, k] != 0 and lookup(view(rows.caches, k), number) >= 0:
            return True
    return False


@kernel
def _spare_number(rows: Rows) -> int:
    """A number nobody uses: never given, or of a row that left all caches. -1: none found."""
    for _ in range(rows.key.size):
        number = wide(rows.hand[0])
        rows.hand[0] += 1
        if rows.hand[0] == rows.key.size:
            rows.hand[0] = 0
        if not rows.taken[number]:
            return number
        if rows.stamp[number] != rows.counts[REQUEST] and not _resident(rows, number):
            _unname(rows, number)
            for k in range(rows.slots.size):
                rows.caches.entries[number, k] = 0
            return number
    return -1


@kernel
def number_of(rows: Rows, key: np.uint64) -> int:
    """Number of a row key, a new one where it has none; -1 when all are in use."""
    number = _find(rows, key)
    if number >= 0:
        return number
    number = _spare_number(rows)
    if number < 0:
        rows.counts[UNNUMBERED] += 1
        return -1
    rows.key[number] = key
    rows.taken[number] = True
    rows.stamp[number] = 0
    mask = rows.table.size - 1
    place = home(wide(key), mask)
    while rows.table[place] != 0:
        place = (place + 1) & mask
    rows.table[place] = number + 1
    return number


@kernel
def list_row(
    rows: Rows,
    key: np.uint64,
    position: int,
    used: int,
    numbers: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
) -> int:
    """Adds a row of the present request to its list, once. -> new length.

    Rows come in order of falling position, so the one that stays is the last: a batch counts one
    hit per row, and a cache that reuses c tokens looks the row up if any position is c or later.
    """
    number = number_of(rows, key)
    if number >= 0:
        if rows.stamp[number] == rows.counts[REQUEST]:
            return used
        rows.stamp[number] = rows.counts[REQUEST]
    numbers[used] = number
    positions[used] = position
    return used + 1


@kernel
def serve_rows(
    rows: Rows,
    k: int,
    cached: int,
    used: int,
    numbers: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    missed: npt.NDArray[np.int64],
) -> tuple[int, int, int]:
    """Candidate k looks up the listed rows at `cached` or later.

    -> (rows missed of the history, of the candidates, rows looked up).

    As in the pool, all rows are looked up before the missed ones are inserted, and one request
    fills what is unused and goes at most once round the ring. `missed` is scratch.
    """
    cache = view(rows.caches, k)
    in_history = wide(0)
    in_candidates = wide(0)
    misses = wide(0)
    looked_up = wide(0)
    for i in range(used):
        if positions[i] < cached:
            break
        looked_up += 1
        number = numbers[i]
        slot = lookup(cache, number) if number >= 0 else wide(-1)
        if slot >= 0:
            touch(cache, slot)
            continue
        if positions[i] == LAST:
            in_candidates += 1
        else:
            in_history += 1
        if number >= 0:
            missed[misses] = number
            misses += 1
    state = cache.state
    room = state[FRESH_TAIL] - state[FRESH_HEAD] + max(1, state[IN_RING])
    for i in range(min(misses, room)):
        insert(cache, missed[i])
    return in_history, in_candidates, looked_up


def resize_rows(rows: Rows, k: int, slots: int) -> None:
    """Gives one of the K caches another number of slots, by the pool's own planned moves."""
    cache = Tz(*(array[k] for array in rows.caches))
    # A copy in one piece: the pool's own compiled functions take it.
    entries = rows.caches.entries[:, k].copy()
    cache = cache._replace(entries=entries)
    change = slots - int(rows.slots[k])
    if change > 0:
        grow(cache, np.flatnonzero(cache.zone == NOWHERE)[:change].astype(np.int32))
    elif change < 0:
        count = plan_shrink(cache, -change)
        copies = np.empty((3, count), np.int64)
        released = np.empty(count, np.int32)
        drain_rows(cache, count, copies[0], copies[1], copies[2], released)
    rows.caches.entries[:, k] = entries
    rows.slots[k] = slots
