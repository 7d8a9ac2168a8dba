"""What became of each request, one row per request; kept as columns, written as Parquet."""

from __future__ import annotations

import dataclasses
import json
import math
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts import headers

from hbm_load.connection import Response
from hbm_load.trace import Trace


class Outcome(StrEnum):
    """How a request ended. Everything but `OK` misses its SLO."""

    OK = "ok"
    """Answered with 2xx."""
    STATUS = "status"
    """Answered, but not with 2xx."""
    REFUSED = "refused"
    """No connection could be made."""
    LOST = "lost"
    """The connection broke before the answer was whole."""
    TIMEOUT = "timeout"
    DROPPED = "dropped"
    """Not sent: as many requests as allowed were in flight already."""
    NOT_SENT = "not_sent"
    """The run was stopped before its time."""


_NUMBERS: Final = {
    "alpha": headers.ALPHA,
    "kv_reused_tokens": headers.KV_REUSED_TOKENS,
    "history_tokens_kept": headers.HISTORY_TOKENS,
    "rows_looked_up": headers.ROWS_LOOKED_UP,
    "rows_missed": headers.ROWS_MISSED,
    "service_ms": headers.SERVICE_MS,
    "queue_ms": headers.QUEUE_MS,
}
_TEXTS: Final = {"node": headers.NODE, "decision": headers.DECISION}


@dataclasses.dataclass
class Records:
    """Columns over the requests of a trace. Times are s since the start of the run; NaN: never."""

    labels: tuple[str, ...]
    regime: npt.NDArray[np.int16]  # [n] index into labels
    settled: npt.NDArray[np.bool_]  # [n]
    intended_s: npt.NDArray[np.float64]  # [n] when the request was due
    sent_s: npt.NDArray[np.float64]  # [n]
    done_s: npt.NDArray[np.float64]  # [n]
    status: npt.NDArray[np.int16]  # [n] HTTP status, 0 without an answer
    outcome: list[Outcome]
    history_tokens: npt.NDArray[np.int64]  # [n] as sent
    candidates: npt.NDArray[np.int64]  # [n]
    user_id: list[str]
    request_id: list[str]
    numbers: dict[str, npt.NDArray[np.float64]]  # [n] each: response headers, NaN where absent
    texts: dict[str, list[str]]  # [n] each
    scores: dict[int, list[float]]  # of the sampled requests
    meta: dict[str, Any]

    @classmethod
    def empty(cls, trace: Trace, run_id: str, meta: dict[str, Any]) -> Records:
        """One row per request of the trace, none of them sent."""
        n = len(trace)
        return cls(
            labels=trace.labels,
            regime=trace.regime.copy(),
            settled=trace.settled.copy(),
            intended_s=trace.time_s.copy(),
            sent_s=np.full(n, np.nan),
            done_s=np.full(n, np.nan),
            status=np.zeros(n, dtype=np.int16),
            outcome=[Outcome.NOT_SENT] * n,
            history_tokens=trace.history_length.copy(),
            candidates=np.diff(trace.candidate_offsets),
            user_id=[trace.user_id(index) for index in range(n)],
            request_id=[f"{run_id}-{index}" for index in range(n)],
            numbers={name: np.full(n, np.nan) for name in _NUMBERS},
            texts={name: [""] * n for name in _TEXTS},
            scores={},
            meta=meta,
        )

    def __len__(self) -> int:
        return len(self.intended_s)

    @property
    def latency_ms(self) -> npt.NDArray[np.float64]:
        """From the intended arrival to the whole answer, `[n]`; NaN where there was none."""
        latency: npt.NDArray[np.float64] = (self.done_s - self.intended_s) * 1e3
        return latency

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        """Requests answered with 2xx, `[n]`."""
        return np.array([outcome is Outcome.OK for outcome in self.outcome], dtype=np.bool_)

    def answer(self, index: int, response: Response) -> None:
        """Takes over status and headers of an answer."""
        self.status[index] = response.status
        fine = 200 <= response.status < 300
        self.outcome[index] = Outcome.OK if fine else Outcome.STATUS
        for name, header in _NUMBERS.items():
            value = response.headers.get(header)
            if value is not None:
                self.numbers[name][index] = _number(value)
        for name, header in _TEXTS.items():
            self.texts[name][index] = response.headers.get(header, "")

    def write(self, path: Path) -> None:
        """Writes Parquet: one row per request, `meta` and `labels` as JSON in the schema."""
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table(
            {
                "request_id": self.request_id,
                "user_id": self.user_id,
                "regime": [self.labels[index] for index in self.regime],
                "settled": self.settled,
                "intended_s": self.intended_s,
                "sent_s": self.sent_s,
                "done_s": self.done_s,
                "latency_ms": self.latency_ms,
                "status": self.status,
                "outcome": [str(outcome) for outcome in self.outcome],
                "history_tokens": self.history_tokens,
                "candidates": self.candidates,
                **self.numbers,
                **self.texts,
                "scores": pyarrow.array(
                    [self.scores.get(index) for index in range(len(self))],
                    type=pyarrow.list_(pyarrow.float64()),
                ),
            }
        )
        stored = json.dumps({"labels": self.labels, "meta": self.meta})
        table = table.replace_schema_metadata({"hbm": stored})
        temporary = path.with_name(path.name + ".part")
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Records:
        """What `write` wrote."""
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        stored = json.loads(table.schema.metadata[b"hbm"])
        labels = tuple(stored["labels"])

        def numbers(name: str) -> Any:
            return table.column(name).to_numpy()

        def texts(name: str) -> list[str]:
            listed: list[str] = table.column(name).to_pylist()
            return listed

        return cls(
            labels=labels,
            regime=np.array([labels.index(name) for name in texts("regime")], dtype=np.int16),
            settled=numbers("settled").astype(np.bool_),
            intended_s=numbers("intended_s"),
            sent_s=numbers("sent_s"),
            done_s=numbers("done_s"),
            status=numbers("status"),
            outcome=[Outcome(text) for text in texts("outcome")],
            history_tokens=numbers("history_tokens"),
            candidates=numbers("candidates"),
            user_id=texts("user_id"),
            request_id=texts("request_id"),
            numbers={name: numbers(name) for name in _NUMBERS},
            texts={name: texts(name) for name in _TEXTS},
            scores={
                index: scores
                for index, scores in enumerate(table.column("scores").to_pylist())
                if scores is not None
            },
            meta=stored["meta"],
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
