"""The burst gate: false alarms per hour on correlated traffic, and how soon it opens on a change.

The shipped `BurstGate` sees ticks of 250 ms. Arrivals are Poisson counts of a rate that wiggles as
an AR(1) process (`correlation` per tick, `wiggle` its standard deviation as a share); each request
costs lognormal(0, .5) around a mean that wiggles likewise; the curve is the twin's mean over the
last 32 requests. `delay`: ticks from a step of the rate or of the cost to the opening.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_policy import BurstGate, Curve, GateConfig, Reading
from hbm_policy.reading import CURVE_WINDOW_REQUESTS

from hbm_bench.twin import reading_of

TICK_NS = 250_000_000
TICKS_PER_HOUR = 14_400
PER_TICK = 50.0
SETTLE_TICKS = 1_000
PATIENCE_TICKS = 100
REQUEST_SD = 0.5
COST_MS = 5.0


class Noise(NamedTuple):
    """What wiggles."""

    correlation: float
    wiggle: float


NOISES = {
    "independent": Noise(0.0, 0.0),
    "ar_0.95_8%": Noise(0.95, 0.08),
    "ar_0.99_15%": Noise(0.99, 0.15),
}
CONFIGS = {
    "shipped": GateConfig(),
    "h_6": GateConfig(gate_threshold=6.0),
    "k_1.5": GateConfig(gate_drift=1.5),
}
STEPS = (1.25, 1.5, 2.0)


class Traffic:
    """Ticks of a server, and the gate that watches them."""

    def __init__(self, config: GateConfig, noise: Noise, seed: int) -> None:
        self._gate = BurstGate(config)
        self._noise = noise
        self._random = np.random.default_rng(seed)
        self._state: npt.NDArray[np.float64] = np.zeros(2)
        self._memory: tuple[float, ...] = ()
        self._tick = self._requests = 0
        self._cost_ms = COST_MS

    def step(self, rate: float = 1.0, cost: float = 1.0) -> bool:
        """One tick; whether the gate is open."""
        correlation, wiggle = self._noise
        fresh = self._random.standard_normal(2) * math.sqrt(1.0 - correlation**2)
        self._state = correlation * self._state + fresh
        rate_wiggle, cost_wiggle = np.exp(wiggle * self._state).tolist()
        came = int(self._random.poisson(PER_TICK * rate * rate_wiggle))
        keep = math.exp(-1.0 / CURVE_WINDOW_REQUESTS)
        means = self._random.lognormal(-(REQUEST_SD**2) / 2.0, REQUEST_SD, came)
        for each in (COST_MS * cost * cost_wiggle * means).tolist():
            self._cost_ms += (1.0 - keep) * (each - self._cost_ms)
        self._tick += 1
        self._requests += came
        gating = self._gate.step(self._reading(), self._memory)
        self._memory = gating.memory
        return gating.open

    def _reading(self) -> Reading:
        now_ns = self._tick * TICK_NS
        curve = Curve(now_ns, 1, self._requests, 0, 1.0, (0.1, 0.5, 0.9), (self._cost_ms,) * 3)
        return reading_of(curve)


def _alarms(config: GateConfig, noise: Noise, seed: int, ticks: int) -> int:
    traffic, opened, was_open = Traffic(config, noise, seed), 0, False
    for _ in range(ticks):
        is_open = traffic.step()
        opened += is_open and not was_open
        was_open = is_open
    return opened


def _delay(config: GateConfig, noise: Noise, seed: int, **step: float) -> float:
    """Ticks until it opens, infinite when it does not; NaN when it happens to be open before."""
    traffic = Traffic(config, noise, seed)
    is_open = False
    for _ in range(SETTLE_TICKS):
        is_open = traffic.step()
    if is_open:
        return math.nan
    for ticks in range(1, PATIENCE_TICKS + 1):
        if traffic.step(**step):
            return float(ticks)
    return math.inf


def _delays(config: GateConfig, noise: Noise, seeds: range, **step: float) -> dict[str, float]:
    found = np.array([_delay(config, noise, seed, **step) for seed in seeds])
    found = found[~np.isnan(found)]
    noticed = found[np.isfinite(found)]
    return {
        "n": len(found),
        "median_ticks": float(np.median(noticed)) if len(noticed) else math.inf,
        "missed": len(found) - len(noticed),
    }


def run(quick: bool, seed: int) -> dict[str, Any]:
    """Per configuration and kind of traffic: openings per hour, delays of steps."""
    hours, trials = (0.25, 2) if quick else (4.0, 20)
    figures: dict[str, Any] = {"tick_ms": TICK_NS / 1e6, "requests_per_tick": PER_TICK}
    for name, config in CONFIGS.items():
        figures[name] = {}
        for kind, noise in NOISES.items():
            alarms = _alarms(config, noise, seed, int(hours * TICKS_PER_HOUR))
            found: dict[str, Any] = {"openings_per_hour": alarms / hours, "hours": hours}
            for factor in STEPS:
                seeds = range(seed + 1, seed + 1 + trials)
                found[f"rate_x{factor:g}"] = _delays(config, noise, seeds, rate=factor)
                found[f"cost_x{factor:g}"] = _delays(config, noise, seeds, cost=factor)
            figures[name][kind] = found
    return figures
