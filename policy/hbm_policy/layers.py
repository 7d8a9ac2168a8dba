"""Seams of the layers above the anchor: burst gate and learned residual.

A layer sees a few values and returns a small one; its memory, if it has any, is part of
`PolicyState`, so that decisions stay replayable.

A residual answers an observation with an *action*: four numbers in [-1, 1], all 0 for "as you would
without me", so that its gain scales all of them and an untrained one changes nothing.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple, Protocol

from hbm_policy.reading import NO_CORRECTION, STEADY, Correction, Gating, Reading

ACTION_NAMES: Final = ("shift", "fraction", "slew", "wait")
"""shift: of the anchor, 1 is `MAX_CORRECTION`; fraction: log2 of the factor on the part of the way
that a move goes; slew: log4 of the factor on its speed; wait: above ½ no move starts."""
MAX_CORRECTION: Final = 0.05
"""Largest |Δα| of a residual that is taken; a larger one is cut."""
MAX_SLEW_SCALE: Final = 4.0
"""Largest factor on the speed of a move, of all layers together."""
WAIT_ABOVE: Final = 0.5


_new: Final = tuple.__new__


class Action(NamedTuple):
    """What a residual answers, each in [-1, 1]."""

    shift: float
    fraction: float
    slew: float
    wait: float


class Gate(Protocol):
    """Notices a change of regime by signals that our own action cannot move."""

    def step(self, reading: Reading, memory: tuple[float, ...]) -> Gating:
        """`memory` is () at first and after a restart of the server."""


class Residual(Protocol):
    """A bounded correction of a trusted anchor."""

    gain: float
    """How much of its wish its maker found worth taking, 0..1."""

    def act(self, observation: tuple[float, ...]) -> Action:
        """`observation`: by `observation.OBSERVATION_NAMES`. NaN: no correction."""


class SteadyGate:
    """Never opens."""

    def step(self, reading: Reading, memory: tuple[float, ...]) -> Gating:
        """No burst."""
        return STEADY


def correction_of(action: Action, gain: float) -> Correction | None:
    """The correction that `gain` of an action is, within bounds; None: it is no number."""
    shift, fraction, slew, wait = action
    # A NaN anywhere makes the sum one.
    total = shift + fraction + slew + wait
    if total != total:
        return None
    return _new(
        Correction,
        (
            MAX_CORRECTION * _unit(gain * shift),
            math.exp2(2.0 * _unit(gain * slew)),
            math.exp2(_unit(gain * fraction)),
            gain * wait > WAIT_ABOVE,
        ),
    )


def _unit(value: float) -> float:
    return -1.0 if value < -1.0 else 1.0 if value > 1.0 else value


__all__ = [
    "ACTION_NAMES",
    "MAX_CORRECTION",
    "MAX_SLEW_SCALE",
    "NO_CORRECTION",
    "STEADY",
    "Action",
    "Correction",
    "Gate",
    "Gating",
    "Residual",
    "SteadyGate",
    "correction_of",
]
