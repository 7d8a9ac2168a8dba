"""The replacement rule TZ against LRU on a matrix of synthetic traces, and what an access costs.

A pool of 131,072 slots in 1,024 extents (at scale 1), of which the rows get 10, 30, 60 or 90 %;
catalogues of .8, 2 and 8 times the pool; Zipf .65, .85 and 1.05, and Zipf .85 with churn (ranks
keep being swapped) and with a scan (a fifth of the accesses are rows never asked for again). The
last two fifths of the accesses count. Goal: misses ÷ LRU at most .86 on average, .99 in the worst
cell. Cells in which the whole catalogue fits are left out: nobody evicts there.
"""

from __future__ import annotations

import math
import time
from typing import Any, Final, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from hbm_pool.host.replacement import TzCache

POOL_SLOTS: Final = 131_072
EXTENTS: Final = 1024
ACCESSES: Final = 5_000_000
COUNTED: Final = 0.4
CATALOGUES: Final = (0.8, 2.0, 8.0)
SIZES: Final = (0.1, 0.3, 0.6, 0.9)
CHURN_SWAPS: Final = 0.02
"""Pairs of ranks swapped per access."""
SCAN_SHARE: Final = 0.2

Keys = npt.NDArray[np.uint32]


class Pattern(NamedTuple):
    name: str
    s: float
    churn: bool = False
    scan: bool = False


PATTERNS: Final = (
    Pattern("zipf-0.65", 0.65),
    Pattern("zipf-0.85", 0.85),
    Pattern("zipf-1.05", 1.05),
    Pattern("churn", 0.85, churn=True),
    Pattern("scan", 0.85, scan=True),
)


def run(quick: bool = False, seed: int = 1, scale: float | None = None) -> dict[str, Any]:
    """All cells; `scale` shrinks pool, catalogues and traces alike (quick: 0.05)."""
    scale = scale if scale is not None else (0.05 if quick else 1.0)
    if not 0.0 < scale <= 4.0:
        raise ValueError(f"scale is {scale}; it must be in (0, 4]")
    cells = []
    for catalogue in CATALOGUES:
        for number, pattern in enumerate(PATTERNS):
            rows = max(64, round(catalogue * POOL_SLOTS * scale))
            random = np.random.default_rng([seed, number, rows])
            trace, num_keys = make_trace(random, rows, max(1000, round(ACCESSES * scale)), pattern)
            for size in SIZES:
                slots = round(size * POOL_SLOTS * scale)
                if slots < rows:
                    cells.append(_cell(catalogue, pattern, size, trace, num_keys, slots))
    ratios = [cell["misses_over_lru"] for cell in cells]
    copies = [cell["copies_per_insertion"] for cell in cells]
    worst = cells[int(np.argmax(ratios))]
    return {
        "scale": scale,
        "cells": len(cells),
        "goal_mean": 0.86,
        "goal_worst": 0.99,
        "misses_over_lru_mean": float(np.mean(ratios)),
        "misses_over_lru_worst": float(np.max(ratios)),
        "worst_cell": {name: worst[name] for name in ("catalogue", "pattern", "size")},
        "copies_per_insertion_mean": float(np.mean(copies)),
        "copies_per_insertion_max": float(np.max(copies)),
        "by_pattern": {
            pattern.name: float(
                np.mean([c["misses_over_lru"] for c in cells if c["pattern"] == pattern.name])
            )
            for pattern in PATTERNS
        },
        "ns_per_access": {
            "tz_mean": float(np.mean([cell["tz_ns"] for cell in cells])),
            "lru_mean": float(np.mean([cell["lru_ns"] for cell in cells])),
        },
    }


def _cell(
    catalogue: float, pattern: Pattern, size: float, trace: Keys, num_keys: int, slots: int
) -> dict[str, Any]:
    rows_per_extent = max(1, round(slots / (size * EXTENTS)))
    extents = max(2, slots // rows_per_extent)
    cache = TzCache(num_keys, rows_per_extent, max_extents=extents, num_extents=extents)
    begin_s = time.perf_counter()
    hits, _ = cache.access_many(trace)
    tz_s = time.perf_counter() - begin_s
    begin_s = time.perf_counter()
    lru_hits = lru(trace, num_keys, extents * rows_per_extent)
    lru_s = time.perf_counter() - begin_s
    first = round(trace.size * (1.0 - COUNTED))
    counters = cache.counters()
    return {
        "catalogue": catalogue,
        "pattern": pattern.name,
        "size": size,
        "misses_over_lru": float((~hits[first:]).sum() / (~lru_hits[first:]).sum()),
        "copies_per_insertion": counters.promotions / max(1, counters.insertions),
        "tz_ns": tz_s / trace.size * 1e9,
        "lru_ns": lru_s / trace.size * 1e9,
    }


def make_trace(
    random: np.random.Generator, rows: int, accesses: int, pattern: Pattern
) -> tuple[Keys, int]:
    """Keys of a trace, and how many keys there are (a scan adds one for each of its accesses)."""
    cumulative = np.cumsum(1.0 / np.arange(1, rows + 1) ** pattern.s)
    ranks = np.searchsorted(cumulative, random.random(accesses) * cumulative[-1]).astype(np.int64)
    ranks = np.minimum(ranks, rows - 1)
    order = random.permutation(rows).astype(np.uint32)
    if not pattern.churn:
        keys = order[ranks]
    else:
        swaps = math.ceil(accesses * CHURN_SWAPS)
        keys = _churned(ranks, order, random.integers(0, rows, (swaps, 2)))
    if not pattern.scan:
        return keys, rows
    once = random.random(accesses) < SCAN_SHARE
    number = int(once.sum())
    keys[once] = rows + np.arange(number, dtype=np.uint32)
    return keys, rows + number


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _churned(ranks: npt.NDArray[np.int64], order: Keys, swaps: npt.NDArray[np.int64]) -> Keys:
    keys = np.empty(ranks.size, np.uint32)
    done = 0
    for i in range(ranks.size):
        while done * ranks.size < i * swaps.shape[0]:
            a, b = swaps[done]
            order[a], order[b] = order[b], order[a]
            done += 1
        keys[i] = order[ranks[i]]
    return keys


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def lru(trace: Keys, num_keys: int, slots: int) -> npt.NDArray[np.bool_]:
    """Hits of an LRU of `slots` rows: direct map and a doubly linked list in arrays."""
    where = np.full(num_keys, -1, np.int32)
    key_of = np.empty(slots, np.uint32)
    newer = np.empty(slots + 1, np.int32)
    older = np.empty(slots + 1, np.int32)
    end = slots  # the list's anchor: `older[end]` is the newest, `newer[end]` the oldest
    newer[end] = end
    older[end] = end
    used = 0
    hits = np.zeros(trace.size, np.bool_)
    for i in range(trace.size):
        key = trace[i]
        slot = where[key]
        linked = True
        if slot >= 0:
            hits[i] = True
        else:
            if used < slots:
                slot = used
                used += 1
                linked = False
            else:
                slot = newer[end]
                where[key_of[slot]] = -1
            where[key] = slot
            key_of[slot] = key
        if linked:
            newer[older[slot]] = newer[slot]
            older[newer[slot]] = older[slot]
        older[slot] = older[end]
        newer[slot] = end
        newer[older[end]] = slot
        older[end] = slot
    return hits
