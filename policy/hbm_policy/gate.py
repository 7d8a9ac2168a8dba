"""Layer 3, the burst gate: two-sided CUSUM on two signals that our own action cannot move.

* The *cost of a fixed virtual α*: the middle candidate of the twin's curve. The twin's pair at that
  α sees the whole traffic whatever α the server runs at.
* The *arrival rate*: requests served, refused and failed, and the change of the queue. What α does
  to the service time shows in the queue, not in what comes in.

Each sample is compared with what was normal of late: z = (x - mean) / sd, and evidence adds up as
g = max(0, g + z - k) on either side (Page 1954). Above h the gate opens. Mean and deviation are
learned on the way and frozen while g > h/2, so that a change is not learned as normal before it is
noticed. Traffic is correlated in time, which costs a detector one to two orders of magnitude in
false alarms against independent samples: the deviation of a sum of samples grows with their
correlation r by sqrt((1 + r) / (1 - r)), so r is learned too and z divided by that.

NORMAL -> BURST (newest curve alone, faster moves, a bounded number of ticks) -> RECOVERING (until
the link has refilled what moved: no faster than that, and no way back) -> NORMAL. After an opening
the gate stays shut for a refractory time.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Final

from hbm_policy.config import GateConfig
from hbm_policy.reading import CURVE_WINDOW_REQUESTS, Gating, Reading


class Phase(IntEnum):
    """Where the gate is."""

    NORMAL = 0
    BURST = 1
    RECOVERING = 2


LEARN_SAMPLES: Final = 16.0
"""Samples before anything can be evidence: mean and deviation must be known."""
RELEARN_SAMPLES: Final = 4.0
"""After an alarm the mean is learned anew from one sample that counts for so many."""
MAX_Z: Final = 4.0
"""A single sample is no more evidence than this, so one outlier opens nothing."""
COST_SD_MIN: Final = 0.02
"""Least deviation of the logarithm of the cost: smaller changes are no burst."""
COUNT_SD: Final = 0.5
"""Deviation of the square root of a Poisson count, whatever its mean (Anscombe 1948)."""
MAX_CORRELATION: Final = 0.6
"""Of one sample with the next, as far as it is taken into account: z is halved then. With more of
it nothing but a change of several times would count."""
_ANSCOMBE: Final = 0.375
# A signal in memory: newest sample, samples behind the mean (below 0: how many are missing before
# one is evidence), mean, variance, correlation with the sample before, that in standard
# deviations, evidence up, evidence down.
_UNKNOWN: Final = (0.0, -LEARN_SAMPLES, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
_UP: Final = 6
_DOWN: Final = 7
_HEAD: Final = 10
_RATE_AT: Final = _HEAD + len(_UNKNOWN)
_NORMAL: Final = float(Phase.NORMAL)
_BURST: Final = float(Phase.BURST)
_RECOVERING: Final = float(Phase.RECOVERING)
_OPEN: Final = int(Phase.BURST)

_new: Final = tuple.__new__


class BurstGate:
    """A `Gate`. Holds no state: `Gating.memory` is it."""

    def __init__(self, config: GateConfig, min_warm: float = 0.8) -> None:
        """`min_warm`: the cost of a colder twin falls by itself and is not watched."""
        self.config = config
        self._min_warm = min_warm
        self._k = config.gate_drift
        self._h = config.gate_threshold or math.inf
        self._weight = 1.0 / config.gate_baseline_samples

    def step(self, reading: Reading, memory: tuple[float, ...]) -> Gating:
        """One tick. `memory` is () at first and after a restart of the server."""
        if not memory:
            return _first(reading)
        phase, ticks, since, began_at, barred, until_ns, cost_ms, requests, arrived, seen_ns = (
            memory[:_HEAD]
        )
        cost, rate = memory[_HEAD:_RATE_AT], memory[_RATE_AT:]
        h, now_ns = self._h, reading.now_ns
        since += 1.0
        # The cost: the mean of the requests that are new in the curve, which is itself a mean.
        curve = reading.curve
        if (
            curve is not None
            and curve.cost_ms
            and curve.warm >= self._min_warm
            and curve.boot_epoch == reading.boot_epoch
        ):
            new = curve.requests - requests
            if new < 0.0 or requests == 0.0:  # the twin is another one, or was cold so far
                cost_ms, requests = curve.cost_ms[len(curve.cost_ms) // 2], float(curve.requests)
            elif new >= self.config.gate_requests:
                newest_ms = curve.cost_ms[len(curve.cost_ms) // 2]
                fade = math.exp(-new / CURVE_WINDOW_REQUESTS)
                fresh_ms = (newest_ms - fade * cost_ms) / (1.0 - fade)
                cost_ms, requests = newest_ms, float(curve.requests)
                if 0.0 < fresh_ms < math.inf:
                    cost, _ = self._watch(math.log(fresh_ms), COST_SD_MIN, cost)
        # The arrivals: the square root of a rate has the same deviation at any rate.
        elapsed_s = (now_ns - seen_ns) / 1e9
        z = 0.0
        traffic = reading.traffic
        now_arrived = float(
            reading.requests + traffic.errors + traffic.overloads + traffic.queue_depth
        )
        if elapsed_s > 0.0:
            came = now_arrived - arrived
            arrived, seen_ns = now_arrived, float(now_ns)
            if came < 0.0:
                came = 0.0
            rate, z = self._watch(
                math.sqrt((came + _ANSCOMBE) / elapsed_s),
                0.5 * COUNT_SD / math.sqrt(elapsed_s),
                rate,
            )
        else:  # a clock that went back: count from here
            arrived, seen_ns = now_arrived, float(now_ns)
        # The phases.
        config = self.config
        cost_up, cost_down, rate_up, rate_down = cost[_UP], cost[_DOWN], rate[_UP], rate[_DOWN]
        if phase == _NORMAL:
            if (
                cost_up > h or cost_down > h or rate_up > h or rate_down > h
            ) and since > config.gate_refractory_ticks:
                phase, ticks, since, began_at, barred = _BURST, 0.0, 0.0, reading.alpha_target, 0.0
                # The newest sample is what is normal now; how much it scatters is kept.
                if cost_up + cost_up > h or cost_down + cost_down > h:
                    cost, cost_up, cost_down = _renewed(cost), 0.0, 0.0
                if rate_up + rate_up > h or rate_down + rate_down > h:
                    rate, rate_up, rate_down = _renewed(rate), 0.0, 0.0
        elif phase == _BURST:
            ticks += 1.0
            if ticks >= config.gate_burst_ticks:
                moved = reading.alpha_target - began_at
                refill_s = self._refill_s(reading, abs(moved))
                phase = _RECOVERING if refill_s > 0.0 else _NORMAL
                barred = -math.copysign(1.0, moved) if refill_s > 0.0 else 0.0
                until_ns = now_ns + refill_s * 1e9
        elif not now_ns < until_ns <= now_ns + config.gate_recover_ms * 1e6:
            phase, barred = _NORMAL, 0.0
        limit_per_s = math.inf
        if phase == _RECOVERING and reading.pool_bytes > 0 and reading.refill_bytes_per_s > 0.0:
            limit_per_s = reading.refill_bytes_per_s / reading.pool_bytes
        is_open = phase == _BURST
        return _new(
            Gating,
            (
                is_open,
                config.gate_slew if is_open else 1.0,
                (
                    phase,
                    ticks,
                    since,
                    began_at,
                    barred,
                    until_ns,
                    cost_ms,
                    requests,
                    arrived,
                    seen_ns,
                    *cost,
                    *rate,
                ),
                limit_per_s,
                barred,
                int(phase),
                (cost_up if cost_up >= cost_down else -cost_down) / h,
                (rate_up if rate_up >= rate_down else -rate_down) / h,
                z,
                since,
            ),
        )

    def _watch(
        self, x: float, sd_min: float, signal: tuple[float, ...]
    ) -> tuple[tuple[float, ...], float]:
        """One sample of a signal: what is remembered of it then, and z."""
        _, count, mean, var, together, last, up, down = signal
        off = x - mean
        if count < 0.0:  # so many samples are missing before one is evidence
            count += 1.0
            seen = LEARN_SAMPLES + count
            mean += off / seen
            var += (off * (x - mean) - var) / seen
            return (x, count or LEARN_SAMPLES, mean, var, 0.0, 0.0, 0.0, 0.0), 0.0
        sd = math.sqrt(var)
        if sd < sd_min:
            sd = sd_min
        # Sums of correlated samples scatter more, by this factor for an AR(1) process.
        spread = math.sqrt((1.0 + together) / (1.0 - together))
        z = off / (sd * spread)
        if not -MAX_Z <= z <= MAX_Z:
            z = MAX_Z if z > MAX_Z else -MAX_Z
            off = z * sd * spread
        plain = z * spread
        k, h = self._k, self._h
        up += z - k
        down -= z + k
        # Evidence beyond the threshold adds nothing, or it would outlive what it is about.
        up = 0.0 if up < 0.0 else up if up <= h + k else h + k
        down = 0.0 if down < 0.0 else down if down <= h + k else h + k
        if up + up <= h and down + down <= h:
            count += 1.0
            weight = 1.0 / count
            if weight < self._weight:
                weight = self._weight
            mean += weight * off
            # The deviation is not learned faster than in the long run.
            var += self._weight * ((1.0 - weight) * off * off - var)
            together += self._weight * (plain * last - together)
            together = 0.0 if together < 0.0 else min(together, MAX_CORRELATION)
        return (x, count, mean, var, together, plain, up, down), z

    def _refill_s(self, reading: Reading, moved: float) -> float:
        """How long the link needs for what moved, s; 0 where there is nothing to wait for."""
        rate = reading.refill_bytes_per_s
        if moved * reading.extents < 1.0 or rate <= 0.0 or reading.pool_bytes <= 0:
            return 0.0
        return min(moved * reading.pool_bytes / rate, self.config.gate_recover_ms / 1e3)


def _first(reading: Reading) -> Gating:
    """Nothing is known; the refractory time is over."""
    traffic = reading.traffic
    arrived = reading.requests + traffic.errors + traffic.overloads + traffic.queue_depth
    head = (_NORMAL, 0.0, math.inf, 0.0, 0.0, 0.0, 0.0, 0.0, float(arrived), float(reading.now_ns))
    return Gating(open=False, slew_scale=1.0, memory=(*head, *_UNKNOWN, *_UNKNOWN))


def _renewed(signal: tuple[float, ...]) -> tuple[float, ...]:
    """After an alarm: the newest sample is the mean."""
    x, _, _, var, together, last, _, _ = signal
    return (x, RELEARN_SAMPLES, x, var, together, last, 0.0, 0.0)
