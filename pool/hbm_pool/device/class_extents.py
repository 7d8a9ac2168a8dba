"""Extents of the embedding cache among its width classes: growth, planned shrink, drop, rebalance.

Nothing here locks; the cache's lock is held around every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from hbm_pool.device.row_index import Extents
from hbm_pool.device.width_class import EmbClass
from hbm_pool.host import class_shares
from hbm_pool.host.class_shares import ClassDemand

REBALANCE_DEAD_BAND: Final = 0.05
"""A class within this part of its share is left alone: counts are noisy and copies cost."""
REBALANCE_EXTENTS: Final = 8
"""Extents that a rebalance empties before it looks at the counts again."""


class Emptied(NamedTuple):
    """What one or more slices of draining have emptied."""

    released: Extents
    """For the caller of a planned shrink."""
    handed_over: int
    """Given to another class."""


class ClassExtents:
    """Which class holds how many extents, and how many are promised to the caller of a shrink."""

    def __init__(self, classes: Sequence[EmbClass]) -> None:
        self._classes = classes
        self._owed = 0  # promised by `plan_shrink` and not yet released

    @property
    def total(self) -> int:
        """Extents held, those being emptied included."""
        return sum(kind.num_extents for kind in self._classes)

    @property
    def draining(self) -> int:
        """Extents being emptied."""
        return sum(kind.index.draining_extents for kind in self._classes)

    def grow(self, extents: Extents) -> None:
        """Divides new extents by marginal miss cost."""
        if len(self._classes) == 1:
            self._classes[0].index.grow(extents)
        else:
            self._give(self._demands(), extents)

    def plan_shrink(self, n: int) -> int:
        """Chooses `n` more extents to be emptied; those on their way to another class first."""
        _check_count(n)
        before = self._owed
        self._owed += min(n, self.draining - before)
        missing = n - (self._owed - before)
        shares = class_shares.shrinkage(self._demands(), missing)
        for kind, count in zip(self._classes, shares, strict=True):
            if count:
                self._owed += kind.index.plan_shrink(count)
        return self._owed - before

    def cancel_shrink(self) -> int:
        """Keeps what is not empty yet; returns how many extents had been promised."""
        for kind in self._classes:
            kind.index.cancel_shrink()
        kept = self._owed
        self._owed = 0
        return kept

    def drain_slice(self, slots: int, *, rebalancing: bool) -> Emptied | None:
        """Looks at `slots` slots of one class; None when there is nothing to empty.

        What nobody is owed goes to the class that lacks most. A rebalance stops as soon as a
        shrink has been planned beside it: the extents belong to that then.
        """
        if rebalancing and self._owed:
            return None
        kind = next((k for k in self._classes if k.index.draining_extents), None)
        if kind is None:
            return None
        emptied = kind.index.drain(slots).released
        released, spare = emptied[: self._owed], emptied[self._owed :]
        self._owed -= released.size
        if spare.size:
            demands = self._demands()
            demands[kind.number] = demands[kind.number]._replace(most=0)
            self._give(demands, spare)
        return Emptied(released, spare.size)

    def plan_rebalance(self) -> bool:
        """Starts to empty extents of the class that has most beyond its share; False when all are
        close to theirs, or a shrink is under way."""
        if self._owed or len(self._classes) < 2:
            return False
        if self.draining:
            return True
        demands = self._demands()
        total = sum(demand.extents for demand in demands)
        wanted = class_shares.targets(
            demands,
            total,
            [min(demand.extents, demand.least) for demand in demands],
            [demand.most for demand in demands],
        )
        surplus = [d.extents - share for d, share in zip(demands, wanted, strict=True)]
        most = max(surplus)
        richest = surplus.index(most)
        if most <= max(1.0, REBALANCE_DEAD_BAND * demands[richest].extents):
            return False
        return self._classes[richest].index.plan_shrink(min(most, REBALANCE_EXTENTS)) > 0

    def drop(self, n: int) -> Extents:
        """Gives up `n` extents at once: those being emptied, then by least marginal miss cost."""
        _check_count(n)
        if len(self._classes) == 1:
            released = self._classes[0].index.drop(n)
            self._owed = max(0, self._owed - released.size)
            return released
        first = []
        left = n
        for kind in self._classes:
            first.append(min(left, kind.index.draining_extents))
            left -= first[-1]
        rest = class_shares.shrinkage(self._demands(), left)
        given = [
            kind.index.drop(draining + more)
            for kind, draining, more in zip(self._classes, first, rest, strict=True)
            if draining + more
        ]
        released = np.concatenate([np.empty(0, np.int32), *given])
        self._owed = max(0, self._owed - released.size)
        return released

    def reset(self) -> None:
        """Every class keeps its extents and forgets its rows."""
        self._owed = 0
        for kind in self._classes:
            kind.index.grow(np.sort(kind.index.drop(kind.num_extents)))

    def violations(self) -> list[str]:
        """What is wrong, in words."""
        found = []
        owner: dict[int, int] = {}
        for kind in self._classes:
            for extent in kind.index.extents().tolist():
                if extent in owner:
                    found.append(
                        f"extent {extent} is held by classes {owner[extent]} and {kind.number}"
                    )
                owner[extent] = kind.number
        if len(owner) != self.total:
            found.append(f"{self.total} extents are counted, {len(owner)} are held")
        if not 0 <= self._owed <= self.draining:
            found.append(f"{self._owed} extents are promised, {self.draining} are being emptied")
        return found

    def _demands(self) -> list[ClassDemand]:
        return [kind.demand() for kind in self._classes]

    def _give(self, demands: Sequence[ClassDemand], extents: Extents) -> None:
        start = 0
        for kind, share in zip(
            self._classes, class_shares.growth(demands, extents.size), strict=True
        ):
            if share:
                kind.index.grow(extents[start : start + share])
                start += share


def _check_count(n: int) -> None:
    if n < 0:
        raise ValueError(f"cannot give up {n} extents")
