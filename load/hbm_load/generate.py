"""A scenario and a seed make a trace. Equal inputs make equal traces, on any machine."""

from __future__ import annotations

import math
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from hbm_load.arrivals import arrival_times
from hbm_load.errors import ScenarioError
from hbm_load.histories import DrawnHistories
from hbm_load.popularity import RankedItems, ZipfMandelbrot
from hbm_load.scenario import Arrivals, Regime, Scenario, Step, blend
from hbm_load.trace import Trace, earlier_sum

START_UNIX_S: Final = 1_700_000_000
"""Unix time at which every generated trace begins: a constant, so that traces are repeatable."""
_CATALOGUE_SALT: Final = 11
_SHELF_SALT: Final = 12
_MAX_REQUESTS: Final = 50_000_000


class _Clock(NamedTuple):
    """When requests come and under which parameters."""

    time_s: npt.NDArray[np.float64]
    regime: npt.NDArray[np.int16]
    settled: npt.NDArray[np.bool_]
    levels: list[_Level]


class _Level(NamedTuple):
    """Requests [start, stop) of the trace run under `regime`."""

    start: int
    stop: int
    regime: Regime


def generate(
    scenario: Scenario,
    seed: int,
    *,
    duration_s: float | None = None,
    requests: int | None = None,
    rate_scale: float = 1.0,
) -> Trace:
    """Draws a trace.

    The steps' shares divide `duration_s` (default: the scenario's). With `requests` they divide
    that number of requests instead, and the duration follows from the rates. `rate_scale`
    multiplies every arrival rate.
    """
    if duration_s is not None and requests is not None:
        raise ScenarioError("give a duration or a number of requests, not both")
    duration = scenario.duration_s if duration_s is None else duration_s
    if not (math.isfinite(duration) and duration > 0.0):
        raise ScenarioError(f"duration is {duration} s; it must be above 0")
    if not (math.isfinite(rate_scale) and rate_scale > 0.0):
        raise ScenarioError(f"rate_scale is {rate_scale}; it must be above 0")
    if requests is not None and not len(scenario.walk) <= requests <= _MAX_REQUESTS:
        raise ScenarioError(
            f"{requests} requests were asked for; a walk of {len(scenario.walk)} steps takes "
            f"{len(scenario.walk)} to {_MAX_REQUESTS}"
        )
    random = np.random.default_rng([seed, 1])
    clock = _clock(scenario, duration, requests, rate_scale, random)
    if len(clock.time_s) == 0:
        raise ScenarioError(
            f"scenario {scenario.name}: no request arrives in {duration} s; raise the rate or "
            "the duration"
        )
    cohorts = sorted({regime.users.cohort for regime in scenario.regimes.values()})
    keys = _users(clock.levels, len(clock.time_s), cohorts, np.random.default_rng([seed, 2]))
    return _assemble(scenario, seed, clock, keys)


def _parameters(scenario: Scenario, step: Step, position: float) -> Regime:
    """The regime in force at `position` (0..1) of a step."""
    end = scenario.regimes[step.regime]
    if step.drift_from is None:
        return end
    level = int(min(1.0, position / step.drift_share) * step.drift_levels)
    level = min(level, step.drift_levels - 1)
    return blend(scenario.regimes[step.drift_from], end, level / (step.drift_levels - 1))


def _clock(
    scenario: Scenario,
    duration: float,
    requests: int | None,
    rate_scale: float,
    random: np.random.Generator,
) -> _Clock:
    names = scenario.labels
    total_share = sum(step.share for step in scenario.walk)
    counts = _split(requests, [step.share for step in scenario.walk])
    start, seen = 0.0, 0
    times, labels, settled, levels = [], [], [], []
    for step, count in zip(scenario.walk, counts, strict=True):
        plateaus = _plateaus(scenario, step)
        seconds = duration * step.share / total_share
        if count is not None:
            mean_rate = sum((high - low) * each.arrivals.rate_per_s for low, high, each in plateaus)
            seconds = count / (mean_rate * rate_scale)
        drawn = arrival_times(
            partial(_rate, scenario, step, rate_scale), seconds, random, start, count
        )
        position = np.clip((drawn - start) / seconds, 0.0, np.nextafter(1.0, 0.0))
        for low, high, regime in plateaus:
            first, last = (int(edge) for edge in np.searchsorted(position, [low, high]))
            if last > first:
                levels.append(_Level(seen + first, seen + last, regime))
        times.append(drawn)
        labels.append(np.full(len(drawn), names.index(step.name), dtype=np.int16))
        settled.append(position >= scenario.settle_share)
        start += seconds
        seen += len(drawn)
    return _Clock(np.concatenate(times), np.concatenate(labels), np.concatenate(settled), levels)


def _split(requests: int | None, shares: list[float]) -> list[int] | list[None]:
    """Whole numbers that sum to `requests` and lie next to the shares."""
    if requests is None:
        return [None] * len(shares)
    edges = np.round(np.cumsum([0.0, *shares]) / sum(shares) * requests).astype(int)
    return [int(count) for count in np.diff(edges)]


def _plateaus(scenario: Scenario, step: Step) -> list[tuple[float, float, Regime]]:
    """Stretches (from, to, regime) of a step, in positions 0..1."""
    if step.drift_from is None:
        return [(0.0, 1.0, scenario.regimes[step.regime])]
    lows = [step.drift_share * level / step.drift_levels for level in range(step.drift_levels)]
    highs = [*lows[1:], 1.0]
    return [
        (low, high, _parameters(scenario, step, low + step.drift_share / step.drift_levels / 2))
        for low, high in zip(lows, highs, strict=True)
    ]


def _rate(scenario: Scenario, step: Step, rate_scale: float, position: float) -> Arrivals:
    arrivals = _parameters(scenario, step, position).arrivals
    return arrivals.model_copy(update={"rate_per_s": arrivals.rate_per_s * rate_scale})


def _users(
    levels: list[_Level], count: int, cohorts: list[str], random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Who sends each request: a key per user, `[count] int64`.

    A key holds the cohort in its high bits, then one bit for one-off users, then a number.
    """
    keys = np.empty(count, dtype=np.int64)
    for start, stop, regime in levels:
        users = regime.users
        size = stop - start
        cohort = cohorts.index(users.cohort) << 33
        back = np.floor(
            users.revisit_distance * np.exp(random.standard_normal(size) * users.revisit_sigma)
        )
        distance = np.minimum(back, count).astype(np.int64) + 1
        returns = random.random(size) < users.revisit
        is_hot = random.random(size) < users.hot
        hot = cohort + ZipfMandelbrot(users.hot_users, users.hot_zipf_s).draw(random, size)
        one_off = cohort + (1 << 32) + random.integers(0, users.one_off_users, size)
        fresh = np.where(is_hot, hot, one_off)
        for offset in range(size):
            earlier = start + offset - int(distance[offset])
            keys[start + offset] = (
                keys[earlier] if returns[offset] and earlier >= 0 else fresh[offset]
            )
    return keys


def _assemble(scenario: Scenario, seed: int, clock: _Clock, keys: npt.NDArray[np.int64]) -> Trace:
    count = len(keys)
    random = np.random.default_rng([seed, 3])
    owner, first_request, user = _number_users(keys)
    level_of = np.empty(count, dtype=np.int64)
    churn = np.empty(count)
    for index, (start, stop, regime) in enumerate(clock.levels):
        level_of[start:stop] = index
        churn[start:stop] = regime.items.churn
    churned = np.cumsum(churn).astype(np.int64)
    seen_s = START_UNIX_S + clock.time_s.astype(np.int64)

    first_length = np.empty(len(owner), dtype=np.int64)
    noise = random.standard_normal(len(owner))
    for index, level in enumerate(clock.levels):
        chosen = level_of[first_request] == index
        history = level.regime.history
        length = history.median * np.exp(noise[chosen] * history.sigma)
        first_length[chosen] = np.clip(np.round(length), history.minimum, history.maximum)

    growth = np.concatenate(
        [
            random.poisson(level.regime.history.growth, level.stop - level.start)
            for level in clock.levels
        ]
    )
    population = RankedItems.over(0, scenario.catalogue, _CATALOGUE_SALT)
    added, candidates = [], []
    for start, stop, regime in clock.levels:
        draw = _Lookups(scenario.catalogue, population, regime, random)
        added.append(draw.items(np.repeat(churned[start:stop], growth[start:stop])))
        candidates.append(draw.items(np.repeat(churned[start:stop], regime.candidates)))
    per_request = np.concatenate(
        [np.full(stop - start, regime.candidates) for start, stop, regime in clock.levels]
    )

    # What a user adds lies together, in order of time.
    adder = np.repeat(user, growth)
    order = np.argsort(adder, kind="stable")
    added_offsets = np.searchsorted(adder[order], np.arange(len(owner) + 1))
    first_items = [clock.levels[level].regime.items for level in level_of[first_request]]
    return Trace(
        name=scenario.name,
        seed=seed,
        catalogue=scenario.catalogue,
        labels=scenario.labels,
        time_s=clock.time_s,
        regime=clock.regime,
        settled=clock.settled,
        user=user,
        history_length=first_length[user] + earlier_sum(user, growth),
        query_time=seen_s,
        candidate_offsets=np.concatenate([[0], np.cumsum(per_request)]).astype(np.int64),
        candidates=np.concatenate(candidates),
        histories=DrawnHistories(
            seed=seed,
            catalogue=population,
            keys=owner,
            first_length=first_length,
            first_seen_s=seen_s[first_request],
            zipf_s=np.array([items.zipf_s for items in first_items]),
            zipf_q=np.array([items.zipf_q for items in first_items]),
            churned=churned[first_request],
            added_offsets=added_offsets.astype(np.int64),
            added_items=np.concatenate(added)[order],
            added_timestamps=np.repeat(seen_s, growth)[order],
        ),
        history_limit=max(4096, 2 * _longest(scenario)),
    )


def _longest(scenario: Scenario) -> int:
    """Longest first history, in whole blocks of 1,024 items."""
    longest = max(regime.history.maximum for regime in scenario.regimes.values())
    return -(-longest // 1024) * 1024


def _number_users(
    keys: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(key of each user, its first request, user of each request); users by first appearance."""
    unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    by_time = np.argsort(first, kind="stable")
    rank = np.empty(len(unique), dtype=np.int64)
    rank[by_time] = np.arange(len(unique))
    return unique[by_time], first[by_time].astype(np.int64), rank[inverse]


class _Lookups:
    """Candidates and newly added items under one regime."""

    def __init__(
        self,
        catalogue: int,
        population: RankedItems,
        regime: Regime,
        random: np.random.Generator,
    ) -> None:
        items = regime.items
        self._random = random
        self._population = population
        self._ranks = ZipfMandelbrot(catalogue, items.zipf_s, items.zipf_q)
        self._new_share = items.new_share
        if items.new_share > 0.0:
            first = catalogue - items.new_items
            self._shelf = RankedItems.over(first, items.new_items, _SHELF_SALT)
            self._shelf_ranks = ZipfMandelbrot(items.new_items, items.new_zipf_s)

    def items(self, churned: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """One item per entry of `churned` (rank changes by then), `[n] int64`."""
        count = len(churned)
        drawn = self._population.items(self._ranks.draw(self._random, count), churned)
        if self._new_share > 0.0:
            fresh = self._random.random(count) < self._new_share
            shelf_ranks = self._shelf_ranks.draw(self._random, int(fresh.sum()))
            drawn[fresh] = self._shelf.items(shelf_ranks, 0)
        return drawn
