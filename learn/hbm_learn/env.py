"""Environments of the residual: the simulator's closed loop, stepped from outside.

One step is `period_ticks` ticks of the loop under one action. The loop cannot be stepped, so it
runs in a thread of its own that stands still while the learner thinks, and the other way round: no
two of them ever run at once, and equal actions give equal episodes. Episodes end by truncation: the
stream is over, the traffic would not be, so a learner bootstraps from the last observation.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from hbm_policy.layers import Action

from hbm_learn.episode import Episode, Library
from hbm_learn.pupil import (
    Features,
    Pupil,
    action_space,
    observation_space,
    run_pupil,
    steps_without,
    to_action,
    to_features,
)
from hbm_learn.reward import RewardConfig, Step


class EpisodeEnv(gymnasium.Env[Features, Features], ABC):  # type: ignore[misc]
    """What both environments share: which episode is next, and what a step of it is worth."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as gymnasium declares it

    def __init__(
        self, library: Library, seeds: Sequence[int], reward: RewardConfig, period_ticks: int
    ) -> None:
        """`seeds`: of the episodes that are drawn from; `period_ticks`: ticks under one action."""
        self.observation_space = observation_space()
        self.action_space = action_space()
        self.library = library
        self.seeds = tuple(seeds)
        self.period_ticks = period_ticks
        self._reward = reward
        self._without: dict[int, list[float]] = {}
        self._episode: Episode | None = None
        self._steps = 0
        self._observed = np.zeros(self.observation_space.shape or (), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Features, dict[str, Any]]:
        """The first decision behind the warm-up of an episode: `options["episode"]`, or any.

        The info says by which seed it was `drawn`.
        """
        super().reset(seed=seed)
        chosen = (options or {}).get("episode")
        if chosen is None:
            chosen = self.np_random.choice(self.seeds)
        self._episode = self.library.episode(int(chosen))
        self._steps = 0
        self._observed = to_features(self._begin(self._episode))
        return self._observed, {"drawn": int(chosen)}

    def step(self, action: Features) -> tuple[Features, float, bool, bool, dict[str, Any]]:
        """One period under `action`."""
        if self._episode is None:
            raise RuntimeError("step() before reset(): no episode has begun")
        observed, happened = self._go(to_action(action))
        reward = self._worth(happened)
        self._steps += 1
        info = {"drawn": self._episode.seed, "happened": happened}
        if observed is None:
            self._episode = None
            return self._observed, reward, False, True, info
        self._observed = to_features(observed)
        return self._observed, reward, False, False, info

    def share(self, other: EpisodeEnv) -> None:
        """Both keep what they learn about episodes in one place."""
        self._without = other._without

    def _worth(self, happened: Step) -> float:
        worth = happened.reward(self._reward)
        if not self._reward.paired:
            return worth
        assert self._episode is not None
        without = self._without.get(self._episode.seed)
        if without is None:
            without = [step.reward(self._reward) for step in self._steps_without(self._episode)]
            self._without[self._episode.seed] = without
        return worth - without[self._steps] if self._steps < len(without) else 0.0

    @abstractmethod
    def _begin(self, episode: Episode) -> tuple[float, ...]:
        """Starts an episode. -> what is observed at its first decision."""

    @abstractmethod
    def _go(self, action: Action) -> tuple[tuple[float, ...] | None, Step]:
        """One period. -> what is observed then (None: the stream is over), what happened."""

    @abstractmethod
    def _steps_without(self, episode: Episode) -> list[Step]:
        """Every step of the episode without the residual."""


class _Question(NamedTuple):
    observed: tuple[float, ...] | None  # None: the loop has ended
    happened: Step
    error: BaseException | None = None


class _Left(Exception):
    """The learner has begun another episode."""


class SimulatorEnv(EpisodeEnv):
    """The request-level simulator: real transients, the real policy at each tick."""

    def __init__(
        self, library: Library, seeds: Sequence[int], reward: RewardConfig, period_ticks: int
    ) -> None:
        super().__init__(library, seeds, reward, period_ticks)
        self._loop: threading.Thread | None = None
        self._questions: SimpleQueue[_Question] = SimpleQueue()
        self._answers: SimpleQueue[Action | None] = SimpleQueue()

    def close(self) -> None:
        """Ends the loop of the present episode."""
        if self._loop is not None:
            self._answers.put(None)
            self._loop.join()
            self._loop = None
        super().close()

    def _begin(self, episode: Episode) -> tuple[float, ...]:
        self.close()
        self._questions, self._answers = SimpleQueue(), SimpleQueue()
        self._loop = threading.Thread(target=self._run, args=(episode,), daemon=True)
        self._loop.start()
        observed, _ = self._listen()
        if observed is None:
            raise RuntimeError(
                f"episode {episode.seed} ends before its first decision: give it more requests"
            )
        return observed

    def _go(self, action: Action) -> tuple[tuple[float, ...] | None, Step]:
        self._answers.put(action)
        return self._listen()

    def _steps_without(self, episode: Episode) -> list[Step]:
        return steps_without(episode, self.period_ticks)

    def _listen(self) -> tuple[tuple[float, ...] | None, Step]:
        question = self._questions.get()
        if question.observed is None:
            assert self._loop is not None
            self._loop.join()
            self._loop = None
        if question.error is not None:
            raise question.error
        return question.observed, question.happened

    def _run(self, episode: Episode) -> None:
        questions, answers = self._questions, self._answers

        def ask(observed: tuple[float, ...], happened: Step) -> Action:
            questions.put(_Question(observed, happened))
            answer = answers.get()
            if answer is None:
                raise _Left
            return answer

        pupil = Pupil(episode, ask, self.period_ticks)
        try:
            run_pupil(episode, pupil)
            questions.put(_Question(None, pupil.take_step()))
        except _Left:
            pass
        except BaseException as error:
            questions.put(_Question(None, Step(), error))
