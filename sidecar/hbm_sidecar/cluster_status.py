"""What the sidecar says of itself in the status of its HBMPartition, and when it says it.

At once: another generation, another state of `Applied`. Else at most every 30 s, and only what has
left its dead band; if nothing has, once a minute, so that silence means something.
"""

from __future__ import annotations

import datetime
import math
import random
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

PROTOCOL_VERSION: Final = 1
"""Of what is said here; the controller compares it with its own (`hbm_operator.names`)."""
FIELD_MANAGER: Final = "hbm-sidecar"
REPORT_S: Final = 30.0
HEARTBEAT_S: Final = 60.0
JITTER: Final = 0.2
PENDING_GRACE_S: Final = 2.0
"""A generation is usually followed within a tick: one write then, not two."""
_DEAD_BAND: Final = {
    "alpha": 0.01,
    "target": 0.01,
    "anchor": 0.01,
    "kvHitRatio": 0.02,
    "embHitRatio": 0.02,
}
_P99_BAND: Final = 0.1
"""Share of the P99 by which it may differ unsaid."""
_EXACT: Final = ("moves", "lastDecision", "sidecar")


class Applied(NamedTuple):
    """The condition `Applied` without its times."""

    status: str
    reason: str
    message: str

    @property
    def state(self) -> tuple[str, str]:
        """What must not wait."""
        return self.status, self.reason


def measured(
    telemetry: npt.NDArray[np.void],
    *,
    fresh: bool,
    target: float,
    anchor: float,
    kv_hit_ratio: float,
    emb_hit_ratio: float,
) -> dict[str, Any]:
    """Measured values by their names in the status; what is unknown is left out.

    `telemetry`: `()` of dtype TELEMETRY. `fresh`: whether it is the word of a living server.
    """
    values = {"target": target, "anchor": anchor}
    if fresh:
        values["alpha"] = float(telemetry["alpha"])
        values["kvHitRatio"] = kv_hit_ratio
        values["embHitRatio"] = emb_hit_ratio
        if telemetry["latency_n"] > 0:
            # Three digits, be it microseconds or seconds: people read it in a column.
            values["p99Ms"] = float(f"{telemetry['latency_p99_ms']:.3g}")
    rounded: dict[str, Any] = {
        name: round(value, 4) for name, value in values.items() if math.isfinite(value)
    }
    if fresh:
        rounded["moves"] = int(telemetry["moves"])
    return rounded


def last_decision(explained: Mapping[str, Any]) -> dict[str, Any]:
    """A decision of `explain.explained` as the status holds it."""
    return {
        "time": explained["time"].replace("+00:00", "Z"),
        "reasons": explained["reasons"][:16],
        "message": explained["text"][:1024],
    }


def sidecar(restarts: int) -> dict[str, Any]:
    """Who speaks. `restarts`: of the processes of this sidecar."""
    return {
        "version": version("hbm-partition"),
        "protocol": PROTOCOL_VERSION,
        "restarts": restarts,
    }


class Report(NamedTuple):
    """Everything there is to say at one moment."""

    generation: int
    applied: Applied
    values: dict[str, Any]


class Pacing:
    """Decides when a report is due. Times are seconds of a monotonic clock."""

    def __init__(self, jitter: random.Random) -> None:
        self._jitter = jitter
        self._told: Report | None = None
        self._told_at = 0.0
        self._pending: tuple[int, float] | None = None
        """The generation that waits for its first decision, and since when."""
        self._factor = 1.0

    def due(self, report: Report, now: float) -> str:
        """Why the report is to be written now: `generation`, `condition`, `values` or
        `heartbeat`; empty: it is not."""
        told = self._told
        if report.applied.reason != "Pending":
            self._pending = None
        elif self._pending is None or self._pending[0] != report.generation:
            self._pending = report.generation, now
        if told is None or report.generation != told.generation:
            return "" if self._just_pending(now) else "generation"
        if report.applied.state != told.applied.state:
            return "" if self._just_pending(now) else "condition"
        waited = now - self._told_at
        if waited >= HEARTBEAT_S * self._factor:
            return "heartbeat"
        if waited >= REPORT_S * self._factor and _worth_saying(told, report):
            return "values"
        return ""

    def told(self, report: Report, now: float) -> None:
        """It has been written."""
        self._told, self._told_at = report, now
        self._factor = self._jitter.uniform(1.0 - JITTER, 1.0 + JITTER)

    def forget(self) -> None:
        """The object is another one, or was emptied: everything is news."""
        self._told = self._pending = None

    def _just_pending(self, now: float) -> bool:
        return self._pending is not None and now - self._pending[1] < PENDING_GRACE_S


def _worth_saying(told: Report, report: Report) -> bool:
    if told.applied != report.applied:
        return True
    before, after = told.values, report.values
    if before.keys() != after.keys():
        return True
    if any(before.get(name) != after.get(name) for name in _EXACT):
        return True
    if "p99Ms" in after and abs(after["p99Ms"] - before["p99Ms"]) > _P99_BAND * before["p99Ms"]:
        return True
    return any(
        name in after and abs(after[name] - before[name]) > band
        for name, band in _DEAD_BAND.items()
    )


def status_of(report: Report, known: Mapping[str, Any], now: datetime.datetime) -> dict[str, Any]:
    """The status to apply. `known`: the condition as it stands in the object, {} for none; its
    `lastTransitionTime` stays while its status does. `now`: aware."""
    stamp = now.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    same = known.get("status") == report.applied.status and known.get("lastTransitionTime")
    return {
        "observedGeneration": report.generation,
        "lastReportTime": stamp,
        "conditions": [
            {
                "type": "Applied",
                "status": report.applied.status,
                "reason": report.applied.reason,
                "message": report.applied.message[:1024],
                "observedGeneration": report.generation,
                "lastTransitionTime": same or stamp,
            }
        ],
        **report.values,
    }
