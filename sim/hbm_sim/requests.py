"""What the simulator serves: requests with all their rows, where they go, and when they count."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_load.trace import Trace, TraceRequest
from hbm_pool.contracts.history import first_kept_token, page_fingerprints, table_rows
from hbm_pool.contracts.identity import row_keys
from hbm_pool.contracts.records import RequestSample, ServerInfo
from hbm_router.hashring import HashRing

LAST: Final = 1 << 40
"""Position of a candidate's row: behind the whole history."""


class SimRequest(NamedTuple):
    """One request of a stream. `sample` lists *all* rows (sampling rate 1)."""

    sample: RequestSample
    regime: str
    node: str = "node-0"
    settled: bool = True
    """False: served, but not counted (warm-up of its regime)."""
    arrival_s: float = math.nan
    """Intended arrival since the start of the stream; NaN: not known."""


def sample_of(request: TraceRequest, info: ServerInfo) -> RequestSample:
    """A request as a model server with that `info` would report it, at sampling rate 1."""
    kept = first_kept_token(len(request.items), info.max_sequence_tokens, info.drop_block_tokens)
    items = request.items[kept:]
    tables = len(info.tables)
    history = _keys(items, info)
    candidates = _keys(request.candidates, info)
    return RequestSample(
        user=request.user,
        history_tokens=len(items),
        candidates=len(request.candidates),
        rows_total=len(history) + len(candidates),
        history_rows_total=len(history),
        page_fingerprints=page_fingerprints(
            items, request.timestamps[kept:], None, info.page_tokens
        ),
        history_keys=history,
        history_positions=np.repeat(np.arange(len(items), dtype=np.uint32), tables),
        candidate_keys=candidates,
    )


def _keys(items: npt.NDArray[np.int64], info: ServerInfo) -> npt.NDArray[np.uint64]:
    columns = [
        row_keys(index, table_rows(items, index, table.rows, table.hashed))
        for index, table in enumerate(info.tables)
    ]
    return np.stack(columns, axis=1).reshape(-1)


class TraceRequests(Sequence[SimRequest]):
    """A trace as a stream; requests are made when asked for, so long traces fit."""

    def __init__(self, trace: Trace, info: ServerInfo, nodes: Sequence[str] = ("node-0",)) -> None:
        """Users go to their hash home among `nodes`, as the router sends users nobody holds."""
        self._trace = trace
        self._info = info
        self._nodes = tuple(nodes)
        self._ring = HashRing(self._nodes)

    def __len__(self) -> int:
        return len(self._trace)

    def __getitem__(self, index: int) -> SimRequest:  # type: ignore[override]
        request = self._trace.request(index)
        return SimRequest(
            sample=sample_of(request, self._info),
            regime=request.regime,
            node=self._nodes[self._ring.home(request.user)],
            settled=bool(self._trace.settled[index]),
            arrival_s=float(self._trace.time_s[index]),
        )

    def __iter__(self) -> Iterator[SimRequest]:
        return (self[index] for index in range(len(self)))


class RowList(NamedTuple):
    """Distinct rows of one width class in one request, and the last position of each."""

    rows: npt.NDArray[np.int64]  # [n] numbers within the class
    positions: npt.NDArray[np.int64]  # [n], LAST for candidates


class RowNumbers:
    """Numbers the rows of each width class: its tables one behind the other."""

    def __init__(self, info: ServerInfo) -> None:
        tables = len(info.tables)
        self._class_of = np.full(tables, -1, np.int64)
        self._offset = np.zeros(tables, np.int64)
        self.rows = []
        """Rows of each class."""
        for index, each in enumerate(info.classes):
            first = 0
            for table in each.tables:
                self._class_of[table] = index
                self._offset[table] = first
                first += info.tables[table].rows
            self.rows.append(first)

    def lists(self, sample: RequestSample) -> list[RowList]:
        """One list per class. A cache that reuses c tokens looks up positions from c on."""
        keys = np.concatenate([sample.history_keys, sample.candidate_keys])
        positions = np.concatenate(
            [
                sample.history_positions.astype(np.int64),
                np.full(len(sample.candidate_keys), LAST, np.int64),
            ]
        )
        # From the end, so that the first of equal rows is the last position.
        keys, positions = keys[::-1], positions[::-1]
        tables = (keys >> np.uint64(40)).astype(np.int64)
        rows = (keys & np.uint64((1 << 40) - 1)).astype(np.int64) + self._offset[tables]
        classes = self._class_of[tables]
        lists = []
        for index in range(len(self.rows)):
            mine = classes == index
            distinct, first = np.unique(rows[mine], return_index=True)
            lists.append(RowList(distinct, positions[mine][first]))
        return lists
