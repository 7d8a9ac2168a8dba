"""Planned moves of a simulated node: what the pool does at a batch boundary (`host.split`).

EMB memory is counted in units: whole extents when all rows are simulated, single rows of the
sample otherwise (`units per extent` of them stand for one extent).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from hbm_policy.twin_users import Users, make_room
from hbm_pool.host.tz_extents import cancel_shrink, drain_rows, drop, grow, plan_shrink
from hbm_pool.host.tz_kernel import (
    FRESH_HEAD,
    FRESH_TAIL,
    ROWS,
    Tz,
    claim,
    free_slots,
    fresh_slot,
    kernel,
    lookup,
    place_row,
    wide,
)

from hbm_sim.lru_kernel import CAPACITY, USED, Lru, lru_evict, lru_fill

# Places in `Node.whole`: whole numbers of one node.
TARGET: Final = 0  # EMB extents wanted
EXTENTS: Final = 1  # EMB extents held, those being emptied included
UNITS: Final = 2  # units held
PROMISED: Final = 3  # units marked to be emptied
SPARE: Final = 4  # unit ids on the stack
DROP_ONLY: Final = 5
MOVING: Final = 6
MOVES: Final = 7
MOVED_EXTENTS: Final = 8
OLDEST: Final = 9  # queue position of the oldest request not begun at the newest arrival
WAITING: Final = 10  # requests between there and the newest that were not refused
REFILL_AT: Final = 11  # next of the refill candidates
REQUESTS: Final = 12
REFUSED: Final = 13
KV_HITS: Final = 14
TOKENS_REUSED: Final = 15
TOKENS_COMPUTED: Final = 16
CANDIDATES: Final = 17
LOOKED_UP: Final = 18  # sampled rows
MISSED: Final = 19  # sampled rows
REFILLED: Final = 20  # sampled rows
CRITICAL: Final = 21  # copies of the refiller that a request waited for
COPIES: Final = 22  # requests whose rows were copied
SLO_MET: Final = 23
RELOCATED: Final = 24
ANONYMOUS: Final = 25
NOTED: Final = 26  # accesses since heat was halved
UNCACHED: Final = 27
CONTEXT: Final = 28  # history tokens attended to, summed over computed tokens
WHOLE: Final = 32

# Places in `Node.real`.
GATHER_FREE: Final = 0  # ms
COMPUTE_FREE: Final = 1
REFILL_CREDIT: Final = 2  # bytes
REFILL_RATE: Final = 3  # bytes per ms
REFILL_DEBT: Final = 4  # part of a sampled row
IDLE_DEBT: Final = 5  # ms towards the next idle slice
LINK_BUSY: Final = 6  # ms in all
GATHER: Final = 7
COMPUTE: Final = 8
SERVICE: Final = 9
WAITED: Final = 10  # ms, moving average
SLICED: Final = 11  # ms that moves took from requests
REAL: Final = 16

# Places in `Node.fixed`: what does not change.
UNITS_PER_EXTENT: Final = 0
SLICE_UNITS: Final = 1  # rows that a slice looks at
GROWTH_EXTENTS: Final = 2
ALL_EXTENTS: Final = 3
RATE: Final = 4
ROW_BYTES: Final = 5
LINK: Final = 6  # bytes per ms
FIXED_MS: Final = 7
TOKEN_MS: Final = 8
CONTEXT_MS: Final = 9
ROW_MS: Final = 10
CAUSAL: Final = 11
OVERLAP: Final = 12
PAGE_TOKENS: Final = 13
TRIMS: Final = 14
SLICE_MS: Final = 15
IDLE_SLICE_MS: Final = 16
COPY_MS: Final = 17
QUEUE_LIMIT: Final = 18
LRU: Final = 19
SLO_MS: Final = 20
FIXED: Final = 24


class NodeArrays(NamedTuple):
    """Everything one node is."""

    tz: Tz
    lru: Lru
    users: Users  # of one candidate: itself
    spare: npt.NDArray[np.int32]  # stack of unused unit ids
    whole: npt.NDArray[np.int64]
    real: npt.NDArray[np.float64]
    fixed: npt.NDArray[np.float64]
    heat: npt.NDArray[np.float32]  # [S] accesses of late, for the refiller
    hottest: npt.NDArray[np.int32]  # refill candidates, best first
    stamp: npt.NDArray[np.int64]  # [S] request that looked the row up last
    missed: npt.NDArray[np.int32]  # scratch
    prints: npt.NDArray[np.uint32]  # scratch: fingerprints of one history
    cached: npt.NDArray[np.int64]  # scratch [1]
    copies: npt.NDArray[np.int64]  # scratch [3, slice]
    released: npt.NDArray[np.int32]  # scratch [units]


@kernel
def units_of(node: NodeArrays, extents: int) -> int:
    """Units of that many extents."""
    return wide(np.rint(extents * node.fixed[UNITS_PER_EXTENT]))


@kernel
def _settle_extents(node: NodeArrays) -> None:
    """After units came or went: which extents EMB still holds, and what is left for KV."""
    whole = node.whole
    if whole[UNITS] == units_of(node, whole[TARGET]):
        extents = whole[TARGET]
        if whole[MOVING] == 1:
            whole[MOVING] = 0
            whole[DROP_ONLY] = 0
            whole[MOVES] += 1
    else:
        extents = wide(np.ceil(whole[UNITS] / node.fixed[UNITS_PER_EXTENT] - 1e-9))
        if whole[TARGET] > extents:
            extents = wide(np.rint(whole[UNITS] / node.fixed[UNITS_PER_EXTENT]))
    whole[MOVED_EXTENTS] += abs(extents - whole[EXTENTS])
    whole[EXTENTS] = extents
    node.users.capacity[0] = wide(node.fixed[ALL_EXTENTS]) - extents


@kernel
def _give_back(node: NodeArrays, count: int) -> None:
    whole = node.whole
    for i in range(count):
        node.spare[whole[SPARE]] = node.released[i]
        whole[SPARE] += 1
    whole[UNITS] -= count


@kernel
def _shrink(node: NodeArrays, surplus: int) -> None:
    """One slice of giving units up."""
    whole = node.whole
    if node.fixed[LRU] == 1.0:
        count = surplus
        if whole[DROP_ONLY] == 0:
            count = min(surplus, wide(node.fixed[SLICE_UNITS]))
        lru = node.lru
        lru.state[CAPACITY] -= count
        if lru.state[USED] > lru.state[CAPACITY]:
            lru_evict(lru, lru.state[USED] - lru.state[CAPACITY])
        whole[UNITS] -= count
        return
    if whole[DROP_ONLY] == 1:
        done = drop(node.tz, surplus, node.released)
        whole[PROMISED] = max(0, whole[PROMISED] - done)
        _give_back(node, done)
        return
    if whole[PROMISED] > surplus:
        cancel_shrink(node.tz, node.released)
        whole[PROMISED] = 0
    if whole[PROMISED] < surplus:
        # Choosing costs as much as a slice; relocating begins at the next boundary.
        found = plan_shrink(node.tz, surplus - whole[PROMISED])
        whole[PROMISED] += found
        if found > 0:
            return
    limit = wide(node.fixed[SLICE_UNITS])
    _, copied, emptied = drain_rows(
        node.tz, limit, node.copies[0], node.copies[1], node.copies[2], node.released
    )
    whole[PROMISED] -= emptied
    whole[RELOCATED] += copied
    _give_back(node, emptied)


@kernel
def _grow(node: NodeArrays, missing: int) -> None:
    """EMB wins extents: KV's coldest users give them up."""
    whole = node.whole
    extents = missing
    if whole[DROP_ONLY] == 0:
        extents = min(missing, wide(node.fixed[GROWTH_EXTENTS]))
    after = whole[EXTENTS] + extents
    node.users.capacity[0] = wide(node.fixed[ALL_EXTENTS]) - after
    make_room(node.users, 0, 0, node.fixed[TRIMS] == 1.0)
    count = units_of(node, after) - whole[UNITS]
    if node.fixed[LRU] == 1.0:
        node.lru.state[CAPACITY] += count
    else:
        for i in range(count):
            whole[SPARE] -= 1
            node.released[i] = node.spare[whole[SPARE]]
        grow(node.tz, node.released[:count])
    whole[UNITS] += count


# Rare, so not inlined: that would double the time to compile the loop.
@numba.njit(nogil=True, cache=True, error_model="numpy", _nrt=False)  # type: ignore[untyped-decorator]
def slice_of_move(node: NodeArrays) -> None:
    """One batch boundary while a move is under way."""
    whole = node.whole
    surplus = whole[UNITS] - units_of(node, whole[TARGET])
    if surplus > 0:
        _shrink(node, surplus)
    else:
        if whole[PROMISED] > 0:
            cancel_shrink(node.tz, node.released)
            whole[PROMISED] = 0
        if surplus < 0:
            _grow(node, whole[TARGET] - whole[EXTENTS])
    _settle_extents(node)


@kernel
def unused_rows(node: NodeArrays) -> int:
    """Row places of grown extents that hold nothing yet."""
    if node.fixed[LRU] == 1.0:
        return wide(node.lru.state[CAPACITY] - node.lru.state[USED])
    state = node.tz.state
    if state[ROWS] == 1:
        return wide(state[FRESH_TAIL] - state[FRESH_HEAD])
    return free_slots(node.tz)


@numba.njit(nogil=True, cache=True, error_model="numpy", _nrt=False)  # type: ignore[untyped-decorator]
def refill(node: NodeArrays, rows: int) -> int:
    """Copies up to so many of the hottest absent rows into unused places. -> how many."""
    whole = node.whole
    done = wide(0)
    while done < rows and whole[REFILL_AT] < node.hottest.size:
        row = wide(node.hottest[whole[REFILL_AT]])
        whole[REFILL_AT] += 1
        if node.fixed[LRU] == 1.0:
            if lru_fill(node.lru, row):
                done += 1
        elif lookup(node.tz, row) < 0:
            place = claim(node.tz, row)
            extent, offset = fresh_slot(node.tz)
            if extent < 0:
                break
            place_row(node.tz, row, 0, extent, offset, place)
            done += 1
    whole[REFILLED] += done
    return done
