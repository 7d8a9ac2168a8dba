"""The paper's scheme, as far as it is known (arXiv 2605.04450, as quoted by secondary sources).

Known: seven signals, Δα ∈ {0, ±.02, ±.04, ±.06} each 5 s, α within 0.1 to 0.9; layer 1 a frozen PPO
policy; layer 2 a residual adapter, a small three-layer MLP trained online whose learning rate grows
with the deviation of P99 from its EMA; layer 3 overrides when P99 > EMA + 3 σ and leans to KV when
the hot-user fraction is high. Not known: the adapter's loss and rate, the EMA's constants and what
"high" is. What is assumed for them stands in `PaperArm`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from hbm_sim.loop import Action, Observation
from hbm_sim.node_spec import NodeSpec
from hbm_sim.stream import Stream

from hbm_study.arms.config import PaperArm
from hbm_study.arms.networks import load_weights, mlp
from hbm_study.arms.signals import SIGNAL_NAMES, Signals
from hbm_study.arms.steering import Steering

Floats = npt.NDArray[np.float64]
_HIDDEN = 16
_NOISE = 0.25
"""Exploration of the adapter, in units of its limit."""


class PaperScheme:
    """PPO; with `adapter` and `override` all three layers."""

    def __init__(self, name: str, config: PaperArm) -> None:
        """Raises `ArmError` when the policy has not been trained."""
        self.name = name
        self._config = config
        self._weights = load_weights(config.model)
        self._steering = Steering(config.moves, free=True)
        self._due_s = config.period_s
        self._wanted: float | None = None

    def start(self, spec: NodeSpec, seed: int) -> None:
        """The adapter starts untrained in each run."""
        config = self._config
        self._signals = Signals(spec.info.slo_ms, spec.info.max_sequence_tokens)
        self._tail = _Tail(config.override_memory)
        self._adapter = _Adapter(config.adapter_rate, np.random.default_rng([seed, 51]))

    def act(self, observation: Observation) -> Action:
        """One step of α each period."""
        reading = observation.reading
        if observation.time_s >= self._due_s:
            self._due_s = observation.time_s + self._config.period_s
            step = self._step(self._signals.look(observation.telemetry))
            here = reading.alpha_target if self._wanted is None else self._wanted
            self._wanted = min(max(here + step, reading.alpha_min), reading.alpha_max)
        return self._steering.action(reading, self._wanted)

    def served(self, stream: Stream, begin: int, end: int, outcome: Any) -> None:
        """Who asked."""
        self._signals.count_users(stream.user[begin:end])

    def _step(self, signals: Floats) -> float:
        config = self._config
        tail = float(signals[SIGNAL_NAMES.index("p99")])
        burst = self._tail.is_burst(tail)
        deviation = self._tail.deviation(tail)
        self._tail.add(tail)
        step = config.steps[int(np.argmax(mlp(self._weights, signals)))]
        if config.adapter:
            share = self._adapter.step(np.append(signals, step), tail, deviation)
            step += config.adapter_limit * share
        if config.override and burst:
            hot = float(signals[SIGNAL_NAMES.index("hot_users")])
            lean = -1.0 if hot > config.override_hot_users else 1.0
            step = lean * config.override_step
        return step


class _Tail:
    """EMA and deviation of P99."""

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._mean = math.nan
        self._variance = 0.0

    def is_burst(self, tail: float) -> bool:
        """Above EMA + 3 σ."""
        return self._variance > 0.0 and tail > self._mean + 3.0 * math.sqrt(self._variance)

    def deviation(self, tail: float) -> float:
        """|P99 − EMA| ÷ EMA; 0 at first."""
        return abs(tail / self._mean - 1.0) if self._mean > 0.0 else 0.0

    def add(self, tail: float) -> None:
        if math.isnan(self._mean):
            self._mean = tail
            return
        change = tail - self._mean
        self._mean += self._memory * change
        self._variance = (1.0 - self._memory) * (self._variance + self._memory * change * change)


class _Adapter:
    """8 → 16 → 16 → 1, tanh throughout; REINFORCE with the change of P99 as (negative) reward.

    The paper names neither loss nor optimiser: this is the plainest that needs no model of what
    another step would have brought.
    """

    def __init__(self, rate: float, random: np.random.Generator) -> None:
        sizes = (len(SIGNAL_NAMES) + 1, _HIDDEN, _HIDDEN, 1)
        self._rate = rate
        self._random = random
        self._weights: list[Floats] = [
            random.standard_normal((out, into)) / math.sqrt(into)
            for into, out in pairwise(sizes[:-1])
        ]
        # The last layer is 0: an untrained adapter corrects nothing on average.
        self._weights.append(np.zeros((1, _HIDDEN)))
        self._biases = [np.zeros(size) for size in sizes[1:]]
        self._layers: list[Floats] = []
        self._noise = 0.0
        self._tail = math.nan

    def step(self, inputs: Floats, tail: float, deviation: float) -> float:
        """Learns from what became of the last step, then answers with one in [-1, 1]."""
        if not math.isnan(self._tail) and self._layers:
            self._learn(self._tail - tail, self._rate * (1.0 + deviation))
        self._tail = tail
        self._layers = [inputs]
        for weight, bias in zip(self._weights, self._biases, strict=True):
            self._layers.append(np.tanh(weight @ self._layers[-1] + bias))
        self._noise = _NOISE * float(self._random.standard_normal())
        return min(max(float(self._layers[-1][0]) + self._noise, -1.0), 1.0)

    def _learn(self, reward: float, rate: float) -> None:
        gradient = np.array([reward * self._noise / _NOISE**2])
        for layer in reversed(range(len(self._weights))):
            gradient = gradient * (1.0 - self._layers[layer + 1] ** 2)
            below = self._weights[layer].T @ gradient
            self._weights[layer] += rate * np.outer(gradient, self._layers[layer])
            self._biases[layer] += rate * gradient
            gradient = below
