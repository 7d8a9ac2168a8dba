"""What a run looks like while it lasts: one JSON line per interval."""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hbm_load.records import Outcome, Records

_WINDOW = 1000
"""Newest finished requests behind the percentiles."""


class Progress(NamedTuple):
    """State of a run. Latencies are over the newest `window_n` finished requests."""

    total: int
    finished: int
    in_flight: int
    errors: int
    dropped: int
    time_s: float  # since the start; intended time of the newest finished request
    regime: str
    window_n: int
    p50_ms: float | None
    tail_ms: (
        float | None
    )  # of `tail_percentile`: P99 from 1,000 requests in the window on, else P95
    tail_percentile: int
    slo_attainment: float | None
    kv_hit_rate: float | None
    emb_hit_rate: float | None
    nodes: dict[str, int]  # requests per node so far


class ProgressCounter:
    """Counts finished requests; `snapshot` is cheap enough for several times a second."""

    def __init__(self, records: Records, slo_ms: float) -> None:
        self._records = records
        self._slo_ms = slo_ms
        self._finished = 0
        self._errors = 0
        self._dropped = 0
        self._newest = 0
        self._nodes: Counter[str] = Counter()
        self._window: deque[int] = deque(maxlen=_WINDOW)

    def done(self, index: int) -> None:
        """Request `index` ended."""
        outcome = self._records.outcome[index]
        self._finished += 1
        self._newest = max(self._newest, index)
        if outcome is Outcome.DROPPED:
            self._dropped += 1
        elif outcome is not Outcome.OK:
            self._errors += 1
        node = self._records.texts["node"][index]
        if node:
            self._nodes[node] += 1
        self._window.append(index)

    def snapshot(self, in_flight: int) -> Progress:
        """The state now."""
        records = self._records
        window = np.fromiter(self._window, dtype=np.int64, count=len(self._window))
        latency = records.latency_ms[window]
        answered = latency[np.isfinite(latency)]
        tail = 99 if len(answered) >= _WINDOW else 95
        within = [
            records.outcome[index] is Outcome.OK and value <= self._slo_ms
            for index, value in zip(window, latency, strict=True)
        ]
        return Progress(
            total=len(records),
            finished=self._finished,
            in_flight=in_flight,
            errors=self._errors,
            dropped=self._dropped,
            time_s=float(records.intended_s[self._newest]),
            regime=records.labels[records.regime[self._newest]],
            window_n=len(answered),
            p50_ms=float(np.percentile(answered, 50)) if len(answered) else None,
            tail_ms=float(np.percentile(answered, tail)) if len(answered) else None,
            tail_percentile=tail,
            slo_attainment=float(np.mean(within)) if within else None,
            kv_hit_rate=_kv_hits(records, window),
            emb_hit_rate=_emb_hits(records, window),
            nodes=dict(self._nodes),
        )


def _kv_hits(records: Records, window: npt.NDArray[np.int64]) -> float | None:
    reused = records.numbers["kv_reused_tokens"][window]
    known = reused[np.isfinite(reused)]
    return float((known > 0).mean()) if len(known) else None


def _emb_hits(records: Records, window: npt.NDArray[np.int64]) -> float | None:
    looked_up = np.nansum(records.numbers["rows_looked_up"][window])
    missed = np.nansum(records.numbers["rows_missed"][window])
    return float(1.0 - missed / looked_up) if looked_up else None
