"""The last layer: no wish of the layers below reaches the server but through here.

`faults` says what makes the reading unusable (hold), `bounds` what α may be, `steer` turns a wish
into the next target: a move goes part of the way, at a limited speed, and not before the last one
has paid off. Whatever the inputs, a target is finite and within the bounds, or α is held.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from hbm_pool.contracts.records import Mode

from hbm_policy.config import ShieldConfig
from hbm_policy.reading import PolicyState, Reading, Reason

_NS_PER_MS: Final = 1_000_000
_EPSILON: Final = 1e-9
_MAX_STEP_S: Final = 1.0
"""A tick that comes late does not make the ramp jump."""
_FIXED: Final = int(Mode.FIXED)
_MODES: Final = frozenset(int(mode) for mode in Mode)
_NO_TELEMETRY: Final = int(Reason.NO_TELEMETRY)
_STALE: Final = int(Reason.TELEMETRY_STALE)
_INVALID: Final = int(Reason.TELEMETRY_INVALID)
_CLOCK: Final = int(Reason.CLOCK_BACKWARDS)
_EPOCH: Final = int(Reason.EPOCH_MISMATCH)
_INTENT_MISSING: Final = int(Reason.INTENT_MISSING)
_INTENT_INVALID: Final = int(Reason.INTENT_INVALID)
_DRAINING: Final = int(Reason.DRAINING)
_SMALL_GAIN: Final = int(Reason.SMALL_GAIN)
_SMALL_CHANGE: Final = int(Reason.SMALL_CHANGE)
_DWELL: Final = int(Reason.DWELL)
_STARTED: Final = int(Reason.MOVE_STARTED)
_RAMPING: Final = int(Reason.RAMPING)
_FINISHED: Final = int(Reason.MOVE_FINISHED)
_STOPPED: Final = int(Reason.MOVE_STOPPED)
_BOUNDED: Final = int(Reason.BOUNDED)
_SERVER_MOVING: Final = int(Reason.SERVER_MOVING)
_BARRED: Final = int(Reason.GATE_BARRED)
_WAITS: Final = int(Reason.RESIDUAL_WAITS)


_new: Final = tuple.__new__
"""Makes a NamedTuple from its fields in order, in half the time of its own constructor."""


class Wish(NamedTuple):
    """Where the layers below want α."""

    alpha: float
    gain: float  # predicted saving, share of the cost
    gain_ms: float
    slew_scale: float
    free: bool  # not a guess (fixed α, bounds): no dead band, dwell or fraction
    fraction_scale: float = 1.0
    wait: bool = False  # no move starts now
    barred: float = 0.0  # no move starts in this direction
    slew_limit_per_s: float = math.inf


class Steered(NamedTuple):
    """Where α goes next."""

    target: float
    goal: float
    move_size: float
    move_ns: int
    move_accesses: int
    move_requests: int
    reasons: int


class Shield:
    """Bounds, speed, dwell, dead band; NaN and staleness hold."""

    def __init__(self, config: ShieldConfig) -> None:
        self.config = config
        self._stale_ns = int(config.stale_ms * _NS_PER_MS)
        self._slack_ns = int(config.clock_slack_ms * _NS_PER_MS)
        self._dwell_ns = int(config.dwell_ms * _NS_PER_MS)

    def faults(self, reading: Reading, state: PolicyState) -> int:
        """Reasons why nothing can be decided from this reading; 0 when it is sound."""
        # Taken apart once: a field by its name costs a tenth of that each time.
        (
            now_ns,
            boot_epoch,
            telemetry_ns,
            telemetry_epoch,
            alpha,
            alpha_target,
            command_generation,
            _,
            draining,
            _,
            emb_accesses,
            emb_slots,
            _,
            _,
            extents,
            server_alpha_min,
            server_alpha_max,
            mode,
            alpha_min,
            alpha_max,
            alpha_fixed,
            refill_bytes_per_s,
            _,
            _,
            _,
            _,
            _,
        ) = reading
        if boot_epoch == 0 or telemetry_ns <= 0:
            return _NO_TELEMETRY
        if telemetry_epoch != boot_epoch:
            return _EPOCH
        age_ns = now_ns - telemetry_ns
        if age_ns > self._stale_ns:
            return _STALE
        if age_ns < -self._slack_ns or now_ns < state.now_ns:
            return _CLOCK
        if not (
            0.0 <= alpha <= 1.0
            and 0.0 <= alpha_target <= 1.0
            and 0.0 <= server_alpha_min <= server_alpha_max <= 1.0
            and extents > 0
            and emb_slots >= 0
            and command_generation >= 0
            and emb_accesses >= (state.emb_accesses if state.boot_epoch == boot_epoch else 0)
        ):
            return _INVALID
        if mode is None:
            return _INTENT_MISSING
        if mode not in _MODES or not (
            0.0 <= alpha_min <= alpha_max <= 1.0 and 0.0 <= refill_bytes_per_s < math.inf
        ):
            return _INTENT_INVALID
        if mode == _FIXED and not 0.0 <= alpha_fixed <= 1.0:
            return _INTENT_INVALID
        return _DRAINING if draining else 0

    def bounds(self, reading: Reading) -> tuple[float, float]:
        """α allowed by both sides. Where they do not overlap, the server's side wins."""
        low, high = reading.alpha_min, reading.alpha_max
        if low < reading.server_alpha_min:
            low = reading.server_alpha_min
        if high > reading.server_alpha_max:
            high = reading.server_alpha_max
        if low <= high:
            return low, high
        edge = low if low <= reading.server_alpha_max else high
        edge = min(max(edge, reading.server_alpha_min), reading.server_alpha_max)
        return edge, edge

    def steer(
        self,
        reading: Reading,
        state: PolicyState,
        bounds: tuple[float, float],
        wish: Wish | None,
    ) -> Steered:
        """The next target. `state.target` and `state.goal` are finite; None: no wish."""
        low, high = bounds
        target, goal = state.target, state.goal
        size, reasons = state.move_size, 0
        if not low <= target <= high:
            wish = Wish(min(max(target, low), high), 0.0, 0.0, 1.0, free=True)
            reasons = _BOUNDED
        if not low <= goal <= high:
            goal = min(max(goal, low), high)
            reasons |= _BOUNDED
        if wish is not None:
            wanted = wish.alpha
            if not low <= wanted <= high:
                wanted = min(max(wanted, low), high) if wanted == wanted else target
                reasons |= _BOUNDED
            ahead = goal - target
            if wish.free:
                if not -_EPSILON <= wanted - goal <= _EPSILON:
                    reasons |= _STARTED
                goal, size = wanted, abs(wanted - reading.alpha)
            elif ahead > _EPSILON or ahead < -_EPSILON:
                if (wanted - target) * ahead <= 0.0:
                    goal = target
                    reasons |= _STOPPED
            else:
                start = self._may_start(reading, state, wish, wanted)
                reasons |= start
                if start == _STARTED:
                    fraction = self.config.move_fraction * wish.fraction_scale
                    step = (wanted - target) * (fraction if fraction < 1.0 else 1.0)
                    goal, size = target + step, abs(step)
        ahead = goal - target
        if -_EPSILON <= ahead <= _EPSILON:
            return _new(
                Steered,
                (
                    target,
                    target,
                    size,
                    state.move_ns,
                    state.move_accesses,
                    state.move_requests,
                    reasons,
                ),
            )
        elapsed_s = (reading.now_ns - state.now_ns) / 1e9
        if not 0.0 <= elapsed_s <= _MAX_STEP_S:
            elapsed_s = 0.0 if elapsed_s < 0.0 else _MAX_STEP_S
        speed_per_s = self.config.slew_per_s
        if wish is not None:
            speed_per_s *= wish.slew_scale
            if speed_per_s > wish.slew_limit_per_s:
                speed_per_s = wish.slew_limit_per_s
        reach = speed_per_s * elapsed_s
        if -reach - _EPSILON <= ahead <= reach + _EPSILON:
            target = goal
            reasons |= _FINISHED
        else:
            target += reach if ahead > 0.0 else -reach
            reasons |= _RAMPING
        # From outside the bounds the ramp does not count: whatever is commanded is allowed.
        if not low <= target <= high:
            target = low if target < low else high
        return _new(
            Steered,
            (
                target,
                goal,
                size,
                reading.now_ns,
                reading.emb_accesses,
                reading.requests,
                reasons,
            ),
        )

    def _may_start(self, reading: Reading, state: PolicyState, wish: Wish, wanted: float) -> int:
        config = self.config
        distance = abs(wanted - state.target)
        if distance < config.min_change or distance <= _EPSILON:
            return _SMALL_CHANGE
        if wish.gain < config.min_gain or wish.gain_ms < config.min_gain_ms or wish.gain <= 0.0:
            return _SMALL_GAIN
        if reading.moving:
            return _SERVER_MOVING
        if (wanted - state.target) * wish.barred > 0.0:
            return _BARRED
        stretch = 1.0 + state.move_size / config.dwell_double_change
        accesses = reading.emb_accesses - state.move_accesses
        settled = accesses >= config.dwell_accesses_per_slot * reading.emb_slots * stretch
        if (
            not settled and reading.requests - state.move_requests < config.dwell_requests * stretch
        ) or reading.now_ns - state.move_ns < self._dwell_ns:
            return _DWELL
        return _WAITS if wish.wait else _STARTED

    def drops(self, reading: Reading, target: float, cost_ms: float) -> bool:
        """Whether EMB drops what it holds beyond the target. `cost_ms`: of a request at the α of
        now, NaN when unknown.

        Relocating waits for idle time. A server that is behind has none, so the move that would
        help it would take minutes; what is dropped is fetched again row by row.
        """
        limit_ms = self.config.drop_wait_slo * reading.slo_ms
        return (
            0.0 < limit_ms < reading.traffic.queue_depth * cost_ms
            and target < reading.alpha - 1.0 / reading.extents
        )

    def refill_bytes_per_s(self, reading: Reading, target: float) -> float:
        """Budget of the background copy: the idle share of the link, in sixteenths of the budget.

        Nothing while EMB gives extents up: what is copied would be dropped.
        """
        budget = reading.refill_bytes_per_s
        if budget <= 0.0 or target < reading.alpha - 1.0 / reading.extents:
            return 0.0
        limit = self.config.refill_link_busy
        busy = reading.link_busy
        if limit >= 1.0:
            return budget
        if not busy <= limit:
            return 0.0
        return budget * math.ceil(16.0 * (1.0 - max(busy, 0.0))) / 16.0
