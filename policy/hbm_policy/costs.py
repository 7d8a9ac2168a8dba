"""Prices by which candidate splits are compared, and where they come from."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.records import MAX_CLASSES


class CostConstants(NamedTuple):
    """Service time of one request, in ms.

    compute = fixed + token * computed tokens + token_context * sum over computed tokens of the
    tokens each attends to; gather = sum over classes of row[class] * missed rows. How the two
    combine is the server's `CostModel`.
    """

    fixed_ms: float
    token_ms: float
    token_context_ms: float
    row_ms: tuple[float, ...]  # by width class


class PriceState(IntEnum):
    """Where the prices of a curve come from."""

    DECLARED = 0
    """As the server declares them."""
    LEARNED = 1
    """From measured batches."""
    HELD = 2
    """As learned so far; the burst gate is open."""


class CostSource(Protocol):
    """Says what the twin should price with; an adapter that learns the constants is another one."""

    state: PriceState
    batches: int
    """Measured batches behind the prices."""

    def constants(
        self, telemetry: npt.NDArray[np.void], learn: bool = True
    ) -> CostConstants | None:
        """From one record of dtype TELEMETRY. None: nothing usable yet, keep the last ones.

        `learn` False: what this record measured teaches nothing.
        """


class DeclaredCosts:
    """The constants that the server measures and declares itself."""

    state = PriceState.DECLARED
    batches = 0

    def constants(
        self, telemetry: npt.NDArray[np.void], learn: bool = True
    ) -> CostConstants | None:
        """None when one of them is negative or not finite, or all are 0 (not yet measured)."""
        row_ms = tuple(float(value) for value in telemetry["cost_row_ms"])
        costs = CostConstants(
            fixed_ms=float(telemetry["cost_fixed_ms"]),
            token_ms=float(telemetry["cost_token_ms"]),
            token_context_ms=float(telemetry["cost_token_context_ms"]),
            row_ms=row_ms,
        )
        return costs if usable(costs) else None


def usable(costs: CostConstants) -> bool:
    """Every constant is finite and not negative, and they can tell candidates apart."""
    values = (costs.fixed_ms, costs.token_ms, costs.token_context_ms, *costs.row_ms)
    if len(costs.row_ms) > MAX_CLASSES:
        return False
    if not all(math.isfinite(value) and value >= 0.0 for value in values):
        return False
    return costs.token_ms + costs.token_context_ms + sum(costs.row_ms) > 0.0
