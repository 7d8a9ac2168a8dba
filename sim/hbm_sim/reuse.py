"""Reuse curves: the hit ratio that a recency-ordered cache of any size would have (Mattson 1970).

One pass over the references gives, for each, how much of distinct other things was used since it
was last used. With a hash sample of the rows, distances are scaled up by the sampling rate and hits
are counted over all lookups (SHARDS with the adjustment).
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from hbm_sim.stream import Stream

Floats = npt.NDArray[np.float64]
POINTS: Final = 48


class ReuseCurve(NamedTuple):
    """Hit ratio over cache size."""

    size_bytes: Floats
    hit_ratio: Floats
    first_use: float
    """Share of references to something not used before: no cache hits them."""


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _distances(
    names: npt.NDArray[np.int64],
    weights: Floats,
    last: npt.NDArray[np.int64],
    tree: Floats,
    found: Floats,
) -> None:
    """Weight of the distinct names used since the same name, its own newest weight included; -1 at
    the first use. `tree` [n + 1] is a Fenwick tree over places, `last` [names] is -1 everywhere."""
    n = names.size
    for i in range(n):
        before = last[names[i]]
        if before < 0:
            found[i] = -1.0
        else:
            total = 0.0
            place = i
            while place > 0:
                total += tree[place]
                place -= place & -place
            place = before
            while place > 0:
                total -= tree[place]
                place -= place & -place
            found[i] = total - weights[before] + weights[i]
            place = before + 1
            while place <= n:
                tree[place] -= weights[before]
                place += place & -place
        place = i + 1
        while place <= n:
            tree[place] += weights[i]
            place += place & -place
        last[names[i]] = i


def distances(names: npt.NDArray[np.int64], weights: npt.NDArray[Any]) -> Floats:
    """Reuse distance of each reference, `[n]`, in the unit of the weights; -1: first use."""
    distinct, numbers = np.unique(names, return_inverse=True)
    found = np.empty(len(names))
    _distances(
        numbers.astype(np.int64),
        weights.astype(np.float64),
        np.full(len(distinct), -1, np.int64),
        np.zeros(len(names) + 1),
        found,
    )
    return found


def user_curve(stream: Stream, mask: npt.NDArray[np.bool_], token_bytes: float) -> ReuseCurve:
    """Users' KV: how often one who comes is still there, by bytes of KV. What came before the
    masked requests warms the cache."""
    found = distances(stream.user, stream.tokens * token_bytes)
    return _curve(found[mask], int(mask.sum()))


def row_curve(stream: Stream, mask: npt.NDArray[np.bool_], row_bytes: float) -> ReuseCurve:
    """Rows, when each request looks up all its rows (no KV hit spares any)."""
    rows, owner = _references(stream)
    found = distances(
        rows.astype(np.int64), np.full(len(rows), row_bytes / stream.rate, np.float64)
    )
    counted = mask[owner]
    lookups = int((stream.history_lookups + stream.candidate_lookups)[mask].sum())
    # Sampled references that a skewed sample has too few or too many of are hot: they hit.
    return _curve(found[counted], max(round(lookups * stream.rate), 1))


def _references(
    stream: Stream,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """All sampled rows in order of requests, and the request of each."""
    history, candidates = np.diff(stream.history_at), np.diff(stream.candidate_at)
    total = history + candidates
    at = np.concatenate([[0], np.cumsum(total)])
    rows = np.empty(int(at[-1]), np.int32)
    owner = np.repeat(np.arange(len(stream)), total)
    within = np.arange(len(rows)) - at[:-1][owner]
    of_history = within < history[owner]
    rows[of_history] = stream.history_rows
    rows[~of_history] = stream.candidate_rows
    return rows, owner


def _curve(found: Floats, references: int) -> ReuseCurve:
    reused = np.sort(found[found >= 0.0])
    if len(reused) == 0:
        return ReuseCurve(np.zeros(1), np.zeros(1), 1.0)
    sizes = np.geomspace(max(float(reused[0]), 1.0), float(reused[-1]) * 1.01, POINTS)
    missing = references - len(found)
    hits = np.searchsorted(reused, sizes, side="right") + missing
    first = float((found < 0.0).sum()) / references
    return ReuseCurve(sizes, np.clip(hits / references, 0.0, 1.0), min(first, 1.0))
