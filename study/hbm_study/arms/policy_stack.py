"""The product's own decision as an arm: the real `Policy`, real adapter and real twin.

The twin prices its curve with what the adapter has learned. A serial server's curve is linear in
the prices and is priced anew from the track that all arms share; an overlapped one's is a maximum
taken request by request, so that the arm runs a twin of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from hbm_policy.adapter import RlsAdapter
from hbm_policy.costs import CostConstants
from hbm_policy.decide import Policy
from hbm_policy.intake import read_curve
from hbm_policy.layers import Action as ResidualAction
from hbm_policy.layers import Residual
from hbm_policy.reading import Curve, Decision, PolicyState, Reason
from hbm_policy.twin import Twin
from hbm_pool.contracts.records import CURVES, MAX_CLASSES, CostModel
from hbm_sim.curve_track import CurveTrack, TwinSamples
from hbm_sim.loop import Action, Observation
from hbm_sim.node_spec import NodeSpec
from hbm_sim.stream import Stream

from hbm_study.arms.config import ArmError, PolicyArm

_OPEN = int(Reason.GATE_OPEN)


class _Prices(Protocol):
    """A twin's curve at given prices."""

    def curve(self, observation: Observation, costs: CostConstants) -> Curve | None: ...

    def served(self, stream: Stream, begin: int, end: int) -> None: ...


class PolicyStack:
    """Layers as configured; see `PolicyArm`."""

    def __init__(self, name: str, config: PolicyArm, track: CurveTrack) -> None:
        """Raises `ArmError` for a residual that cannot be loaded."""
        self.name = name
        self._config = config
        self._policy = Policy(config.policy_config(), residual=_residual(config))
        self._track = track

    def start(self, spec: NodeSpec, seed: int) -> None:
        """A sidecar that knows nothing yet."""
        self._state = PolicyState()
        self._open = False
        self._adapter = None if self._config.adapter is None else RlsAdapter(self._config.adapter)
        self._prices: _Prices | None = None
        if self._adapter is not None:
            overlapped = spec.info.cost_model == CostModel.OVERLAP
            self._prices = _OwnTwin(spec) if overlapped else _SharedTwin(self._track)

    def act(self, observation: Observation) -> Action:
        """One decision."""
        reading = observation.reading
        if self._adapter is not None and self._prices is not None:
            # Costs are as ever in a burst; what is measured meanwhile is mixed with its queue.
            costs = self._adapter.constants(observation.telemetry, learn=not self._open)
            if costs is not None:
                curve = self._prices.curve(observation, costs)
                reading = reading._replace(curve=curve)
        decision = self._policy.decide(reading, self._state)
        self._state = decision.state
        self._open = bool(decision.reasons & _OPEN)
        return self._action(decision, observation)

    def served(self, stream: Stream, begin: int, end: int, outcome: Any) -> None:
        """What the twin of an overlapped server sees."""
        if self._prices is not None:
            self._prices.served(stream, begin, end)

    def _action(self, decision: Decision, observation: Observation) -> Action:
        config, reading = self._config, observation.reading
        alpha, refill = decision.target, decision.refill_bytes_per_s
        known = decision.anchor == decision.anchor
        if not config.shield and known:
            alpha = min(max(decision.anchor, reading.alpha_min), reading.alpha_max)
        if not config.throttle:
            refill = reading.refill_bytes_per_s
        if not config.refill:
            refill = 0.0
        drop_only = config.drop_only or decision.drop_only
        return Action(
            alpha, refill, decision.anchor, decision.reasons, drop_only, decision.generation
        )


class _SharedTwin:
    """The track of a serial server, priced anew tick by tick."""

    def __init__(self, track: CurveTrack) -> None:
        self._track = track
        self._at: dict[int, int] = {
            int(stamp): tick for tick, stamp in enumerate(track.records["monotonic_ns"])
        }

    def curve(self, observation: Observation, costs: CostConstants) -> Curve | None:
        """The curve that the reading holds, at these prices."""
        shown = observation.reading.curve
        if shown is None or not shown.cost_ms:
            return shown
        record = self._track.records[self._at[shown.monotonic_ns]]
        points = len(shown.alpha)
        row_ms = np.zeros(MAX_CLASSES)
        row_ms[: len(costs.row_ms)] = costs.row_ms
        cost_ms = (
            costs.fixed_ms
            + costs.token_ms * record["compute_tokens"][:points]
            + costs.token_context_ms * record["context_tokens"][:points]
            + record["rows_missed"][:points] @ row_ms
        )
        return shown._replace(cost_ms=tuple(cost_ms.tolist()))

    def served(self, stream: Stream, begin: int, end: int) -> None:
        """The track has seen them."""


class _OwnTwin:
    """A twin that is fed what was served, as in the sidecar."""

    def __init__(self, spec: NodeSpec) -> None:
        self._spec = spec
        self._twin: Twin | None = None
        self._boot_epoch = 0
        self._samples: TwinSamples | None = None
        self._fed = self._served = 0
        self._now_ns = 0
        self._curve: Curve | None = None
        self._record: npt.NDArray[Any] = np.zeros((), CURVES)

    def curve(self, observation: Observation, costs: CostConstants) -> Curve | None:
        """After everything that was served before this tick."""
        reading = observation.reading
        shown = reading.curve
        if self._samples is None or shown is None:
            return None
        if shown.monotonic_ns == self._now_ns:  # a dead twin says nothing new
            return self._curve
        self._now_ns = shown.monotonic_ns
        if self._twin is None or self._boot_epoch != reading.boot_epoch:
            self._twin = Twin(self._info, clock_ns=lambda: self._now_ns)
            self._boot_epoch = reading.boot_epoch
        if self._served > self._fed:
            samples = self._samples
            self._twin.feed([samples[i] for i in range(self._fed, self._served)], 0, costs)
            self._fed = self._served
        self._twin.curves(self._record)
        self._record["boot_epoch"] = self._boot_epoch
        self._curve = read_curve(self._record)
        return self._curve

    def served(self, stream: Stream, begin: int, end: int) -> None:
        """Fed at the next tick, with the prices of then."""
        if self._samples is None:
            rate = min(self._spec.info.sample_rate, stream.rate)
            self._info = dataclasses.replace(self._spec.info, sample_rate=rate)
            self._samples = TwinSamples(stream, self._info)
            self._fed = begin
        self._served = end


class _WholeGain:
    """A residual whose file may state a gain of 0: here it is evaluated, so all of it counts."""

    gain = 1.0

    def __init__(self, residual: Residual) -> None:
        self._residual = residual

    def act(self, observation: tuple[float, ...]) -> ResidualAction:
        """The residual's."""
        return self._residual.act(observation)


def _residual(config: PolicyArm) -> Residual | None:
    if config.residual is None or config.residual.residual_gain <= 0.0:
        return None
    from hbm_study.arms.residual_file import load_residual

    try:
        return _WholeGain(load_residual(config.residual_file))
    except (OSError, ValueError, ImportError) as error:
        raise ArmError(f"the learned residual cannot be loaded: {error}") from error
