"""The closed loop with a learner in the place of the residual.

The loop calls the real policy once per tick, and the policy its residual: here that residual asks
somebody else. What is asked sees exactly what the deployed residual is shown, and its answer passes
through the same gate, bounds and shield.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import gymnasium
import numpy as np
import numpy.typing as npt
from hbm_policy.config import PolicyConfig, ResidualConfig
from hbm_policy.decide import Policy
from hbm_policy.layers import ACTION_NAMES, Action
from hbm_policy.observation import OBSERVATION_NAMES
from hbm_policy.reading import PolicyState
from hbm_sim.engine_kernel import Outcome
from hbm_sim.loop import Action as Command
from hbm_sim.loop import Observation, Run, run_node
from hbm_sim.node_spec import NodeSpec
from hbm_sim.stream import Stream

from hbm_learn.episode import TICK_S, Episode
from hbm_learn.reward import Step, step_of

Features = npt.NDArray[np.float32]
Ask = Callable[[tuple[float, ...], Step], Action]
"""(observation, what happened since the last question) -> action until the next one."""
NO_ACTION: Final = Action(0.0, 0.0, 0.0, 0.0)
OBSERVED_LIMIT: Final = 1e3
"""Observations are cut to this, here and in the exported graph."""
TRAINED_STACK: Final = PolicyConfig(residual=ResidualConfig(residual_gain=1.0))
"""What a residual is trained within: the stack as it ships, with all of the residual's wish."""


def observation_space() -> gymnasium.spaces.Box:
    """By `hbm_policy.observation.OBSERVATION_NAMES`."""
    return gymnasium.spaces.Box(
        -OBSERVED_LIMIT, OBSERVED_LIMIT, (len(OBSERVATION_NAMES),), np.float32
    )


def action_space() -> gymnasium.spaces.Box:
    """By `hbm_policy.layers.ACTION_NAMES`."""
    return gymnasium.spaces.Box(-1.0, 1.0, (len(ACTION_NAMES),), np.float32)


def to_features(observed: Sequence[float]) -> Features:
    """An observation as the learner takes it, within the observation space."""
    cut: Features = np.array(observed, np.float32)
    np.minimum(np.maximum(cut, -OBSERVED_LIMIT, out=cut), OBSERVED_LIMIT, out=cut)
    return cut


def to_action(values: npt.ArrayLike) -> Action:
    """What a residual answers, from the learner's four numbers."""
    return Action(*(min(max(value, -1.0), 1.0) for value in np.asarray(values).tolist()))


class Asking:
    """A `Residual` that hands each observation to a function."""

    gain = 1.0

    def __init__(self, act: Callable[[tuple[float, ...]], Action]) -> None:
        self.act = act


class Pupil:
    """An arm of the loop: the stack around a residual that asks, every few ticks."""

    name = "pupil"

    def __init__(
        self, episode: Episode, ask: Ask, period_ticks: int, config: PolicyConfig = TRAINED_STACK
    ) -> None:
        self._policy = Policy(config, residual=Asking(self._answer))
        self._ask = ask
        self._episode = episode
        self._period = period_ticks
        self._state = PolicyState()
        self._action = NO_ACTION
        self._tick = 0
        self._ask_at = 0
        self._begin = self._end = 0
        self._target: float | None = None
        self._moved = 0.0
        self._outcome: Outcome | None = None

    def start(self, spec: NodeSpec, seed: int) -> None:
        """Nothing to prepare."""

    def served(self, stream: Stream, begin: int, end: int, outcome: Outcome) -> None:
        """Requests that have begun since the tick before."""
        self._end, self._outcome = end, outcome

    def act(self, observation: Observation) -> Command:
        """One decision of the real policy."""
        self._tick = observation.tick
        if observation.time_s < self._episode.begins_s:
            # Nobody is asked, and nothing counts, while caches and twin warm up.
            self._ask_at = self._tick + 1
        decision = self._policy.decide(observation.reading, self._state)
        self._state = decision.state
        if self._target is not None:
            self._moved += abs(decision.target - self._target)
        self._target = decision.target
        return Command(
            decision.target,
            decision.refill_bytes_per_s,
            decision.anchor,
            decision.reasons,
            generation=decision.generation,
        )

    def take_step(self) -> Step:
        """What has happened since it was last taken."""
        begin, end, moved = self._begin, self._end, self._moved
        self._begin, self._moved = end, 0.0
        if self._outcome is None or end == begin:
            return Step(moved=moved)
        service, latency = self._outcome.service_ms[begin:end], self._outcome.latency_ms[begin:end]
        return step_of(self._episode, begin, end, service, latency, moved)

    def _answer(self, observation: tuple[float, ...]) -> Action:
        if self._tick >= self._ask_at:
            self._ask_at = self._tick + self._period
            self._action = self._ask(observation, self.take_step())
        return self._action


def run_pupil(episode: Episode, pupil: Pupil) -> Run:
    """The whole episode, warm-up included. Equal answers, equal run."""
    return run_node(
        episode.stream,
        episode.spec,
        pupil,
        episode.seed,
        tick_s=TICK_S,
        curves=episode.track,
        alpha=episode.drawn.start_alpha,
        refill_bytes_per_s=episode.drawn.refill_bytes_per_s,
    )


def steps_without(episode: Episode, period_ticks: int) -> list[Step]:
    """What the stack without the residual does in each step of an episode."""
    steps: list[Step] = []

    def nothing(observation: tuple[float, ...], step: Step) -> Action:
        steps.append(step)
        return NO_ACTION

    pupil = Pupil(episode, nothing, period_ticks)
    run_pupil(episode, pupil)
    # What came before the first question is no step, what came after the last one is.
    return [*steps[1:], pupil.take_step()]
