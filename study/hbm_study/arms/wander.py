"""α on a random walk: how signals are collected that a predictor learns from."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_policy.config import ShieldConfig
from hbm_sim.loop import Action, Observation
from hbm_sim.node_spec import NodeSpec
from hbm_sim.stream import Stream

from hbm_study.arms.signals import Signals
from hbm_study.arms.steering import Steering

HOLD_S: Final = 20.0
"""Mean time between two changes of α: long enough for caches to follow."""


class Look(NamedTuple):
    """Signals, and the newest request then."""

    signals: npt.NDArray[np.float64]
    request: int


class Wander:
    """A predictor must not learn from a node that always was where it should be."""

    def __init__(self, period_s: float) -> None:
        """`period_s`: time between two looks."""
        self.name = "wander"
        self.looks: list[Look] = []
        self._period_s = period_s
        self._due_s = period_s
        self._wanted = 0.5
        self._newest = 0
        free = ShieldConfig(
            slew_per_s=0.1, move_fraction=1.0, min_change=0.0, dwell_accesses_per_slot=0.0
        )
        self._steering = Steering(free, free=True)

    def start(self, spec: NodeSpec, seed: int) -> None:
        """Anywhere within the node's bounds."""
        self._random = np.random.default_rng([seed, 61])
        self._signals = Signals(spec.info.slo_ms, spec.info.max_sequence_tokens)

    def act(self, observation: Observation) -> Action:
        """A look each period, another α now and then."""
        reading = observation.reading
        if observation.time_s >= self._due_s:
            self._due_s = observation.time_s + self._period_s
            self.looks.append(Look(self._signals.look(observation.telemetry), self._newest))
            if self._random.random() < self._period_s / HOLD_S:
                self._wanted = float(self._random.uniform(reading.alpha_min, reading.alpha_max))
        return self._steering.action(reading, self._wanted)

    def served(self, stream: Stream, begin: int, end: int, outcome: Any) -> None:
        """Who asked."""
        self._signals.count_users(stream.user[begin:end])
        self._newest = end - 1
