"""Least recently used, the reference every replacement rule is measured against."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


def lru_misses(keys: Iterable[int], slots: int, skip: int) -> int:
    """Misses of an LRU of `slots` rows, after the first `skip` accesses."""
    held: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for i, key in enumerate(keys):
        if key in held:
            held.move_to_end(key)
            continue
        misses += i >= skip
        held[key] = None
        if len(held) > slots:
            held.popitem(last=False)
    return misses
