"""How EMB extents are divided among width classes: by marginal miss cost.

A class gains from another extent what its ghost hits per extent cost: rows that were asked for
again shortly after they had gone. Were all classes divided well, `price * ghost hits / extents`
would be the same everywhere, so a class's share is proportional to `price * ghost hits`. The
counts change with the sizes, so the division is taken as it comes, growth by growth, and a
`rebalance` now and then does the rest.

Compiled, since it is part of every hand-over: a class is a row of `_EXTENTS .. _TABLE_BYTES` there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

MISS_WEIGHT: Final = 0.02
"""Of a miss that is no ghost hit: most are rows that no sensible size would hold."""
FLOOR: Final = 1e-3
"""Share of the weight that a class has by the bytes of its tables alone."""


class ClassDemand(NamedTuple):
    """What is known of one class."""

    extents: int
    price: float
    """Cost of one missed row, in any unit common to the classes."""
    ghost_hits: float
    """Lately; `misses` likewise."""
    misses: float
    most: int
    """Extents that hold the whole catalogue: more would stay empty."""
    least: int
    table_bytes: int


_EXTENTS, _PRICE, _GHOSTS, _MISSES, _MOST, _LEAST, _TABLE_BYTES = range(len(ClassDemand._fields))
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def weights(classes: Sequence[ClassDemand]) -> list[float]:
    """Share of the extents each class should have, before its bounds; they add up to 1."""
    return list(_weights(np.array(classes, np.float64)).tolist())


def targets(
    classes: Sequence[ClassDemand], total: int, low: Sequence[int], high: Sequence[int]
) -> list[int]:
    """Extents per class: proportional to `weights`, within low..high, adding up to `total`.

    When the bounds do not let them add up, the upper ones give way first (extents that no class
    can use still have to be held by one), then the lower ones.
    """
    share = _weights(np.array(classes, np.float64))
    bounds = np.array((low, high), np.float64)
    return _whole(_targets(share, total, bounds[0], bounds[1]))


def growth(classes: Sequence[ClassDemand], count: int) -> list[int]:
    """How many of `count` new extents each class gets; no class loses any."""
    if len(classes) == 1:
        return [count]
    return _whole(_growth(np.array(classes, np.float64), count))


def shrinkage(classes: Sequence[ClassDemand], count: int) -> list[int]:
    """How many of `count` extents each class gives up; classes keep their least if they can."""
    if len(classes) == 1:
        return [min(count, classes[0].extents)]
    return _whole(_shrinkage(np.array(classes, np.float64), count))


def _whole(counts: Any) -> list[int]:
    return list(counts.tolist())


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _weights(classes: Floats) -> Floats:
    table_bytes = classes[:, _TABLE_BYTES]
    by_bytes: Floats = table_bytes / table_bytes.sum()
    demand = classes[:, _PRICE] * (classes[:, _GHOSTS] + MISS_WEIGHT * classes[:, _MISSES])
    total = demand.sum()
    if total <= 0.0:
        return by_bytes
    shares: Floats = (1.0 - FLOOR) * demand / total + FLOOR * by_bytes
    return shares


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _round_to(total: int, share: Floats) -> Counts:
    """Whole numbers proportional to `share` that add up to `total`, by largest remainder."""
    exact = total * share / share.sum()
    whole: Counts = exact.astype(np.int64)
    rest = np.argsort(whole - exact, kind="mergesort")
    for i in rest[: total - whole.sum()]:
        whole[i] += 1
    return whole


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _targets(share: Floats, total: int, low: Floats, high: Floats) -> Counts:
    size = share.size
    if high.sum() < total:
        spare: Counts = _round_to(total - int(high.sum()), share)
        return spare + high.astype(np.int64)
    if low.sum() > total:
        reduced: Counts = _round_to(total, low)
        return reduced
    exact = np.zeros(size)
    settled = np.zeros(size, np.bool_)
    left = float(total)
    while not settled.all():
        scale = share[~settled].sum()
        over = under = 0.0
        for i in range(size):
            if not settled[i]:
                exact[i] = left * share[i] / scale
                over += max(0.0, exact[i] - high[i])
                under += max(0.0, low[i] - exact[i])
        if over == 0.0 and under == 0.0:
            break
        # The side that is further out is settled first: the other may come right by itself.
        settles_over = over >= under
        taken = 0.0
        for i in range(size):
            out = exact[i] > high[i] if settles_over else exact[i] < low[i]
            if not settled[i] and out:
                settled[i] = True
                exact[i] = high[i] if settles_over else low[i]
                taken += exact[i]
        left -= taken
    whole: Counts = exact.astype(np.int64)
    missing = total - int(whole.sum())
    for i in np.argsort(whole - exact, kind="mergesort"):
        if missing > 0 and whole[i] < high[i]:
            whole[i] += 1
            missing -= 1
    for i in range(size):
        more = max(0, min(int(high[i]) - int(whole[i]), missing))
        whole[i] += more
        missing -= more
    return whole


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _growth(classes: Floats, count: int) -> Counts:
    now = classes[:, _EXTENTS]
    least = classes[:, _LEAST]
    low = np.maximum(now, least)
    high = np.maximum(low, classes[:, _MOST])
    total = int(now.sum()) + count
    if low.sum() > total:
        # Not enough for everybody's least: the poorest first.
        given = np.zeros(now.size, np.int64)
        for _ in range(count):
            given[np.argmax(least - now - given)] += 1
        return given
    wanted: Counts = _targets(_weights(classes), total, low, high) - now.astype(np.int64)
    return wanted


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _shrinkage(classes: Floats, count: int) -> Counts:
    now = classes[:, _EXTENTS]
    held = int(now.sum())
    gone = min(count, held)
    if gone == 0:
        return np.zeros(now.size, np.int64)
    low = np.minimum(now, classes[:, _LEAST])
    given: Counts = now.astype(np.int64) - _targets(_weights(classes), held - gone, low, now)
    return given
