"""Parameters of the decision. Every field says its unit and what 0 means.

The names are unique over all layers: the sidecar takes each as a flag and an environment variable.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

_STRICT: Final = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
_MAX_MS: Final = 3.6e6
"""An hour: ages and ticks are never longer."""


class AnchorConfig(BaseModel):
    """Layer 0: from the twin's curve to α̂."""

    model_config = _STRICT

    smoothing_requests: NonNegative = 128.0
    """Requests after which an old curve counts for 37 %. 0: only the newest curve counts."""
    keep_gain: Share = 0.0005
    """α̂ stays while another candidate would save less than this share of the cost. 0: it follows
    every change of the minimum."""
    keep_gain_ms: NonNegative = 0.0
    """As `keep_gain`, in ms per request; both must be exceeded. 0: only the share counts."""
    min_warm: Share = 0.8
    """The anchor is trusted when this share of the virtual caches is warm. 0: from the start."""
    curve_stale_ms: Annotated[Positive, Field(le=_MAX_MS)] = 2000.0
    """A curve older than this is no evidence; α̂ stays and no new move starts."""


class MoveConfig(BaseModel):
    """What a move may cost. Part of the wish: it may change while the process runs."""

    model_config = _STRICT

    move_fraction: Annotated[Share, Field(gt=0.0)] = 0.75
    """Part of the way from α to the anchor that one move goes: an abrupt full move costs more
    than it brings. 1: all of it."""
    slew_per_s: Positive = 0.05
    """Speed of a move in α per second."""
    min_change: Share = 0.02
    """No move starts while α is this close to the anchor. 0: any distance."""
    dwell_ms: Annotated[NonNegative, Field(le=24 * _MAX_MS)] = 1000.0
    """Least time between moves, whatever the traffic. 0: accesses alone count."""


class ShieldConfig(MoveConfig):
    """The last layer: what may be commanded, how fast, how often."""

    model_config = _STRICT

    stale_ms: Annotated[Positive, Field(le=_MAX_MS)] = 2000.0
    """Telemetry older than this: the server is dead, nothing is decided."""
    clock_slack_ms: Annotated[NonNegative, Field(le=_MAX_MS)] = 50.0
    """Telemetry may be this far in the future (it was written while we read). 0: not at all."""
    min_gain: Share = 0.003
    """No move starts that is predicted to save less than this share of the cost. 0: any gain."""
    min_gain_ms: NonNegative = 0.0
    """As `min_gain`, in ms per request; both must be exceeded. 0: only the share counts."""
    dwell_accesses_per_slot: NonNegative = 0.8
    """EMB accesses per EMB slot between the end of a move and the next: oscillation costs more
    than either split. 0: no dwell."""
    dwell_double_change: Positive = 0.3
    """A move of this |Δα| doubles the dwell that follows it, twice of it triples it."""
    refill_link_busy: Share = 0.9
    """Refill is paused when the link is busy for more than this share of the time; below it the
    budget shrinks with the idle share. 1: never paused. 0: only on an idle link."""


class PolicyConfig(BaseModel):
    """All layers that decide."""

    model_config = _STRICT

    anchor: AnchorConfig = AnchorConfig()
    shield: ShieldConfig = ShieldConfig()

    def flat(self) -> dict[str, Any]:
        """Every parameter by its name."""
        return self.anchor.model_dump() | self.shield.model_dump()
