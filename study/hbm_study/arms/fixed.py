"""Arms that look at nothing but the clock: statics, and the oracle that was told the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_sim.loop import Action, Observation
from hbm_sim.node_spec import NodeSpec
from hbm_sim.stream import Stream

from hbm_study.arms.config import OracleArm, StaticArm
from hbm_study.arms.steering import Steering


class Known(NamedTuple):
    """What only an oracle knows of a stream."""

    stream: Stream
    by_mean: dict[str, float]
    """Each regime's α* by mean service time."""
    by_tail: dict[str, float]
    """Each regime's α* by P99."""
    best_static: float
    """The best static α in hindsight, by pooled P99."""
    lowest: float
    """The node's lower bound of α."""


def held_alpha(config: StaticArm, known: Callable[[], Known]) -> float:
    """The α that a static arm holds; `known` is asked only by one that was profiled."""
    match config.chosen:
        case "given":
            return config.alpha
        case "all-kv":
            return known().lowest
        case "profiled":
            stream = known().stream
            first = stream.regimes[int(stream.regime[stream.warm_up])]
            return known().by_mean[first]


class Static:
    """α never moves; the run begins at it."""

    def __init__(self, name: str, config: StaticArm, alpha: float) -> None:
        self.name = name
        self._steering = Steering(config.moves, free=True)
        self._alpha = alpha

    def start(self, spec: NodeSpec, seed: int) -> None:
        """Nothing to prepare."""

    def act(self, observation: Observation) -> Action:
        """The same each time."""
        return self._steering.action(observation.reading, self._alpha)


class PaidOracle:
    """Goes where the regime that just began is best, as fast and as far as its file says.

    `fraction` shrinks the way from the best static α: with 0.5 it moves between points half-way.
    """

    def __init__(self, name: str, config: OracleArm, known: Known) -> None:
        self.name = name
        self._steering = Steering(config.moves, free=True)
        self._wanted = oracle_alpha(config, known)
        self._arrival_s = known.stream.arrival_s
        self._drop_only = config.drop_only

    def start(self, spec: NodeSpec, seed: int) -> None:
        """Nothing to prepare."""

    def act(self, observation: Observation) -> Action:
        """α of the regime of the next request to arrive."""
        newest = int(np.searchsorted(self._arrival_s, observation.time_s))
        wanted = self._wanted[min(newest, len(self._wanted) - 1)]
        action = self._steering.action(observation.reading, float(wanted))
        return action._replace(drop_only=self._drop_only)


def oracle_alpha(config: OracleArm, known: Known) -> npt.NDArray[np.float64]:
    """Where an oracle wants α to be at each request of the stream, `[n]`."""
    stream = known.stream
    best = known.by_mean if config.criterion == "mean" else known.by_tail
    home = known.best_static
    goals = [home + config.fraction * (best.get(regime, home) - home) for regime in stream.regimes]
    return np.array(goals)[stream.regime]
