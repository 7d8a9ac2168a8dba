"""The stack with and without the residual on the same episodes: paired differences.

The residual runs as it is deployed: asked at every tick, deterministic, all of its wish taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_policy.layers import Action

from hbm_learn.episode import Episode, Library
from hbm_learn.network import Network
from hbm_learn.pupil import NO_ACTION, Pupil, run_pupil, to_action, to_features
from hbm_learn.reward import RewardConfig, Step

RESAMPLES: Final = 10_000


class Outcome(NamedTuple):
    """One episode behind its warm-up."""

    excess: float
    """Service time over that at the best α, share."""
    late: float
    """Share of requests beyond the latency goal, or refused."""
    moved: float
    """Sum of |dα|."""
    p99_ms: float
    """Pooled, over offered requests."""
    worth: float
    """The reward of the whole episode, taken as one step of mean movement."""


class Interval(NamedTuple):
    """Mean of paired differences and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """The sign of the mean is beyond doubt, as far as these episodes go."""
        return self.low > 0.0 or self.high < 0.0


class Comparison(NamedTuple):
    """With the residual against without it, episode by episode."""

    seeds: tuple[int, ...]
    without: tuple[Outcome, ...]
    given: tuple[Outcome, ...]

    @property
    def worth(self) -> Interval:
        """Difference of `worth`: above 0 the residual is better."""
        return interval([b.worth - a.worth for a, b in self._pairs])

    @property
    def service(self) -> Interval:
        """Relative difference of service time, percent: below 0 the residual is better."""
        return interval([100.0 * ((1 + b.excess) / (1 + a.excess) - 1.0) for a, b in self._pairs])

    @property
    def p99(self) -> Interval:
        """Relative difference of pooled P99, percent: below 0 the residual is better."""
        return interval([100.0 * (b.p99_ms / a.p99_ms - 1.0) for a, b in self._pairs])

    @property
    def late(self) -> Interval:
        """Difference of the share of late requests, percentage points."""
        return interval([100.0 * (b.late - a.late) for a, b in self._pairs])

    @property
    def moved(self) -> Interval:
        """Difference of the sum of |dα|."""
        return interval([b.moved - a.moved for a, b in self._pairs])

    @property
    def _pairs(self) -> list[tuple[Outcome, Outcome]]:
        return list(zip(self.without, self.given, strict=True))


def interval(differences: Sequence[float]) -> Interval:
    """Bootstrap over episodes (percentile method, 10,000 resamples, fixed seed)."""
    values: npt.NDArray[np.float64] = np.asarray(differences, np.float64)
    picks = np.random.default_rng(7).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), (2.5, 97.5))
    return Interval(float(values.mean()), float(low), float(high))


def outcome(
    episode: Episode, reward: RewardConfig, period_ticks: int, network: Network | None
) -> Outcome:
    """One episode, with a residual or without."""

    def ask(observation: tuple[float, ...], step: Step) -> Action:
        steps.append(step)
        if network is None:
            return NO_ACTION
        return to_action(network.act(to_features(observation)[None])[0])

    steps: list[Step] = []
    pupil = Pupil(episode, ask, period_ticks=1)
    run = run_pupil(episode, pupil)
    steps = [*steps[1:], pupil.take_step()]
    total = Step(
        requests=sum(step.requests for step in steps),
        late=sum(step.late for step in steps),
        served_ms=sum(step.served_ms for step in steps),
        best_ms=sum(step.best_ms for step in steps),
        moved=sum(step.moved for step in steps),
    )
    mean = Step(
        total.requests,
        total.late,
        total.served_ms,
        total.best_ms,
        total.moved * period_ticks / max(1, len(steps)),
    )
    latency_ms = run.latency_ms[episode.stream.counted]
    return Outcome(
        total.served_ms / total.best_ms - 1.0,
        total.late / max(1, total.requests),
        total.moved,
        float(np.percentile(np.where(np.isnan(latency_ms), np.inf, latency_ms), 99)),
        mean.reward(reward),
    )


class Validation:
    """Paired comparisons over one set of episodes; what is without the residual is run once."""

    def __init__(
        self, library: Library, seeds: Sequence[int], reward: RewardConfig, period_ticks: int
    ) -> None:
        self.seeds = tuple(seeds)
        self._library = library
        self._reward = reward
        self._period_ticks = period_ticks
        self._without: dict[int, Outcome] = {}

    def compare(
        self, network: Network, progress: Callable[[int], None] | None = None
    ) -> Comparison:
        """All episodes."""
        given = []
        for done, seed in enumerate(self.seeds):
            episode = self._library.episode(seed)
            if seed not in self._without:
                self._without[seed] = self._run(episode, None)
            given.append(self._run(episode, network))
            if progress is not None:
                progress(done + 1)
        return Comparison(
            self.seeds, tuple(self._without[seed] for seed in self.seeds), tuple(given)
        )

    def _run(self, episode: Episode, network: Network | None) -> Outcome:
        return outcome(episode, self._reward, self._period_ticks, network)
