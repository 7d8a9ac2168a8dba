"""A trace (a user's own log) as a stream of the compiled simulator, on the node of a model file.

The compiled engine simulates one width class of rows. Tables of several widths are taken together
there, at their mean width by look-ups; `LogNode.averaged` says so.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_load.trace import Trace
from hbm_policy.costs import CostConstants
from hbm_pool.contracts.history import first_kept_token
from hbm_pool.contracts.identity import sampled
from hbm_pool.contracts.records import RowClass, ServerInfo, TableMap
from hbm_sim.node_spec import NodeSpec
from hbm_sim.requests import sample_of
from hbm_sim.stream import Stream

WARM_UP: Final = 0.2
"""Leading share of a log that fills the caches and is not counted."""
SETTLE: Final = 0.25
"""Leading share of each part in which caches are still on their way."""
LEAST_ROWS: Final = 2000
"""Distinct rows of the log that are followed at least."""
MOST_SLOTS: Final = 4_000_000
"""Slots that are simulated at most."""


class LogNode(NamedTuple):
    """A node of one width class, and whether that is an average."""

    spec: NodeSpec
    averaged: bool


def node_of(info: ServerInfo, costs: CostConstants, link_bytes_per_s: float) -> LogNode:
    """What the engine simulates of a model file's node. `costs.row_ms` is by class of `info`."""
    averaged = len(info.classes) > 1
    if averaged:
        # Every item looks up one row of each table.
        widths = [info.classes[table.class_index].row_bytes for table in info.tables]
        prices = [costs.row_ms[table.class_index] for table in info.tables]
        row_bytes = round(sum(widths) / len(widths))
        costs = costs._replace(row_ms=(sum(prices) / len(prices),))
        one = RowClass(
            row_bytes,
            max(1, info.extent_bytes // row_bytes),
            sum(each.catalogue_rows for each in info.classes),
            tuple(range(len(info.tables))),
        )
        tables = tuple(TableMap(t.name, t.rows, 0, t.hashed) for t in info.tables)
        info = dataclasses.replace(info, classes=(one,), tables=tables)
    return LogNode(NodeSpec(info=info, costs=costs, link_bytes_per_s=link_bytes_per_s), averaged)


def stream_of(trace: Trace, info: ServerInfo) -> Stream:
    """All requests of a trace, arriving as in the trace; rows sampled so that a run is quick.

    Raises ValueError for a trace without requests.
    """
    n = len(trace)
    if n == 0:
        raise ValueError(f"{trace.name}: no request in it")
    trace = dataclasses.replace(
        trace, history_limit=info.max_sequence_tokens, history_block=info.drop_block_tokens
    )
    rate = _rate(trace, info)
    tokens, dropped = np.zeros(n, np.int32), np.zeros(n, np.int32)
    lookups = np.zeros((2, n), np.int64)
    counts = np.zeros((2, n), np.int64)
    keys: tuple[list[npt.NDArray[np.uint64]], ...] = ([], [])
    positions: list[npt.NDArray[np.uint32]] = []
    for index in range(n):
        sample = sample_of(trace.request(index), info)
        kept = sampled(sample.history_keys, rate)
        wanted = sampled(sample.candidate_keys, rate)
        keys[0].append(sample.history_keys[kept])
        keys[1].append(sample.candidate_keys[wanted])
        positions.append(sample.history_positions[kept])
        counts[:, index] = kept.sum(), wanted.sum()
        lookups[:, index] = len(kept), len(wanted)
        tokens[index] = sample.history_tokens
        dropped[index] = first_kept_token(
            int(trace.history_length[index]), info.max_sequence_tokens, info.drop_block_tokens
        )
    joined = np.concatenate([*keys[0], *keys[1]])
    row_keys, numbers = np.unique(joined, return_inverse=True)
    history = int(counts[0].sum())
    warm_up = int(WARM_UP * n)
    return Stream(
        name=trace.name,
        seed=trace.seed,
        rate=rate,
        regimes=trace.labels,
        arrival_s=trace.time_s.astype(np.float64),
        user=trace.user + 1,
        tokens=tokens,
        new_tokens=_new_tokens(trace),
        candidates=np.diff(trace.candidate_offsets).astype(np.int32),
        dropped=dropped,
        regime=trace.regime,
        settled=_settled(trace.regime, warm_up),
        counted=np.arange(n) >= warm_up,
        history_lookups=lookups[0],
        candidate_lookups=lookups[1],
        history_at=np.concatenate([[0], np.cumsum(counts[0])]),
        history_rows=numbers[:history].astype(np.int32),
        history_positions=np.concatenate(positions).astype(np.int32),
        candidate_at=np.concatenate([[0], np.cumsum(counts[1])]),
        candidate_rows=numbers[history:].astype(np.int32),
        row_keys=row_keys,
    )


def _rate(trace: Trace, info: ServerInfo) -> float:
    """Few enough slots to be quick, enough of the log's own rows to be right."""
    slots = sum(info.extents * each.rows_per_extent for each in info.classes)
    distinct = len(np.unique(trace.candidates)) * len(info.tables)
    return min(1.0, max(MOST_SLOTS / 16 / slots, LEAST_ROWS / max(distinct, 1)), MOST_SLOTS / slots)


def _new_tokens(trace: Trace) -> npt.NDArray[np.int32]:
    """Growth since the user's request before; all of the history at the first."""
    order = np.lexsort((np.arange(len(trace)), trace.user))
    lengths = trace.history_length[order]
    before = np.concatenate([[0], lengths[:-1]])
    first = np.concatenate([[True], np.diff(trace.user[order]) != 0])
    grown = np.where(first, lengths, lengths - before)
    result = np.empty(len(trace), np.int32)
    result[order] = grown
    return result


def _settled(regime: npt.NDArray[np.int16], warm_up: int) -> npt.NDArray[np.bool_]:
    settled = np.zeros(len(regime), np.bool_)
    edges = [0, *(np.flatnonzero(np.diff(regime)) + 1).tolist(), len(regime)]
    for first, end in pairwise(edges):
        begin = max(first, warm_up)
        settled[begin + int(SETTLE * max(end - begin, 0)) : end] = True
    return settled
