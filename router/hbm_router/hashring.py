"""Consistent hashing with bounded loads: the user's home, and the next best while it is full.

Karger et al. (STOC 1997) for the ring; Mirrokni, Thorup, Zadimoghaddam, "Consistent Hashing with
Bounded Loads" (SODA 2018) for the bound: no node takes a request that would put it above
`ceil(bound * average)`; the request walks on along the ring instead, so that a spilled user keeps
one and the same second home. The bound used by HAProxy, Envoy and here is 1.25.

Why a ring and not `hash % n`: when one of N nodes comes or goes only 1/N of the users move.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from hbm_pool.contracts.identity import mix64, user_hash

POINTS_PER_NODE: Final = 160
"""Virtual nodes: at 160 the largest share of 64 nodes is about 1.25 times the mean."""
_MASK64: Final = (1 << 64) - 1


class Placement(NamedTuple):
    """Where bounded hashing puts a request; `spilled` when its home was full or not usable."""

    node: int
    spilled: bool


class HashRing:
    """Immutable ring over node names; indices are positions in `names`."""

    def __init__(self, names: Sequence[str], points_per_node: int = POINTS_PER_NODE) -> None:
        points = sorted(
            (mix64((user_hash(name) + replica * 0x9E3779B97F4A7C15) & _MASK64), index)
            for index, name in enumerate(names)
            for replica in range(points_per_node)
        )
        self._size = len(names)
        self._keys = [key for key, _ in points]
        self._owners = [index for _, index in points]

    def walk(self, key: int) -> Iterator[int]:
        """Every node once, in the order in which `key` prefers them."""
        keys, owners = self._keys, self._owners
        if not keys:
            return
        at = bisect_left(keys, mix64(key & _MASK64))
        seen: set[int] = set()
        for step in range(len(keys)):
            owner = owners[(at + step) % len(keys)]
            if owner not in seen:
                seen.add(owner)
                yield owner
                if len(seen) == self._size:
                    return

    def home(self, key: int) -> int:
        """The first node of `walk`. Raises `IndexError` on an empty ring."""
        at = bisect_left(self._keys, mix64(key & _MASK64))
        return self._owners[at if at < len(self._owners) else 0]

    def place(
        self,
        key: int,
        loads: Sequence[int],
        usable: Callable[[int], bool],
        bound: float = 1.25,
    ) -> Placement | None:
        """First node along the walk that stays within the bound; `None` when none is usable.

        `loads` are requests in flight per index. The average is taken over usable nodes and
        counts the new request, so a usable node within the bound always exists.
        """
        usable_indices = [index for index in range(self._size) if usable(index)]
        if not usable_indices:
            return None
        total = sum(loads[index] for index in usable_indices) + 1
        limit = math.ceil(bound * total / len(usable_indices))
        allowed = set(usable_indices)
        for position, index in enumerate(self.walk(key)):
            if index in allowed and loads[index] + 1 <= limit:
                return Placement(index, spilled=position > 0)
        raise AssertionError("a node below the average load exists")
