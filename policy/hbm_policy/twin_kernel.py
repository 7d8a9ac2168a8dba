"""The compiled loop of the twin: one request at a time through all K virtual pairs."""

from __future__ import annotations

from typing import Final, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.identity import ROW_ID_BITS
from hbm_pool.contracts.records import MAX_CLASSES
from hbm_pool.host.tz_kernel import kernel, wide

from hbm_policy.twin_rows import LAST, REQUEST, Rows, list_row, serve_rows
from hbm_policy.twin_users import Users, mix, serve_user

# Columns of the decayed sums, one row per candidate.
COST: Final = 0
COMPUTE_TOKENS: Final = 1
CONTEXT_TOKENS: Final = 2
KV_HITS: Final = 3
LOOKUPS: Final = 4
HISTORY_LOOKUPS: Final = 5
CANDIDATE_LOOKUPS: Final = 6
HISTORY_MISSES: Final = 7  # by class, of sampled rows
CANDIDATE_MISSES: Final = HISTORY_MISSES + MAX_CLASSES
FIELDS: Final = CANDIDATE_MISSES + MAX_CLASSES


class Stream(NamedTuple):
    """Requests in order. `head` [n, 8]: user, history tokens, candidates, lookups, lookups of the
    history, then how many entries of the flat arrays are its own."""

    head: npt.NDArray[np.int64]
    fingerprints: npt.NDArray[np.uint32]
    history_keys: npt.NDArray[np.uint64]
    history_positions: npt.NDArray[np.uint32]
    candidate_keys: npt.NDArray[np.uint64]


class Scratch(NamedTuple):
    """Room for the rows of one request; compiled code allocates nothing."""

    numbers: npt.NDArray[np.int64]  # [classes, rows of the largest request]
    positions: npt.NDArray[np.int64]
    missed: npt.NDArray[np.int64]  # [rows of the largest request]
    used: npt.NDArray[np.int64]  # [classes]
    cached: npt.NDArray[np.int64]  # [K]


def allocate_scratch(points: int, longest: int) -> Scratch:
    """For K = `points` candidates and requests of up to `longest` sampled rows."""
    return Scratch(
        numbers=np.empty((MAX_CLASSES, longest), np.int64),
        positions=np.empty((MAX_CLASSES, longest), np.int64),
        missed=np.empty(longest, np.int64),
        used=np.empty(MAX_CLASSES, np.int64),
        cached=np.empty(points, np.int64),
    )


@kernel
def _ratio(misses: float, lookups: float) -> float:
    return misses / lookups if lookups > 0.0 else 0.0


@numba.njit(nogil=True, cache=True, error_model="numpy", _nrt=False)  # type: ignore[untyped-decorator]
def simulate(
    rows: tuple[Rows, ...],
    users: Users,
    stream: Stream,
    class_of_table: npt.NDArray[np.int64],
    page_tokens: int,
    trims: bool,
    threshold: np.uint64,
    subsample: bool,
    rate: float,
    compute_ms: npt.NDArray[np.float64],
    row_ms: npt.NDArray[np.float64],
    overlap: bool,
    fade: float,
    looked_up: npt.NDArray[np.float64],
    missed_so_far: npt.NDArray[np.float64],
    sums: npt.NDArray[np.float64],
    weight: npt.NDArray[np.float64],
    scratch: Scratch,
) -> None:
    """Feeds the requests to every pair and adds what each would have cost to `sums`.

    `sums` [K, FIELDS] and `weight` [1] fade by `fade` per request; `looked_up` and `missed_so_far`
    [K, classes] count sampled rows and do not. A row is simulated when it is below `threshold` or
    `subsample` is off.
    """
    points = users.capacity.size
    numbers, positions, missed, used, cached = scratch
    page_at = wide(0)
    history_at = wide(0)
    candidate_at = wide(0)
    for request in range(stream.head.shape[0]):
        user, tokens, candidates, lookups, history_lookups, pages, in_history, in_candidates = (
            stream.head[request, 0],
            stream.head[request, 1],
            stream.head[request, 2],
            stream.head[request, 3],
            stream.head[request, 4],
            stream.head[request, 5],
            stream.head[request, 6],
            stream.head[request, 7],
        )
        fingerprints = stream.fingerprints[page_at : page_at + pages]
        serve_user(users, user, tokens, fingerprints, page_tokens, trims, cached)
        for c in range(MAX_CLASSES):
            used[c] = 0
            rows[c].counts[REQUEST] += 1
        # From the end: a row comes first at its last position, and a candidate that reuses c
        # tokens stops at the first position before c.
        for i in range(in_history + in_candidates - 1, -1, -1):
            if i < in_history:
                key = stream.history_keys[history_at + i]
                position = wide(stream.history_positions[history_at + i])
            else:
                key = stream.candidate_keys[candidate_at + i - in_history]
                position = wide(LAST)
            table = wide(key >> np.uint64(ROW_ID_BITS))
            if table >= class_of_table.size or (subsample and mix(wide(key)) >= threshold):
                continue
            c = class_of_table[table]
            used[c] = list_row(rows[c], key, position, used[c], numbers[c], positions[c])
        page_at += pages
        history_at += in_history
        candidate_at += in_candidates
        weight[0] = weight[0] * fade + 1.0
        for k in range(points):
            new_tokens = tokens - cached[k]
            from_history = 0.0
            if tokens > 0:
                from_history = history_lookups * (new_tokens / tokens)
            from_candidates = float(lookups - history_lookups)
            context = new_tokens * (cached[k] + tokens + 1) / 2.0 + candidates * tokens
            compute = (
                compute_ms[0] + compute_ms[1] * (new_tokens + candidates) + compute_ms[2] * context
            )
            row = sums[k]
            for field in range(FIELDS):
                row[field] *= fade
            row[COMPUTE_TOKENS] += new_tokens + candidates
            row[CONTEXT_TOKENS] += context
            row[LOOKUPS] += from_history + from_candidates
            row[HISTORY_LOOKUPS] += from_history
            row[CANDIDATE_LOOKUPS] += from_candidates
            if cached[k] > 0:
                row[KV_HITS] += 1.0
            gather = 0.0
            for c in range(MAX_CLASSES):
                if used[c] > 0:
                    missed_history, missed_candidates, found = serve_rows(
                        rows[c], k, cached[k], used[c], numbers[c], positions[c], missed
                    )
                    row[HISTORY_MISSES + c] += missed_history
                    row[CANDIDATE_MISSES + c] += missed_candidates
                    looked_up[k, c] += found
                    missed_so_far[k, c] += missed_history + missed_candidates
                    gather += row_ms[c] * (missed_history + missed_candidates) / rate
            if overlap:
                # A few sampled misses say little about one request, and the maximum below would
                # take their noise for cost: expected misses are used instead.
                gather = 0.0
                for c in range(MAX_CLASSES):
                    gather += row_ms[c] * (
                        from_history * _ratio(row[HISTORY_MISSES + c], rate * row[HISTORY_LOOKUPS])
                        + from_candidates
                        * _ratio(row[CANDIDATE_MISSES + c], rate * row[CANDIDATE_LOOKUPS])
                    )
            row[COST] += max(compute, gather) if overlap else compute + gather
