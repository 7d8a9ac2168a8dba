"""From a wished α to a command: every arm goes through the product's own shield.

So arms differ in where they want α, not in what a move costs: bounds, speed, part of the way,
dwell, holds on stale or impossible telemetry and the refill budget are the shield's, with
parameters of each arm's own.
"""

from __future__ import annotations

from hbm_policy.config import ShieldConfig
from hbm_policy.reading import HOLDS, PolicyState, Reading
from hbm_policy.shield import Shield, Wish
from hbm_sim.loop import Action


class Steering:
    """Remembers the move under way. One per run."""

    def __init__(self, config: ShieldConfig, *, free: bool = False) -> None:
        """`free`: a wish is followed at once and all the way; only bounds and speed count."""
        self._shield = Shield(config)
        self._state = PolicyState()
        self._free = free

    @property
    def moving(self) -> bool:
        """A move has not reached its goal yet."""
        state = self._state
        return abs(state.goal - state.target) > 1e-9

    def action(self, reading: Reading, wanted: float | None) -> Action:
        """The next command towards `wanted`; None: no wish, a move under way goes on."""
        state = self._state
        faults = self._shield.faults(reading, state)
        if faults:
            held = state.target if state.boot_epoch else reading.alpha
            self._state = state._replace(now_ns=reading.now_ns, goal=state.target)
            return Action(held, 0.0, reasons=faults & HOLDS)
        if state.boot_epoch != reading.boot_epoch:
            here = reading.alpha_target
            state = PolicyState(
                boot_epoch=reading.boot_epoch,
                now_ns=reading.now_ns,
                target=here,
                goal=here,
                move_ns=reading.now_ns,
                move_accesses=reading.emb_accesses,
                move_requests=reading.requests,
                emb_accesses=reading.emb_accesses,
            )
        wish = None
        if wanted is not None:
            # No arm but the twin's knows what a move would save: the dead band by gain is open.
            wish = Wish(wanted, gain=1.0, gain_ms=float("inf"), slew_scale=1.0, free=self._free)
        bounds = self._shield.bounds(reading)
        steered = self._shield.steer(reading, state, bounds, wish)
        self._state = state._replace(
            now_ns=reading.now_ns,
            target=steered.target,
            goal=steered.goal,
            move_size=steered.move_size,
            move_ns=steered.move_ns,
            move_accesses=steered.move_accesses,
            move_requests=steered.move_requests,
            emb_accesses=reading.emb_accesses,
        )
        alpha = round(steered.target * reading.extents) / reading.extents
        alpha = min(max(alpha, bounds[0]), bounds[1])
        refill = self._shield.refill_bytes_per_s(reading, steered.target)
        return Action(alpha, refill, reasons=steered.reasons)
