"""Rows under plain LRU, one linked list over arrays: what the production rule is compared with."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_pool.host.tz_kernel import kernel

# Places in `Lru.state`.
CAPACITY: Final = 0
USED: Final = 1


class Lru(NamedTuple):
    """S rows; S itself ends the list: before it is the hottest row, behind it the coldest."""

    older: npt.NDArray[np.int32]  # [S + 1]
    newer: npt.NDArray[np.int32]  # [S + 1]
    held: npt.NDArray[np.bool_]  # [S]
    state: npt.NDArray[np.int64]  # [2]


def allocate_lru(rows: int, capacity: int) -> Lru:
    """An empty cache of that many of the rows."""
    lru = Lru(
        older=np.full(rows + 1, rows, np.int32),
        newer=np.full(rows + 1, rows, np.int32),
        held=np.zeros(rows, np.bool_),
        state=np.zeros(2, np.int64),
    )
    lru.state[CAPACITY] = capacity
    return lru


@kernel
def _unlink(lru: Lru, row: int) -> None:
    older, newer = lru.older[row], lru.newer[row]
    lru.newer[older] = newer
    lru.older[newer] = older


@kernel
def _link_hottest(lru: Lru, row: int) -> None:
    end = lru.held.size
    hottest = lru.older[end]
    lru.older[row] = hottest
    lru.newer[row] = end
    lru.newer[hottest] = row
    lru.older[end] = row


@kernel
def lru_lookup(lru: Lru, row: int) -> bool:
    """True on a hit, which makes the row the hottest."""
    if not lru.held[row]:
        return False
    _unlink(lru, row)
    _link_hottest(lru, row)
    return True


@kernel
def lru_evict(lru: Lru, count: int) -> None:
    """Drops so many of the coldest rows."""
    end = lru.held.size
    for _ in range(count):
        coldest = lru.newer[end]
        _unlink(lru, coldest)
        lru.held[coldest] = False
        lru.state[USED] -= 1


@kernel
def lru_insert(lru: Lru, row: int) -> None:
    """A missed row becomes the hottest."""
    if lru.held[row] or lru.state[CAPACITY] == 0:
        return
    if lru.state[USED] >= lru.state[CAPACITY]:
        lru_evict(lru, 1)
    lru.held[row] = True
    lru.state[USED] += 1
    _link_hottest(lru, row)


@kernel
def lru_fill(lru: Lru, row: int) -> bool:
    """A refilled row takes an unused place as the coldest. False: resident, or no place."""
    if lru.held[row] or lru.state[USED] >= lru.state[CAPACITY]:
        return False
    end = lru.held.size
    coldest = lru.newer[end]
    lru.newer[row] = coldest
    lru.older[row] = end
    lru.older[coldest] = row
    lru.newer[end] = row
    lru.held[row] = True
    lru.state[USED] += 1
    return True
