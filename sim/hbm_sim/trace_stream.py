"""A trace (a scenario's or a user's own log) as a stream for the compiled engine and the twin."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hbm_load.trace import Trace
from hbm_pool.contracts.history import first_kept_token
from hbm_pool.contracts.identity import row_keys, user_hash

from hbm_sim.row_mix import sampled_ids
from hbm_sim.stream import Stream
from hbm_sim.workload import Workload, WorkloadError

MAX_ROWS = (1 << 30) - 2


def node_for(trace: Trace, workload: Workload, rate: float | None = None) -> Workload:
    """The workload's node with the table that the trace's catalogue needs.

    Each item looks up `lookups_per_token` rows of its own. Raises WorkloadError when these are too
    many for one table.
    """
    rows = trace.catalogue * workload.node.lookups_per_token
    if rows > MAX_ROWS:
        raise WorkloadError(
            f"{trace.catalogue} items with {workload.node.lookups_per_token} rows each are more "
            f"than {MAX_ROWS} rows; choose a node with fewer lookups_per_token"
        )
    chosen = min(1.0, max(workload.sample_rate, 200_000 / rows)) if rate is None else rate
    return workload.model_copy(
        update={"name": trace.name, "rows": max(rows, 16), "sample_rate": chosen}
    )


def stream_of_trace(trace: Trace, workload: Workload, *, warm_up: float = 0.2) -> Stream:
    """All requests of a trace, in order. The leading `warm_up` share is not counted.

    `workload` gives node, table and sampling rate (`node_for`). Raises WorkloadError for a trace
    without requests.
    """
    n = len(trace)
    if n == 0:
        raise WorkloadError(f"{trace.name}: no request in the trace")
    node, rate = workload.node, workload.sample_rate
    lookups = node.lookups_per_token
    keys, number_of = _numbers(workload.rows, rate)
    tokens, dropped, fresh, candidates = (np.zeros(n, np.int32) for _ in range(4))
    seen = np.zeros(int(trace.user.max()) + 1, np.int64)
    history: list[npt.NDArray[np.int32]] = []
    positions: list[npt.NDArray[np.int32]] = []
    wanted: list[npt.NDArray[np.int32]] = []
    offsets = np.arange(lookups, dtype=np.int64)

    def sampled_rows(items: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int32], ...]:
        rows = ((items[:, None] * lookups + offsets) % workload.rows).reshape(-1)
        numbers = number_of[rows]
        kept = np.flatnonzero(numbers >= 0)
        return numbers[kept], (kept // lookups).astype(np.int32)

    for i in range(n):
        user, length = int(trace.user[i]), int(trace.history_length[i])
        cut = first_kept_token(length, node.max_sequence_tokens, node.drop_block_tokens)
        items = trace.histories.events(user, length).items[cut:]
        tokens[i], dropped[i] = len(items), cut
        fresh[i] = min(length - seen[user], len(items))
        seen[user] = length
        rows, where = sampled_rows(items)
        history.append(rows)
        positions.append(where)
        scored = trace.candidates[trace.candidate_offsets[i] : trace.candidate_offsets[i + 1]]
        candidates[i] = len(scored)
        wanted.append(sampled_rows(scored)[0])
    counted = np.arange(n) >= warm_up * n
    return Stream(
        name=trace.name,
        seed=trace.seed,
        rate=rate,
        regimes=trace.labels,
        arrival_s=trace.time_s.astype(np.float64),
        user=np.array([user_hash(trace.user_id(i)) for i in range(n)], np.int64),
        tokens=tokens,
        new_tokens=fresh,
        candidates=candidates,
        dropped=dropped,
        regime=trace.regime,
        settled=trace.settled & counted,
        counted=counted,
        history_lookups=tokens.astype(np.int64) * lookups,
        candidate_lookups=candidates.astype(np.int64) * lookups,
        history_at=np.concatenate([[0], np.cumsum([len(rows) for rows in history])]),
        history_rows=np.concatenate(history),
        history_positions=np.concatenate(positions),
        candidate_at=np.concatenate([[0], np.cumsum([len(rows) for rows in wanted])]),
        candidate_rows=np.concatenate(wanted),
        row_keys=keys,
    )


def _numbers(rows: int, rate: float) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
    """Keys of the sampled rows, and the number of every row of the table (-1: not sampled)."""
    ids = sampled_ids(rows, rate)
    number_of = np.full(rows, -1, np.int32)
    number_of[ids] = np.arange(len(ids), dtype=np.int32)
    return row_keys(0, ids), number_of
