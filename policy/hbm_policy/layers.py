"""Seams of the layers above the anchor: burst gate and learned residual.

A layer sees the reading and returns a small value; its memory, if it has any, is part of
`PolicyState`, so that decisions stay replayable. `SteadyGate` and `NoResidual` are the policy that
ships: every regime change is followed at the anchor's own pace, and nothing is learned.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from hbm_policy.reading import Reading


class Gating(NamedTuple):
    """What a burst gate asks for."""

    open: bool  # the newest curve replaces the smoothed one
    slew_scale: float  # factor on the speed of moves
    memory: tuple[float, ...]  # kept for the next decision


class Correction(NamedTuple):
    """What a residual asks for, around the anchor."""

    alpha: float  # added to the anchor
    slew_scale: float  # factor on the speed of moves


class Gate(Protocol):
    """Notices a change of regime by signals that our own action cannot move."""

    def step(self, reading: Reading, memory: tuple[float, ...]) -> Gating:
        """`memory` is () at first and after a restart of the server."""


class Residual(Protocol):
    """A bounded correction of a trusted anchor."""

    def correct(self, reading: Reading, anchor: float, gain: float) -> Correction:
        """`gain`: predicted saving of going from the applied α to the anchor, as a share."""


_STEADY: Final = Gating(open=False, slew_scale=1.0, memory=())
NO_CORRECTION: Final = Correction(alpha=0.0, slew_scale=1.0)
MAX_CORRECTION: Final = 0.05
"""Largest |Δα| of a residual that is taken; a larger one is cut."""
MAX_SLEW_SCALE: Final = 4.0


class SteadyGate:
    """Never opens."""

    def step(self, reading: Reading, memory: tuple[float, ...]) -> Gating:
        """No burst."""
        return _STEADY


class NoResidual:
    """Goes where the anchor is."""

    def correct(self, reading: Reading, anchor: float, gain: float) -> Correction:
        """No correction."""
        return NO_CORRECTION
