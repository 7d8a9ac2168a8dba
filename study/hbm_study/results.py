"""Finished cells, arranged: which arm had which figure on which seeds of a scene."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from hbm_study.cells import Scene
from hbm_study.statistics import Interval, interval, relative_difference, share_of_gain

Metric = Callable[[Mapping[str, Any]], float]
STATIC: Final = "static-"
PAID: Final = "oracle-paid-"
BEST_STATIC: Final = "best static"
"""The static α with the lowest pooled P99 on average over the seeds, in hindsight."""
BEST_PAID: Final = "paid oracle"
"""The part of the way with the lowest pooled P99 on average over the seeds, in hindsight."""
_FAMILIES: Final = {BEST_STATIC: STATIC, BEST_PAID: PAID}


def p99(result: Mapping[str, Any]) -> float:
    """Pooled P99, ms."""
    return float(result["pooled"]["p99_ms"])


def pooled(name: str) -> Metric:
    """A pooled figure by its name."""
    return lambda result: _number(result["pooled"].get(name))


def whole(name: str) -> Metric:
    """A figure of the whole run by its name."""
    return lambda result: _number(result.get(name))


def of_regime(regime: str, name: str) -> Metric:
    """A figure of one regime; NaN where the run has not reached it or the figure is missing."""

    return lambda result: _number(result["regimes"].get(regime, {}).get(name))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


class Results:
    """Cells by scene without seed, arm and seed."""

    def __init__(self, results: Iterable[Mapping[str, Any]]) -> None:
        self._cells: dict[Scene, dict[str, dict[int, Mapping[str, Any]]]] = {}
        for each in results:
            scene = Scene(**each["scene"])
            arms = self._cells.setdefault(scene.without_seed(), {})
            arms.setdefault(each["arm"], {})[scene.seed] = each
        self._chosen: dict[tuple[Scene, str], str | None] = {}

    @property
    def scenes(self) -> list[Scene]:
        """Without seeds, in order of first appearance."""
        return list(self._cells)

    def arms(self, scene: Scene) -> list[str]:
        """Arms with a finished cell on a scene."""
        return list(self._cells.get(scene.without_seed(), {}))

    def cells(self, scene: Scene, arm: str) -> dict[int, Mapping[str, Any]]:
        """Finished cells by seed; `arm` may be `BEST_STATIC` or `BEST_PAID`."""
        name = self.resolve(scene, arm)
        return self._cells.get(scene.without_seed(), {}).get(name, {}) if name else {}

    def resolve(self, scene: Scene, arm: str) -> str | None:
        """The arm behind a name chosen in hindsight; None where there is none."""
        family = _FAMILIES.get(arm)
        if family is None:
            return arm
        key = (scene.without_seed(), arm)
        if key not in self._chosen:
            self._chosen[key] = self._best(scene, family)
        return self._chosen[key]

    def _best(self, scene: Scene, family: str) -> str | None:
        members = {name: self.cells(scene, name) for name in self.arms(scene)}
        members = {name: cells for name, cells in members.items() if name.startswith(family)}
        if not members:
            return None
        # Compared on the seeds that all of them have, or an unfinished one would win by luck.
        shared = set.intersection(*(set(cells) for cells in members.values()))
        if not shared:
            return None
        return min(members, key=lambda name: sum(p99(members[name][seed]) for seed in shared))

    def seeds(self, scene: Scene, *arms: str) -> list[int]:
        """Seeds that all these arms have finished."""
        columns = [set(self.cells(scene, arm)) for arm in arms]
        return sorted(set.intersection(*columns)) if columns else []

    def column(self, scene: Scene, arm: str, metric: Metric, seeds: Iterable[int]) -> list[float]:
        """One value per seed."""
        cells = self.cells(scene, arm)
        return [metric(cells[seed]) for seed in seeds]

    def mean(self, scene: Scene, arm: str, metric: Metric) -> Interval:
        """Over all finished seeds on which the figure exists."""
        values = self.column(scene, arm, metric, self.seeds(scene, arm))
        return interval([value for value in values if not math.isnan(value)])

    def against(self, scene: Scene, arm: str, reference: str, metric: Metric = p99) -> Interval:
        """Relative difference to a reference over shared seeds; below 0 is better."""
        seeds = self.seeds(scene, arm, reference)
        return relative_difference(
            self.column(scene, arm, metric, seeds), self.column(scene, reference, metric, seeds)
        )

    def oracle_share(self, scene: Scene, arm: str) -> Interval:
        """Part of the paying oracle's P99 gain over the best static α that an arm gets."""
        names = (arm, BEST_PAID, BEST_STATIC)
        seeds = self.seeds(scene, *names)
        return share_of_gain(*(self.column(scene, name, p99, seeds) for name in names))
