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
    min_gain: Share = 0.01
    """No move starts that is predicted to save less than this share of the cost: within 1 % of the
    best lies the plateau, where the copies of a move cost the tail more than it brings. 0: any
    gain."""
    min_gain_ms: NonNegative = 0.0
    """As `min_gain`, in ms per request; both must be exceeded. 0: only the share counts."""
    dwell_accesses_per_slot: NonNegative = 0.8
    """EMB accesses per EMB slot between the end of a move and the next, after which rows have
    settled: oscillation costs more than either split. 0: no dwell."""
    dwell_requests: NonNegative = 128.0
    """Requests between the end of a move and the next, where these are fewer: α̂ rests on new
    evidence then (a smoothing window), and in a large pool rows take thousands to settle. 0: no
    dwell."""
    dwell_double_change: Positive = 0.3
    """A move of this |Δα| doubles the dwell that follows it, twice of it triples it."""
    drop_wait_slo: NonNegative = 0.5
    """EMB drops what it gives up, instead of relocating it, while more waits at the server than can
    be served in this share of the latency goal: it has no idle time to relocate in, and KV needs
    the room. 0, or no goal: never."""
    refill_link_busy: Share = 0.9
    """Refill is paused when the link is busy for more than this share of the time; below it the
    budget shrinks with the idle share. 1: never paused. 0: only on an idle link."""


class GateConfig(BaseModel):
    """Layer 3, the burst gate: what counts as a change of regime, and what follows it."""

    model_config = _STRICT

    gate_threshold: NonNegative = 8.0
    """Evidence (sum of standard deviations beyond `gate_drift`) at which the gate opens. 0: it
    never opens."""
    gate_drift: NonNegative = 1.0
    """Standard deviations by which a sample may differ without being evidence. 0: all of it is."""
    gate_baseline_samples: Annotated[int, Field(ge=8, le=100_000)] = 256
    """Samples after which an old one counts for 37 % in what is normal."""
    gate_requests: Annotated[int, Field(ge=1, le=100_000)] = 16
    """Simulated requests behind one sample of the cost."""
    gate_burst_ticks: Annotated[int, Field(ge=1, le=10_000)] = 16
    """Ticks for which the gate stays open: the newest curve counts alone and moves are faster."""
    gate_refractory_ticks: Annotated[int, Field(ge=0, le=10_000)] = 32
    """Least ticks between two openings. 0: none."""
    gate_slew: Annotated[Positive, Field(le=4.0)] = 2.0
    """Factor on the speed of moves while the gate is open. 1: as ever."""
    gate_recover_ms: Annotated[NonNegative, Field(le=_MAX_MS)] = 10_000.0
    """Longest recovery: the time that the link needs to refill what moved, at most this. Until
    then moves are no faster than the refill and none starts in the other direction. 0: none."""


class AdapterConfig(BaseModel):
    """Layer 2, the cost adapter: how prices are learned from measured batches."""

    model_config = _STRICT

    adapter_limit: Annotated[float, Field(ge=1.0, le=100.0, allow_inf_nan=False)] = 4.0
    """Learned prices stay within this factor of what the server declares. 1: they are what it
    declares, nothing is learned."""
    adapter_forgetting: Annotated[float, Field(gt=0.9, le=1.0)] = 0.9995
    """Weight that a batch keeps after each later one. 1: nothing is forgotten."""


class ResidualConfig(BaseModel):
    """Layer 1, the learned residual: how much of its wish is taken."""

    model_config = _STRICT

    residual_gain: Share = 0.0
    """Share of the learned correction that is taken, times the gain that its file states. 0: no
    correction, and none is computed."""
    residual_wait_ticks: Annotated[int, Field(ge=0, le=10_000)] = 40
    """Ticks in a row for which the residual may put a move off. 0: none."""


class PolicyConfig(BaseModel):
    """All layers that decide. `gate` or `adapter` None: without that layer."""

    model_config = _STRICT

    anchor: AnchorConfig = AnchorConfig()
    shield: ShieldConfig = ShieldConfig()
    gate: GateConfig | None = GateConfig()
    adapter: AdapterConfig | None = AdapterConfig()
    residual: ResidualConfig = ResidualConfig()

    def flat(self) -> dict[str, Any]:
        """Every parameter by its name."""
        parts = (self.anchor, self.shield, self.gate, self.adapter, self.residual)
        return {
            name: value
            for part in parts
            if part is not None
            for name, value in part.model_dump().items()
        }
