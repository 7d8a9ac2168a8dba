"""A node that looks its requests up in tables: times per static α, and what a move costs on top.

What a side has won is cold at first. `EMB_WARM` and `KV_WARM` are the shares of the pool that hold
something; they fall with a side's share at once and rise as fast as requests (and refill) bring
rows and tokens in. KV answers like that of a pool warm at 1 - KV_WARM, rows miss like those of one
warm at EMB_WARM. At rest both say α and the tables' times come out exactly.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

EMB_WARM: Final = 0
KV_WARM: Final = 1
FREE_MS: Final = 2
"""When the server is done with what it has."""
REQUESTS: Final = 3
HITS: Final = 4
REUSED: Final = 5
COMPUTED: Final = 6
ACCESSES: Final = 7
MISSES: Final = 8
GATHER: Final = 9
COMPUTE: Final = 10
SERVICE: Final = 11
LATE: Final = 12
SLOTS: Final = 13
"""Size of the state."""

BINS: Final = 96
"""Of the latencies of late: twelve per doubling around the latency goal."""
PER_DOUBLING: Final = 12.0
GOAL_BIN: Final = 60
FADE: Final = 1.0 - 1.0 / 512.0
"""Weight that a latency keeps after each later one."""


class TableNode(NamedTuple):
    """Columns of an episode and the constants of its node. [n, k] by request and static α."""

    arrival_ms: npt.NDArray[np.float64]  # [n]
    tokens: npt.NDArray[np.float64]  # [n]
    gather_ms: npt.NDArray[np.float32]  # [n, k]
    compute_ms: npt.NDArray[np.float32]  # [n, k]
    cached_tokens: npt.NDArray[np.float32]  # [n, k]
    looked_up_rows: npt.NDArray[np.float32]  # [n, k]
    miss_ratio: npt.NDArray[np.float32]  # [n, k] of the requests around
    low: float
    """First α of the tables."""
    step: float
    """Distance of two of them."""
    row_share: float
    """Share of the pool that one row takes."""
    token_share: float
    """Share of the pool that the KV of one token takes."""
    slo_ms: float
    overlap: bool


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _between(
    columns: npt.NDArray[np.float32], i: int, low: float, step: float, alpha: float
) -> float:
    """Row `i` at any α, linear between the tables' own and constant beyond them."""
    last = columns.shape[1] - 1
    at = min(max((alpha - low) / step, 0.0), float(last))
    left = min(int(at), last - 1)
    share = at - left
    return float(columns[i, left] * (1.0 - share) + columns[i, left + 1] * share)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def serve_from_tables(
    node: TableNode,
    state: npt.NDArray[np.float64],
    bins: npt.NDArray[np.float64],
    begin: int,
    until_ms: float,
    alpha: float,
    refill_share_per_ms: float,
) -> int:
    """Serves what begins before `until_ms` at `alpha`. -> the first request that does not.

    `refill_share_per_ms`: share of the pool that refill brings in while the server has no request.
    """
    state[EMB_WARM] = min(state[EMB_WARM], alpha)
    state[KV_WARM] = min(state[KV_WARM], 1.0 - alpha)
    low, step = node.low, node.step
    i = begin
    while i < len(node.arrival_ms):
        start = max(node.arrival_ms[i], state[FREE_MS])
        if start >= until_ms:
            break
        idle = start - state[FREE_MS]
        state[EMB_WARM] = min(alpha, state[EMB_WARM] + refill_share_per_ms * idle)
        kv_at, emb_at = 1.0 - state[KV_WARM], state[EMB_WARM]
        compute = _between(node.compute_ms, i, low, step, kv_at)
        cached = _between(node.cached_tokens, i, low, step, kv_at)
        looked_up = _between(node.looked_up_rows, i, low, step, kv_at)
        gather = _between(node.gather_ms, i, low, step, kv_at)
        warm_ratio = _between(node.miss_ratio, i, low, step, kv_at)
        ratio = _between(node.miss_ratio, i, low, step, emb_at)
        if warm_ratio > 0.0:
            gather *= ratio / warm_ratio
        service = max(gather, compute) if node.overlap else gather + compute
        done = start + service
        latency = done - node.arrival_ms[i]
        missed = ratio * looked_up
        computed = node.tokens[i] - cached
        state[FREE_MS] = done
        state[EMB_WARM] = min(alpha, state[EMB_WARM] + missed * node.row_share)
        state[KV_WARM] = min(1.0 - alpha, state[KV_WARM] + computed * node.token_share)
        state[REQUESTS] += 1.0
        # Between two static α one of which hits, part of it is a hit.
        state[HITS] += min(1.0, cached / max(node.tokens[i], 1.0) * 1.05)
        state[REUSED] += cached
        state[COMPUTED] += computed
        state[ACCESSES] += looked_up
        state[MISSES] += missed
        state[GATHER] += gather
        state[COMPUTE] += compute
        state[SERVICE] += service
        state[LATE] += latency > node.slo_ms
        place = int(GOAL_BIN + PER_DOUBLING * math.log2(max(latency, 1e-9) / node.slo_ms))
        for k in range(BINS):
            bins[k] *= FADE
        bins[min(max(place, 0), BINS - 1)] += 1.0
        i += 1
    return i


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def percentiles_ms(bins: npt.NDArray[np.float64], slo_ms: float) -> tuple[float, float]:
    """P50 and P99 of the latencies of late; 0 before the first."""
    total = bins.sum()
    median, seen = -1, 0.0
    if total <= 0.0:
        return 0.0, 0.0
    for k in range(BINS):
        seen += bins[k]
        if median < 0 and seen >= 0.5 * total:
            median = k
        if seen >= 0.99 * total:
            break
    return (
        slo_ms * 2.0 ** ((median + 0.5 - GOAL_BIN) / PER_DOUBLING),
        slo_ms * 2.0 ** ((k + 0.5 - GOAL_BIN) / PER_DOUBLING),
    )
