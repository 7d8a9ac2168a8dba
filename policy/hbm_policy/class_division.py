"""How a pool divides its EMB extents among width classes, followed in a simulation.

The rule is the pool's own (`hbm_pool.host.class_shares`): by marginal miss cost, from the ghost
hits and misses of late. Each simulated pool divides by what *it* sees: another α has other misses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from hbm_pool.contracts.records import ServerInfo
from hbm_pool.host import class_shares
from hbm_pool.host.class_shares import ClassDemand
from hbm_pool.host.config import MIN_CLASS_EXTENTS

# As the pool has them, beside its tensors (hbm_pool.device.width_class and .class_extents).
RECENT_ROWS: Final = 1 << 16
PROBATION_SPARE: Final = 1.12
ROW_PRICE_BYTES: Final = 512
REBALANCE_DEAD_BAND: Final = 0.05
REBALANCE_EXTENTS: Final = 8
DIVIDE_REQUESTS: Final = 64
"""Requests after which a simulated pool looks at its division again."""
REBALANCE_REQUESTS: Final = 8
"""Requests per step of a rebalance: a slice at a batch boundary empties some of its extents."""


class ClassDivision:
    """EMB extents of each class of one pool of `emb_extents` extents."""

    def __init__(self, info: ServerInfo, emb_extents: int) -> None:
        """Before anything is known, in proportion to the tables' bytes."""
        self._demands = [
            ClassDemand(
                extents=0,
                price=float(each.row_bytes + ROW_PRICE_BYTES),
                ghost_hits=0.0,
                misses=0.0,
                most=math.ceil(each.catalogue_rows / each.rows_per_extent * PROBATION_SPARE) + 1,
                least=MIN_CLASS_EXTENTS,
                table_bytes=each.catalogue_rows * each.row_bytes,
            )
            for each in info.classes
        ]
        self._accesses = [0.0] * len(info.classes)
        self._add(class_shares.growth(self._demands, emb_extents))

    @property
    def extents(self) -> list[int]:
        """Extents of each class."""
        return [each.extents for each in self._demands]

    def count(
        self, accesses: Sequence[float], misses: Sequence[float], ghost_hits: Sequence[float]
    ) -> None:
        """Rows looked up, missed, and missed shortly after they had gone; older counts fade."""
        for index, demand in enumerate(self._demands):
            self._accesses[index] += accesses[index]
            missed = demand.misses + misses[index]
            ghosts = demand.ghost_hits + ghost_hits[index]
            if self._accesses[index] > 2 * RECENT_ROWS:
                self._accesses[index] /= 2
                missed /= 2
                ghosts /= 2
            self._demands[index] = demand._replace(misses=missed, ghost_hits=ghosts)

    def rebalance(self, requests: int) -> list[int] | None:
        """What so many requests leave time for: how many extents each class wins (or loses,
        negative). None: nothing changes."""
        before = self.extents
        for _ in range(max(1, requests // REBALANCE_REQUESTS)):
            if not self._step():
                break
        change = [now - was for now, was in zip(self.extents, before, strict=True)]
        return change if any(change) else None

    def _step(self) -> bool:
        demands = self._demands
        if len(demands) < 2:
            return False
        now = self.extents
        wanted = class_shares.targets(
            demands,
            sum(now),
            [min(each.extents, each.least) for each in demands],
            [each.most for each in demands],
        )
        surplus = [have - want for have, want in zip(now, wanted, strict=True)]
        most = max(surplus)
        richest = surplus.index(most)
        if most <= max(1.0, REBALANCE_DEAD_BAND * now[richest]):
            return False
        moved = min(most, REBALANCE_EXTENTS)
        left = now[richest] - moved
        takers = list(demands)
        takers[richest] = takers[richest]._replace(extents=left, most=left)
        change = class_shares.growth(takers, moved)
        change[richest] -= moved
        self._add(change)
        return any(change)

    def _add(self, change: Sequence[int]) -> None:
        self._demands = [
            each._replace(extents=each.extents + more)
            for each, more in zip(self._demands, change, strict=True)
        ]
