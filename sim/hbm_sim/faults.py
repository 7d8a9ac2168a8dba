"""Things that go wrong in a closed loop, at a given time."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from hbm_policy.costs import CostConstants


class FaultKind(Enum):
    COSTS = "costs"
    """The server declares its costs `factor` times what they are."""
    FROZEN = "frozen"
    """Telemetry stays what it was, stamp included."""
    NAN = "nan"
    """Telemetry states α and latencies that are not numbers."""
    TWIN_DEAD = "twin-dead"
    """The twin publishes nothing new."""
    CLOCK_JUMP = "clock-jump"
    """The clock that decisions read is off by `factor` seconds."""
    RESTART = "restart"
    """The server dies and is back at once: caches empty, another boot epoch."""


class Fault(NamedTuple):
    """One fault; `duration_s` means nothing for a restart."""

    kind: FaultKind
    at_s: float = 0.0
    duration_s: float = float("inf")
    factor: float = 4.0

    def active(self, time_s: float) -> bool:
        """Whether it is there at that moment."""
        return self.at_s <= time_s < self.at_s + self.duration_s


def scaled(costs: CostConstants, factor: float) -> CostConstants:
    """Constants of gather (missed rows) wrong by a factor: only their ratio to compute matters."""
    return costs._replace(row_ms=tuple(value * factor for value in costs.row_ms))
