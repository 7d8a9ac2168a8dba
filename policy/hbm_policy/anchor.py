"""Layer 0: from the twin's curve to the anchor α̂, without learning."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from itertools import pairwise
from typing import Final, NamedTuple

from hbm_policy.config import AnchorConfig
from hbm_policy.reading import Curve, PolicyState, Reading, Reason

_NS_PER_MS: Final = 1_000_000
_EPSILON: Final = 1e-9
_MISSING: Final = int(Reason.CURVES_MISSING)
_STALE: Final = int(Reason.CURVES_STALE)
_INVALID: Final = int(Reason.CURVES_INVALID)
_COLD: Final = int(Reason.TWIN_COLD)
_MOVED: Final = int(Reason.ANCHOR_MOVED)
_KEPT: Final = int(Reason.ANCHOR_KEPT)


_PLATEAU: Final = 1.01
_new: Final = tuple.__new__
"""Makes a NamedTuple from its fields in order, in half the time of its own constructor."""


class Estimate(NamedTuple):
    """Where the best split is, as far as the twin can tell."""

    anchor: float  # NaN while unknown
    gain: float  # predicted saving of the anchor over the applied α, share of the cost
    gain_ms: float
    trust: float  # 0: not to be acted on; 1: fully warm and fresh
    curve_alpha: tuple[float, ...]
    curve_cost_ms: tuple[float, ...]  # smoothed
    curve_requests: int
    reasons: int
    plateau: float = 0.0  # half the width of the interval in which the cost is within 1 %


class _Digest(NamedTuple):
    """What follows from a curve before anybody looks at telemetry, and from what it follows."""

    curve: Curve | None
    past: tuple[float, ...]
    newest_only: bool
    anchor_before: float
    low: float
    high: float
    cost_ms: tuple[float, ...]  # empty: impossible values
    anchor: float
    anchor_ms: float
    plateau: float
    reasons: int


_NOTHING: Final = _Digest(None, (), False, 0.0, 0.0, 0.0, (), math.nan, math.nan, 0.0, _INVALID)


class TwinAnchor:
    """Smooths the twin's curve per simulated request and takes its minimum.

    The minimum is refined by the parabola through it and its neighbours. α̂ only follows when that
    saves more than a relative *and* an absolute dead band (after CacheLib's rebalance strategies):
    on a plateau every candidate is right, and wandering over it costs moves.

    A curve comes between two ticks and is the same for all decisions until the next one: what
    follows from it alone is kept, so that a tick finds done what a rehearsal of it did.
    """

    def __init__(self, config: AnchorConfig) -> None:
        self.config = config
        self._stale_ns = int(config.curve_stale_ms * _NS_PER_MS)
        self._known = _NOTHING

    def estimate(
        self, reading: Reading, state: PolicyState, low: float, high: float, newest_only: bool
    ) -> Estimate:
        """α̂ within [low, high]. `newest_only` drops the smoothed past (an open burst gate)."""
        curve = reading.curve
        if curve is None:
            return _unknown(state, _MISSING)
        monotonic_ns, boot_epoch, requests, _, warm, alpha, _, _, _ = curve
        if boot_epoch != reading.boot_epoch or requests == 0:
            return _unknown(state, _MISSING)
        age_ns = reading.now_ns - monotonic_ns
        if age_ns > self._stale_ns or age_ns < -self._stale_ns:
            return _unknown(state, _STALE)
        known = self._known
        if not (
            known.curve is curve
            and known.past is state.curve_cost_ms
            and known.newest_only is newest_only
            and known.anchor_before == state.anchor
            and known.low == low
            and known.high == high
        ):
            known = self._known = self._digest(curve, state, low, high, newest_only)
        _, _, _, _, _, _, cost_ms, anchor, anchor_ms, plateau, reasons = known
        if not cost_ms:
            return _unknown(state, reasons)
        now_ms = cost_at(alpha, cost_ms, reading.alpha)
        gain_ms = now_ms - anchor_ms
        if gain_ms < 0.0:
            gain_ms = 0.0
        trust = 1.0
        if warm < self.config.min_warm:
            reasons |= _COLD
            trust = 0.0
        return _new(
            Estimate,
            (
                anchor,
                gain_ms / now_ms,
                gain_ms,
                trust,
                alpha,
                cost_ms,
                requests,
                reasons,
                plateau,
            ),
        )

    def _digest(
        self, curve: Curve, state: PolicyState, low: float, high: float, newest_only: bool
    ) -> _Digest:
        _, _, requests, _, warm, alpha, newest_ms, _, _ = curve
        key = (curve, state.curve_cost_ms, newest_only, state.anchor, low, high)
        invalid = _Digest(*key, (), math.nan, math.nan, 0.0, _INVALID)
        if len(alpha) != len(newest_ms) or not (alpha is state.curve_alpha or is_ascending(alpha)):
            return invalid
        cost_ms = self._smooth(curve, state, newest_only)
        lowest_ms = min(cost_ms)
        # A NaN anywhere makes the sum one, and every comparison with it false.
        if not (
            0.0 < lowest_ms <= sum(cost_ms) < math.inf and 0.0 <= warm <= 1.0 <= 1.0 + requests
        ):
            return invalid
        if low <= alpha[0] and alpha[-1] <= high:
            best = parabola_vertex(alpha, cost_ms, cost_ms.index(lowest_ms))
        else:
            best = _minimum_within(alpha, cost_ms, low, high)
        anchor_ms = cost_at(alpha, cost_ms, best)
        config = self.config
        anchor = state.anchor
        reasons = _MOVED
        if low <= anchor <= high:
            kept_ms = cost_at(alpha, cost_ms, anchor)
            saved_ms = kept_ms - anchor_ms
            if saved_ms <= config.keep_gain * kept_ms or saved_ms <= config.keep_gain_ms:
                reasons = _KEPT
                best = anchor
                anchor_ms = kept_ms
        limit_ms = _PLATEAU * lowest_ms
        flat = [where for where, cost in zip(alpha, cost_ms, strict=True) if cost <= limit_ms]
        plateau = (flat[-1] - flat[0]) / 2.0
        return _Digest(*key, cost_ms, best, anchor_ms, plateau, reasons)

    def _smooth(self, curve: Curve, state: PolicyState, newest_only: bool) -> tuple[float, ...]:
        """EWMA in requests, so that neither the tick nor the twin's cadence changes it."""
        old = state.curve_cost_ms
        seen = curve.requests - state.curve_requests
        # Fewer requests than before: the twin started anew.
        if newest_only or seen < 0 or curve.alpha != state.curve_alpha:
            return curve.cost_ms
        if seen == 0:
            return old
        smoothing = self.config.smoothing_requests
        if smoothing <= 0.0:
            return curve.cost_ms
        weight = -math.expm1(-seen / smoothing)
        return tuple(
            [past + weight * (new - past) for past, new in zip(old, curve.cost_ms, strict=True)]
        )


def cost_at(alpha: tuple[float, ...], cost_ms: tuple[float, ...], where: float) -> float:
    """Cost at any α, linear between candidates and constant beyond the outermost."""
    right = bisect_right(alpha, where)
    if right == 0:
        return cost_ms[0]
    if right == len(alpha):
        return cost_ms[-1]
    left = right - 1
    share = (where - alpha[left]) / (alpha[right] - alpha[left])
    return cost_ms[left] + share * (cost_ms[right] - cost_ms[left])


def parabola_vertex(alpha: tuple[float, ...], cost_ms: tuple[float, ...], index: int) -> float:
    """Vertex of the parabola through a minimum and its neighbours, between these neighbours.

    The outermost candidates are their own vertex.
    """
    if index == 0 or index == len(alpha) - 1:
        return alpha[index]
    middle, left, right = alpha[index], alpha[index - 1], alpha[index + 1]
    # Lagrange form; both slopes are towards the minimum, so curvature is never negative.
    down = (cost_ms[index] - cost_ms[index - 1]) / (middle - left)
    up = (cost_ms[index + 1] - cost_ms[index]) / (right - middle)
    bend = up - down
    if bend <= 0.0:
        return middle
    vertex = (left + middle) / 2.0 - down / bend * (right - left) / 2.0
    return min(max(vertex, left), right)


def _minimum_within(
    alpha: tuple[float, ...], cost_ms: tuple[float, ...], low: float, high: float
) -> float:
    first = bisect_left(alpha, low - _EPSILON)
    last = bisect_right(alpha, high + _EPSILON)
    if first >= last:
        # Bounds between two candidates: the cheaper end.
        at_low, at_high = cost_at(alpha, cost_ms, low), cost_at(alpha, cost_ms, high)
        return low if at_low <= at_high else high
    index = cost_ms.index(min(cost_ms[first:last]), first, last)
    return min(max(parabola_vertex(alpha, cost_ms, index), low), high)


def is_ascending(alpha: tuple[float, ...]) -> bool:
    """Candidates are within 0..1, each above the one before, and there is one at least."""
    if not alpha or not all(0.0 <= value <= 1.0 for value in alpha):
        return False
    return all(left < right for left, right in pairwise(alpha))


def _unknown(state: PolicyState, reason: int) -> Estimate:
    """The last anchor is still the best guess, but no move is based on it."""
    return Estimate(
        state.anchor,
        0.0,
        0.0,
        0.0,
        state.curve_alpha,
        state.curve_cost_ms,
        state.curve_requests,
        reason,
    )
