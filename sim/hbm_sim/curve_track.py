"""The real twin's curves for a stream, tick by tick: computed once, shared by all arms.

The twin sees requests, never the server's α, so its curve is the same for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from hbm_policy.costs import CostConstants
from hbm_policy.twin import Twin
from hbm_pool.contracts.identity import mix64, sampled
from hbm_pool.contracts.records import CURVES, MAX_CLASSES, CostModel, RequestSample, ServerInfo

from hbm_sim.node_spec import NodeSpec
from hbm_sim.stream import Stream


@dataclasses.dataclass(frozen=True, slots=True)
class CurveTrack:
    """What the twin says at each tick of a stream."""

    tick_s: float
    records: npt.NDArray[Any]  # [ticks] dtype CURVES, after the requests that came before the tick
    costs: CostConstants
    """What `cost_ms` is priced with."""
    cost_model: CostModel

    @classmethod
    def of(
        cls,
        stream: Stream,
        spec: NodeSpec,
        *,
        tick_s: float = 0.25,
        rate: float | None = None,
        alphas: Sequence[float] | None = None,
        costs: CostConstants | None = None,
        restarts_s: Sequence[float] = (),
    ) -> CurveTrack:
        """Runs the twin over the stream. `rate`: share of rows it follows, by default what the
        server declares; `costs`: by default what the server declares. It begins anew, cold, at
        each of `restarts_s`: a restarted server has another boot epoch."""
        rate = min(spec.info.sample_rate if rate is None else rate, stream.rate)
        info = dataclasses.replace(spec.info, sample_rate=rate)
        costs = costs or spec.declares()
        ticks = tick_count(stream, tick_s)
        records = np.zeros(ticks, CURVES)
        now_ns = [0]
        twin = Twin(info, alphas, clock_ns=lambda: now_ns[0])
        epoch = 1
        ends = np.searchsorted(stream.arrival_s, (np.arange(ticks) + 1) * tick_s)
        samples = TwinSamples(stream, info)
        begin = 0
        restarts = sorted(restarts_s)
        for tick, end in enumerate(ends.tolist()):
            now_ns[0] = tick_ns(tick, tick_s)
            while restarts and restarts[0] <= (tick + 1) * tick_s:
                restarts.pop(0)
                twin = Twin(info, alphas, clock_ns=lambda: now_ns[0])
                epoch += 1
            if end > begin:
                twin.feed([samples[i] for i in range(begin, end)], 0, costs)
                begin = end
            twin.curves(records[tick : tick + 1].reshape(()))
            records[tick]["boot_epoch"] = epoch
        return cls(tick_s, records, costs, info.cost_model)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def alphas(self) -> npt.NDArray[np.float64]:
        """The twin's candidates."""
        last = self.records[-1]
        found: npt.NDArray[np.float64] = last["alpha"][: int(last["points"])].copy()
        return found

    def priced(self, costs: CostConstants) -> CurveTrack:
        """The same with other constants, for a serial server. Raises ValueError for an overlapped
        one, whose maximum is taken request by request: run the twin again (`of`)."""
        if self.cost_model != CostModel.SERIAL:
            raise ValueError(
                "an overlapped server's curve cannot be priced anew; use CurveTrack.of"
            )
        records = self.records.copy()
        row_ms = np.zeros(MAX_CLASSES)
        row_ms[: len(costs.row_ms)] = costs.row_ms
        priced = (
            costs.fixed_ms
            + costs.token_ms * records["compute_tokens"]
            + costs.token_context_ms * records["context_tokens"]
            + records["rows_missed"] @ row_ms
        )
        points = int(records[-1]["points"])
        # A twin that has seen nothing has no curve to price.
        seen = records["requests"] > 0
        records["cost_ms"][seen, :points] = priced[seen, :points]
        return dataclasses.replace(self, records=records, costs=costs)


def tick_count(stream: Stream, tick_s: float) -> int:
    """Ticks until every request has arrived; the k-th (from 0) is at (k + 1) * tick_s."""
    return int(np.ceil(float(stream.arrival_s[-1]) / tick_s)) + 1 if len(stream) else 1


def tick_ns(tick: int, tick_s: float) -> int:
    """Simulated CLOCK_MONOTONIC at a tick: it starts at one second, as 0 means never."""
    return round((1.0 + (tick + 1) * tick_s) * 1e9)


class TwinSamples:
    """Requests of a stream as the server's ring would hold them at its own sampling rate."""

    def __init__(self, stream: Stream, info: ServerInfo) -> None:
        self._stream, self._page_tokens = stream, info.page_tokens
        wanted = sampled(stream.row_keys, info.sample_rate)
        kept = wanted[stream.history_rows]
        self._keys = stream.row_keys[stream.history_rows[kept]]
        self._positions = stream.history_positions[kept].astype(np.uint32)
        self._at = np.concatenate([[0], np.cumsum(kept)])[stream.history_at]
        kept = wanted[stream.candidate_rows]
        self._candidate_keys = stream.row_keys[stream.candidate_rows[kept]]
        self._candidate_at = np.concatenate([[0], np.cumsum(kept)])[stream.candidate_at]
        self._pages = np.arange(info.max_sequence_tokens // info.page_tokens + 1, dtype=np.uint32)
        self._pages *= np.uint32(2_654_435_761)

    def __len__(self) -> int:
        return len(self._stream)

    def __getitem__(self, i: int) -> RequestSample:
        if not 0 <= i < len(self):
            raise IndexError(i)
        stream, at, candidate_at = self._stream, self._at, self._candidate_at
        tokens, user = int(stream.tokens[i]), int(stream.user[i])
        base = np.uint32(mix64(user * 4097 + int(stream.dropped[i])) & 0xFFFFFFFF)
        history = int(stream.history_lookups[i])
        return RequestSample(
            user=user,
            history_tokens=tokens,
            candidates=int(stream.candidates[i]),
            rows_total=history + int(stream.candidate_lookups[i]),
            history_rows_total=history,
            page_fingerprints=self._pages[: tokens // self._page_tokens] ^ base,
            history_keys=self._keys[at[i] : at[i + 1]],
            history_positions=self._positions[at[i] : at[i + 1]],
            candidate_keys=self._candidate_keys[candidate_at[i] : candidate_at[i + 1]],
        )
