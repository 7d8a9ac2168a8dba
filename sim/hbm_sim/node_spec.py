"""What a simulated node really is, and what it says of itself."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hbm_policy.costs import CostConstants
from hbm_pool.contracts.records import ServerInfo

RowRule = Literal["tz", "lru"]
"""Replacement of rows: the pool's own, or plain LRU to compare with."""


@dataclasses.dataclass(frozen=True, slots=True)
class NodeSpec:
    """The truth about one node. How gather and compute combine is `info.cost_model`."""

    info: ServerInfo
    costs: CostConstants
    """What a request truly takes, with `context` deciding what token_context is charged for."""
    link_bytes_per_s: float
    """Host to device: missed rows and refill share it."""
    context: Literal["causal", "whole"] = "causal"
    """A computed history token attends to the tokens up to itself, or to the whole history."""
    declared: CostConstants | None = None
    """What the server's telemetry says the costs are; None: what fits them best."""
    slice_ms: float = 0.08
    """One slice of a planned move on the serving thread: 81 µs at the median with the pool's
    default `slice_budget_us` of 60 (`hbm bench pool`)."""
    slice_rows: int = 800
    """Row slots that one slice of a planned shrink looks at: 60 µs at 75 ns each (measured 70 to
    83 ns of host time per row given up)."""
    idle_slice_ms: float = 0.1
    """An idle server does slices one after the other and looks for requests in between: time from
    one to the next."""
    growth_extents: int = 512
    """Extents that EMB wins at most at one batch boundary."""
    refill_copy_bytes: int = 1 << 18
    """One copy of the refiller: a request that comes meanwhile waits for its end."""
    queue_limit: int = 4096
    """Requests that may wait; a further one is refused."""
    telemetry_noise: float = 0.0
    """Standard deviation of the log of measured gather and compute times."""
    telemetry_delay_ticks: int = 0
    """How many ticks old the telemetry is that a decision sees."""

    def declares(self) -> CostConstants:
        """Cost constants as telemetry states them."""
        return self.declared or self.costs
