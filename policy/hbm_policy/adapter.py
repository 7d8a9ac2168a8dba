"""Layer 2, the cost adapter: prices learned from what batches really took.

The server counts, over its batches, requests, tokens, context and missed rows, and measures gather
and compute apart. Both are linear in what was counted, so the *differences* between two readings of
telemetry are exact samples of

    compute = fixed * requests + token * computed tokens + token_context * context
    gather  = base * batches + hit * hits + sum of row[class] * missed rows

whatever number of batches lies between them, and excitation comes from traffic, not from moving α.
Each is followed by recursive least squares on relative errors. Constants are measured in units of
what the server declares, so that 1 is the prior for all of them. `base` and `hit` are no prices
of the twin: they keep what a gather costs anyway from being taken for the price of a miss.

Forgetting is directional (Kulhavy & Karny, 1984): a sample wears off only what it speaks of.
Directions that the traffic does not excite keep their last value and their covariance, which so
stays bounded by the prior however long nothing is learned there; with exponential forgetting it
would grow until one odd sample threw the constants away.

A misprice is what breaks a computed α: prices wrong by x1/2, x2, x4 move the anchor by up to 0.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.records import MAX_CLASSES, TELEMETRY

from hbm_policy.config import AdapterConfig
from hbm_policy.costs import CostConstants, DeclaredCosts, PriceState
from hbm_policy.intake import Fields

PRIOR_SD: Final = 1.0
"""How far a constant may be from the declared one before any batch was measured, as its share."""
NOISE_SD: Final = 0.2
"""How far one batch's time is from what its constants say, as its share."""
MAX_SURPRISE: Final = 1.0
"""Larger relative errors count as this: a pause of the machine is no price."""
EXTRA_UNIT: Final = 0.1
"""Unit of the constants that nobody declares, as a share of a gather and of a missed row."""
FADING_MIN: Final = 0.5
"""A single sample wears off no more of what was known than this."""
MIN_MS: Final = 1e-6
"""Expected time below which a sample says nothing."""


class Rls:
    """Recursive least squares with directional forgetting on n constants.

    Scalars, not arrays: n is 3 to 6, where one numpy call costs as much as the whole update.
    """

    def __init__(self, units: Sequence[float], start: Sequence[float]) -> None:
        """`units` [n]: what 1 means, in ms per count; a constant of unit 0 stays as it is.
        `start` [n]: first values, in units."""
        self.units = list(units)
        self.values = list(start)
        self._active = [i for i, unit in enumerate(units) if unit > 0.0]
        prior = (PRIOR_SD / NOISE_SD) ** 2
        self.covariance = [[prior * (i == j) for j in self._active] for i in self._active]

    def learn(
        self,
        counts: Sequence[float],
        ms: float,
        batches: float,
        forgetting: float,
        low: Sequence[float],
        high: Sequence[float],
    ) -> bool:
        """One sample: `counts` [n] took `ms` in so many batches. Constants stay in [low, high].

        False: it said nothing.
        """
        units, values, active, covariance = self.units, self.values, self._active, self.covariance
        features = [counts[i] * units[i] for i in active]
        expected_ms = sum([x * values[i] for x, i in zip(features, active, strict=True)])
        if not (MIN_MS < expected_ms < math.inf and 0.0 <= ms < math.inf):
            return False
        # Relative to what was expected, which is never less than the bounds allow: an estimate on
        # its way would weigh what it underrates too much. The mean of b batches scatters less by
        # sqrt(b).
        least_ms = sum([x * low[i] for x, i in zip(features, active, strict=True)])
        scale = math.sqrt(batches) / max(expected_ms, least_ms)
        features = [x * scale for x in features]
        toward = [sum([p * x for p, x in zip(row, features, strict=True)]) for row in covariance]
        known = sum([x * t for x, t in zip(features, toward, strict=True)])
        if not known > 0.0:
            return False
        limit = MAX_SURPRISE * math.sqrt(batches)
        surprise = min(max((ms - expected_ms) * scale, -limit), limit)
        step = surprise / (1.0 + known)
        for i, t in zip(active, toward, strict=True):
            values[i] += t * step
        self._bind(low, high)
        fading = max(forgetting**batches, FADING_MIN)
        share = fading - (1.0 - fading) / known
        if share != 0.0:
            gain = 1.0 / (1.0 / share + known)
            for row, t in zip(covariance, toward, strict=True):
                row[:] = [p - gain * t * u for p, u in zip(row, toward, strict=True)]
        return True

    @property
    def constants(self) -> list[float]:
        """ms per count, [n]."""
        return [unit * value for unit, value in zip(self.units, self.values, strict=True)]

    def _bind(self, low: Sequence[float], high: Sequence[float]) -> None:
        """Puts values that left their bounds on them, and moves the others to where they are most
        likely then: cutting one alone would leave its error to those beside it.

        One after the other, each given those before: what has been put on its bound stays there.
        With the unconditional covariance the second would move the first off its bound again.
        """
        values, active = self.values, self._active
        given = self.covariance
        left = list(range(len(active)))
        while left:
            far = [
                max(low[active[at]] - values[active[at]], values[active[at]] - high[active[at]])
                / math.sqrt(given[at][at])
                if given[at][at] > 0.0
                else -math.inf
                for at in left
            ]
            worst = max(far)
            if not worst > 0.0:
                break
            at = left.pop(far.index(worst))
            i = active[at]
            row = given[at]
            step = (min(max(values[i], low[i]), high[i]) - values[i]) / row[at]
            for j in left:
                values[active[j]] += row[j] * step
            values[i] += row[at] * step
            given = [
                [p - one[at] * q / row[at] for p, q in zip(one, row, strict=True)] for one in given
            ]
        for i in active:
            values[i] = min(max(values[i], low[i]), high[i])


_ROWS_AT: Final = 2
"""Constants of a gather before those of missed rows: base and hit."""
_COUNTS: Final = Fields(
    TELEMETRY,
    (
        "boot_epoch",
        "requests",
        "batches",
        "kv_tokens_computed",
        "candidate_tokens",
        "context_tokens",
        "gather_ms",
        "compute_ms",
        "timed_accesses",
        "timed_misses",
    ),
)


class _Counts:
    """What one reading of telemetry counted so far."""

    __slots__ = ("batches", "compute", "compute_ms", "epoch", "gather", "gather_ms")

    def __init__(self, telemetry: npt.NDArray[np.void]) -> None:
        epoch, requests, batches, new, candidates, context, gather_ms, compute_ms, rows, *misses = (
            _COUNTS.unpack_from(telemetry.tobytes())
        )
        self.epoch, self.batches = epoch, batches
        self.gather_ms, self.compute_ms = gather_ms, compute_ms
        self.compute = (requests, new + candidates, context)
        self.gather = (batches, rows - sum(misses), *misses)


class RlsAdapter:
    """A `CostSource`: the declared constants, corrected by what was measured, within a factor."""

    def __init__(self, config: AdapterConfig | None = None) -> None:
        self.config = config or AdapterConfig()
        self.state = PriceState.DECLARED
        self.batches = 0
        self._declared = DeclaredCosts()
        self._seen: _Counts | None = None
        self._compute: Rls | None = None
        self._gather: Rls | None = None

    def constants(
        self, telemetry: npt.NDArray[np.void], learn: bool = True
    ) -> CostConstants | None:
        """From one record of dtype TELEMETRY; None before the server has declared any.

        Readings that come in order are differenced; a new boot of the server starts anew.
        `learn` False (an open burst gate): what came since the last reading teaches nothing.
        """
        declared = self._declared.constants(telemetry)
        if declared is None:
            return None
        now, before = _Counts(telemetry), self._seen
        self._seen = now
        if before is None or now.epoch != before.epoch or now.batches < before.batches:
            self.state, self.batches = PriceState.DECLARED, 0
            self._compute = self._gather = None
            return declared
        batches = now.batches - before.batches
        if batches > 0 and self.config.adapter_limit > 1.0:
            if learn:
                self._learn(now, before, batches, declared)
            elif self.state is PriceState.LEARNED:
                self.state = PriceState.HELD
        return self._prices(declared)

    def _learn(self, now: _Counts, before: _Counts, batches: int, declared: CostConstants) -> None:
        compute_ms = declared[:3]
        row_ms = (*declared.row_ms, *([0.0] * (MAX_CLASSES - len(declared.row_ms))))
        gathered_ms = now.gather_ms - before.gather_ms
        if self._compute is None:
            self._compute = Rls(compute_ms, [1.0] * len(compute_ms))
        if self._gather is None and gathered_ms > MIN_MS:
            extra_ms = (EXTRA_UNIT * gathered_ms / batches, EXTRA_UNIT * max(row_ms))
            self._gather = Rls((*extra_ms, *row_ms), [0.0] * _ROWS_AT + [1.0] * MAX_CLASSES)
        learned = self._follow(
            self._compute,
            compute_ms,
            [float(new - old) for new, old in zip(now.compute, before.compute, strict=True)],
            now.compute_ms - before.compute_ms,
            batches,
        )
        if self._gather is not None:
            learned |= self._follow(
                self._gather,
                row_ms,
                [float(new - old) for new, old in zip(now.gather, before.gather, strict=True)],
                gathered_ms,
                batches,
            )
        if learned:
            self.state = PriceState.LEARNED
            self.batches += batches

    def _follow(
        self,
        rls: Rls,
        declared_ms: Sequence[float],
        counts: list[float],
        ms: float,
        batches: int,
    ) -> bool:
        """One sample; the last constants are bound to what is declared for them now."""
        limit, free = self.config.adapter_limit, len(rls.units) - len(declared_ms)
        middle = [
            declared / unit if unit > 0.0 else 0.0
            for declared, unit in zip(declared_ms, rls.units[free:], strict=True)
        ]
        low = [0.0] * free + [value / limit for value in middle]
        high = [math.inf] * free + [value * limit for value in middle]
        return rls.learn(counts, ms, batches, self.config.adapter_forgetting, low, high)

    def _prices(self, declared: CostConstants) -> CostConstants:
        if self._compute is None:
            return declared
        fixed_ms, token_ms, token_context_ms = self._compute.constants
        row_ms = declared.row_ms
        if self._gather is not None:
            row_ms = tuple(self._gather.constants[_ROWS_AT:])
        return CostConstants(fixed_ms, token_ms, token_context_ms, row_ms)
