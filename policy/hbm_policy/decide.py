"""One decision: a pure function of what was read and what was remembered.

Order: faults and mode (hold?) -> burst gate -> anchor -> residual -> shield -> refill budget. The
same (reading, state) always gives the same decision; `Decision.state` goes into the next call.
"""

from __future__ import annotations

import math
from typing import Final

from hbm_pool.contracts.records import Mode

from hbm_policy.anchor import Estimate, TwinAnchor, cost_at
from hbm_policy.config import PolicyConfig
from hbm_policy.gate import BurstGate, Phase
from hbm_policy.layers import MAX_SLEW_SCALE, Gate, Residual, SteadyGate, correction_of
from hbm_policy.observation import NOTHING_OBSERVED, observe
from hbm_policy.reading import (
    HOLDS,
    NO_CORRECTION,
    Correction,
    Decision,
    Gating,
    PolicyState,
    Reading,
    Reason,
)
from hbm_policy.shield import Shield, Steered, Wish

_HOLD: Final = int(Mode.HOLD)
_AUTO: Final = int(Mode.AUTO)
_RECOMMEND: Final = int(Mode.RECOMMEND)
_FIXED: Final = int(Mode.FIXED)
_NO_TELEMETRY: Final = int(Reason.NO_TELEMETRY)
_RESTARTED: Final = int(Reason.SERVER_RESTARTED)
_GUESSING: Final = (_AUTO, _RECOMMEND)
"""Modes that follow the anchor."""
_MODE_REASON: Final = {
    _HOLD: int(Reason.MODE_HOLD),
    _AUTO: 0,
    _RECOMMEND: int(Reason.MODE_RECOMMEND),
    _FIXED: int(Reason.MODE_FIXED),
}
_SERVER_LIMITED: Final = int(Reason.SERVER_LIMITED)
_GATE_OPEN: Final = int(Reason.GATE_OPEN)
_RECOVERING: Final = int(Phase.RECOVERING)
_GATE_RECOVERING: Final = int(Reason.GATE_RECOVERING)
_RESIDUAL: Final = int(Reason.RESIDUAL)
_RESIDUAL_WAITS: Final = int(Reason.RESIDUAL_WAITS)
_RESIDUAL_INVALID: Final = int(Reason.RESIDUAL_INVALID)
_DROPPING: Final = int(Reason.DROPPING)
_REFILL_PAUSED: Final = int(Reason.REFILL_PAUSED)


_new: Final = tuple.__new__
"""Makes a NamedTuple from its fields in order, in half the time of its own constructor."""


class Policy:
    """The layers of one configuration. Holds no state: that travels in `PolicyState`."""

    def __init__(
        self,
        config: PolicyConfig | None = None,
        gate: Gate | None = None,
        residual: Residual | None = None,
    ) -> None:
        """`gate`: instead of the one of `config.gate`. `residual` is asked only where
        `config.residual.residual_gain` and its own gain leave anything of its answer."""
        config = config or PolicyConfig()
        self.config = config
        self._anchor = TwinAnchor(config.anchor)
        self._shield = Shield(config.shield)
        if gate is None:
            gate = SteadyGate()
            if config.gate is not None and config.gate.gate_threshold > 0.0:
                gate = BurstGate(config.gate, config.anchor.min_warm)
        self._gate: Gate = gate
        self._gain = config.residual.residual_gain * (0.0 if residual is None else residual.gain)
        self._residual = residual if self._gain > 0.0 else None

    def decide(self, reading: Reading, state: PolicyState) -> Decision:
        """What to do now; see the module."""
        shield = self._shield
        faults = shield.faults(reading, state)
        if faults:
            return _hold(reading, state, faults)
        if state.boot_epoch != reading.boot_epoch:
            return _adopt(reading, state)
        reasons = 0
        mode = reading.mode
        assert mode is not None  # a missing mode is a fault
        here = reading.alpha_target
        # Steer from where the pool is, not from what was once wanted.
        if mode != state.mode:
            state = state._replace(mode=mode, target=here, goal=_first_goal(reading))
        elif _limited(reading, state):
            reasons = _SERVER_LIMITED
            # A fixed α out of the server's reach is one move, not a new one at each tick.
            state = state._replace(target=here, goal=state.goal if mode == _FIXED else here)
        bounds = shield.bounds(reading)
        gating = self._gate.step(reading, state.gate)
        if gating.open:
            reasons |= _GATE_OPEN
        elif gating.phase == _RECOVERING:
            reasons |= _GATE_RECOVERING
        estimate = self._anchor.estimate(reading, state, bounds[0], bounds[1], gating.open)
        reasons |= estimate.reasons | _MODE_REASON[mode]
        correction, observed = NO_CORRECTION, state.observed
        if self._residual is not None:
            features, observed = observe(reading, state, estimate, gating)
            if estimate.trust > 0.0 and mode in _GUESSING:
                correction, said = self._ask(self._residual, features, state)
                reasons |= said
        if mode == _HOLD:
            remembered = _remember(reading, state, estimate, gating.memory, observed)
            return _decision(reading, remembered, estimate, False, reasons, gating)
        wish: Wish | None = None
        if mode == _FIXED:
            wish = Wish(reading.alpha_fixed, 0.0, 0.0, 1.0, free=True)
        elif estimate.trust > 0.0:
            shift, scale, fraction_scale, wait = correction
            scale = _scale(scale * gating.slew_scale)
            wish = _new(
                Wish,
                (
                    estimate.anchor + shift,
                    estimate.gain,
                    estimate.gain_ms,
                    scale,
                    False,
                    fraction_scale,
                    wait,
                    gating.barred,
                    gating.slew_limit_per_s,
                ),
            )
        steered = shield.steer(reading, state, bounds, wish)
        refill = shield.refill_bytes_per_s(reading, steered.target)
        if refill == 0.0:
            reasons |= _REFILL_PAUSED
        reasons |= steered.reasons
        if reading.traffic.queue_depth and estimate.curve_cost_ms:
            now_ms = cost_at(estimate.curve_alpha, estimate.curve_cost_ms, reading.alpha)
            if shield.drops(reading, steered.target, now_ms):
                reasons |= _DROPPING
        waits = state.waits + 1 if reasons & _RESIDUAL_WAITS else 0
        return _command(
            reading,
            state,
            estimate,
            steered,
            refill,
            bounds,
            reasons,
            (gating.memory, observed, waits),
            (gating, correction, math.nan if wish is None else wish.alpha),
        )

    def observe(self, reading: Reading, state: PolicyState) -> tuple[float, ...]:
        """What the residual would be shown by `decide(reading, state)`; for training.

        The features by `observation.OBSERVATION_NAMES`, zeros where nothing can be decided.
        """
        if self._shield.faults(reading, state) or state.boot_epoch != reading.boot_epoch:
            return NOTHING_OBSERVED
        low, high = self._shield.bounds(reading)
        gating = self._gate.step(reading, state.gate)
        estimate = self._anchor.estimate(reading, state, low, high, gating.open)
        return observe(reading, state, estimate, gating).features

    def _ask(
        self, residual: Residual, features: tuple[float, ...], state: PolicyState
    ) -> tuple[Correction, int]:
        """The correction that is taken, and what is to be said of it."""
        correction = correction_of(residual.act(features), self._gain)
        if correction is None:
            return NO_CORRECTION, _RESIDUAL_INVALID
        if correction.wait and state.waits >= self.config.residual.residual_wait_ticks:
            correction = correction._replace(wait=False)
        return correction, _RESIDUAL


def _hold(reading: Reading, state: PolicyState, reasons: int) -> Decision:
    """Nothing is written; a move under way ends where it is."""
    if reasons & _NO_TELEMETRY:
        alpha = math.nan
    else:
        alpha = reading.alpha if 0.0 <= reading.alpha <= 1.0 else math.nan
    target = state.target
    if target != target:
        target = alpha if alpha == alpha else 0.5
    held = state._replace(
        tick=state.tick + 1,
        # A clock that went back (a restored checkpoint) costs one decision, not all until it has
        # caught up.
        now_ns=reading.now_ns,
        move_ns=min(state.move_ns, reading.now_ns),
        goal=state.target,
    )
    mode = reading.mode if reading.mode in _MODE_REASON else _HOLD
    return Decision(
        False,
        target,
        state.command_refill,
        state.generation,
        False,
        reasons,
        held.tick,
        int(mode or 0),
        alpha,
        state.anchor,
        0.0,
        0.0,
        held,
    )


def _adopt(reading: Reading, state: PolicyState) -> Decision:
    """First sound reading of a server's boot: take over where it is, decide from the next one."""
    fresh = PolicyState(
        boot_epoch=reading.boot_epoch,
        tick=state.tick,
        now_ns=reading.now_ns,
        mode=int(reading.mode or 0),
        generation=max(state.generation, reading.command_generation),
        target=reading.alpha_target,
        goal=reading.alpha_target,
        move_ns=reading.now_ns,
        move_accesses=reading.emb_accesses,
        move_requests=reading.requests,
        emb_accesses=reading.emb_accesses,
    )
    decision = _hold(reading, fresh, _RESTARTED)
    return decision._replace(state=decision.state._replace(goal=_first_goal(reading)))


def _first_goal(reading: Reading) -> float:
    """A server that nobody has commanded yet goes to the α it is to begin with, if one is given;
    any other one stays where it is going."""
    wanted = reading.alpha_initial
    if (
        reading.command_generation == 0
        and reading.mode in (_AUTO, _RECOMMEND)
        and 0.0 <= wanted <= 1.0
    ):
        return wanted
    return reading.alpha_target


def _limited(reading: Reading, state: PolicyState) -> bool:
    """The server has our newest command and still aims elsewhere: it knows a limit we do not."""
    return (
        reading.command_generation >= state.generation > 0
        and state.command_alpha == state.command_alpha
        and abs(reading.alpha_target - state.command_alpha) > 1.5 / reading.extents
    )


def _scale(value: float) -> float:
    return min(max(value, 0.0), MAX_SLEW_SCALE) if value == value else 1.0


def _remember(
    reading: Reading,
    state: PolicyState,
    estimate: Estimate,
    gate: tuple[float, ...],
    observed: tuple[float, ...],
) -> PolicyState:
    return state._replace(
        tick=state.tick + 1,
        now_ns=reading.now_ns,
        emb_accesses=reading.emb_accesses,
        goal=state.target,
        anchor=estimate.anchor,
        curve_alpha=estimate.curve_alpha,
        curve_cost_ms=estimate.curve_cost_ms,
        curve_requests=estimate.curve_requests,
        gate=gate,
        observed=observed,
        waits=0,
    )


def _decision(
    reading: Reading,
    state: PolicyState,
    estimate: Estimate,
    apply: bool,
    reasons: int,
    gating: Gating,
) -> Decision:
    return Decision(
        apply,
        state.target,
        state.command_refill,
        state.generation,
        False,
        reasons,
        state.tick,
        state.mode,
        reading.alpha,
        estimate.anchor,
        estimate.gain,
        estimate.trust,
        state,
        gating,
    )


def _command(
    reading: Reading,
    state: PolicyState,
    estimate: Estimate,
    steered: Steered,
    refill: float,
    bounds: tuple[float, float],
    reasons: int,
    memories: tuple[tuple[float, ...], tuple[float, ...], int],
    layers: tuple[Gating, Correction, float],
) -> Decision:
    """The command in whole extents: a ramp finer than one changes nothing and says nothing new."""
    low, high = bounds
    extents = reading.extents
    alpha = round(steered.target * extents) / extents
    if not low <= alpha <= high:
        alpha = low if alpha < low else high
    generation = state.generation
    apply = state.mode != _RECOMMEND
    drop_only = reasons & _DROPPING != 0
    if apply and (alpha != state.command_alpha or refill != state.command_refill or drop_only):
        generation = max(generation, reading.command_generation) + 1
    remembered = _new(
        PolicyState,
        (
            state.boot_epoch,
            state.tick + 1,
            reading.now_ns,
            state.mode,
            generation,
            alpha if apply else state.command_alpha,
            refill if apply else state.command_refill,
            steered.target,
            steered.goal,
            steered.move_size,
            steered.move_ns,
            steered.move_accesses,
            steered.move_requests,
            reading.emb_accesses,
            estimate.anchor,
            estimate.curve_alpha,
            estimate.curve_cost_ms,
            estimate.curve_requests,
            *memories,
        ),
    )
    return _new(
        Decision,
        (
            apply,
            alpha,
            refill,
            generation,
            drop_only,
            reasons,
            remembered.tick,
            state.mode,
            reading.alpha,
            estimate.anchor,
            estimate.gain,
            estimate.trust,
            remembered,
            *layers,
        ),
    )


_DEFAULT: Final = Policy()


def decide(reading: Reading, state: PolicyState, policy: Policy = _DEFAULT) -> Decision:
    """What to do now. Pure and replayable: the new state is inside the decision."""
    return policy.decide(reading, state)


def is_hold(decision: Decision) -> bool:
    """Nothing was decided: a fault, a restart or mode hold."""
    return bool(decision.reasons & HOLDS)
