"""How EMB extents are divided among width classes: by marginal miss cost.

A class gains from another extent what its ghost hits per extent cost: rows that were asked for
again shortly after they had gone. Were all classes divided well, `price * ghost hits / extents`
would be the same everywhere, so a class's share is proportional to `price * ghost hits`. The
counts change with the sizes, so the division is taken as it comes, growth by growth, and a
`rebalance` now and then does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

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


def weights(classes: Sequence[ClassDemand]) -> list[float]:
    """Share of the extents each class should have, before its bounds; they add up to 1."""
    demand = [c.price * (c.ghost_hits + MISS_WEIGHT * c.misses) for c in classes]
    total = sum(demand)
    table_bytes = sum(c.table_bytes for c in classes)
    by_bytes = [c.table_bytes / table_bytes for c in classes]
    if total <= 0.0:
        return by_bytes
    return [
        (1.0 - FLOOR) * wanted / total + FLOOR * share
        for wanted, share in zip(demand, by_bytes, strict=True)
    ]


def targets(
    classes: Sequence[ClassDemand], total: int, low: Sequence[int], high: Sequence[int]
) -> list[int]:
    """Extents per class: proportional to `weights`, within low..high, adding up to `total`.

    When the bounds do not let them add up, the upper ones give way first (extents that no class
    can use still have to be held by one), then the lower ones.
    """
    share = weights(classes)
    if sum(high) < total:
        spare = total - sum(high)
        extra = _round_to(spare, share)
        return [h + e for h, e in zip(high, extra, strict=True)]
    if sum(low) > total:
        return _round_to(total, [float(n) for n in low])
    result: list[float] = [0.0] * len(classes)
    open_classes = set(range(len(classes)))
    left = total
    while open_classes:
        scale = sum(share[i] for i in open_classes)
        wanted = {i: left * share[i] / scale for i in open_classes}
        over = {i: wanted[i] - high[i] for i in open_classes if wanted[i] > high[i]}
        under = {i: low[i] - wanted[i] for i in open_classes if wanted[i] < low[i]}
        if not over and not under:
            for i in open_classes:
                result[i] = wanted[i]
            break
        # The side that is further out is settled first: the other may come right by itself.
        fixed = over if sum(over.values()) >= sum(under.values()) else under
        bound = high if fixed is over else low
        for i in fixed:
            result[i] = bound[i]
            left -= bound[i]
            open_classes.discard(i)
    whole = [int(value) for value in result]
    for i in sorted(range(len(classes)), key=lambda i: whole[i] - result[i]):
        if sum(whole) < total and whole[i] < high[i]:
            whole[i] += 1
    for i in range(len(classes)):
        room = min(high[i] - whole[i], total - sum(whole))
        whole[i] += max(0, room)
    return whole


def growth(classes: Sequence[ClassDemand], count: int) -> list[int]:
    """How many of `count` new extents each class gets; no class loses any."""
    if len(classes) == 1:
        return [count]
    now = [c.extents for c in classes]
    high = [max(c.extents, c.most, c.least) for c in classes]
    low = [max(c.extents, c.least) for c in classes]
    total = sum(now) + count
    if sum(low) > total:
        # Not enough for everybody's least: the poorest first.
        given = [0] * len(classes)
        for _ in range(count):
            lacking = [c.least - c.extents - g for c, g in zip(classes, given, strict=True)]
            given[lacking.index(max(lacking))] += 1
        return given
    wanted = targets(classes, total, low, high)
    return [after - before for after, before in zip(wanted, now, strict=True)]


def shrinkage(classes: Sequence[ClassDemand], count: int) -> list[int]:
    """How many of `count` extents each class gives up; classes keep their least if they can."""
    now = [c.extents for c in classes]
    count = min(count, sum(now))
    if len(classes) == 1 or count == 0:
        return [count, *[0] * (len(classes) - 1)]
    low = [min(c.extents, c.least) for c in classes]
    wanted = targets(classes, sum(now) - count, low, now)
    return [before - after for before, after in zip(now, wanted, strict=True)]


def _round_to(total: int, share: Sequence[float]) -> list[int]:
    scale = sum(share)
    exact = [total * value / scale for value in share]
    whole = [int(value) for value in exact]
    rest = sorted(range(len(share)), key=lambda i: whole[i] - exact[i])
    for i in rest[: total - sum(whole)]:
        whole[i] += 1
    return whole
