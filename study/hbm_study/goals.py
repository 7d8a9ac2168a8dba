"""The goals of the protocol, judged on the unfavourable end of each interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Final, Literal

from hbm_study.cells import Scene
from hbm_study.results import BEST_STATIC, Results, of_regime
from hbm_study.statistics import GOAL_SEEDS, NON_INFERIORITY, Interval, interval

STRESS: Final = ("trend", "burst-hot", "burst-new", "mix")
CONTROLS: Final = ("steady", "light8k", "dlrmv3")
DATA_SETS: Final = ("taobao", "amazon-video-games", "amazon-books")
OUT_OF_DISTRIBUTION: Final = ("ood-node", "ood-users", "ood-switch")
"""Nodes and traffic outside the ranges that anything was trained or tuned on."""
ORACLE_SHARE: Final = 0.7
ANCHOR_ERROR: Final = 0.02
Verdict = Literal["reached", "missed", "not judged"]


@dataclasses.dataclass(frozen=True, slots=True)
class Judged:
    """One goal on one scene."""

    goal: str
    scene: Scene
    arm: str
    seen: Interval
    limit: float
    verdict: Verdict
    note: str = ""


def judge(results: Results, arm: str) -> list[Judged]:
    """All goals for one arm, wherever it has run without a fault."""
    judged: list[Judged] = []
    for scene in results.scenes:
        if scene.fault or scene.requests is not None or scene.nodes > 1:
            continue
        if arm not in results.arms(scene):
            continue
        if scene.load == "1.0":
            judged += _anchor(results, scene, arm)
        if scene.workload in STRESS and scene.gather == "serial" and scene.load == "1.0":
            judged.append(_share(results, scene, arm))
        if scene.gather == "overlap" or scene.workload in CONTROLS:
            judged.append(_within(results, scene, arm, BEST_STATIC, "non-inferior to best static"))
        judged.append(_within(results, scene, arm, "static-0.50", "not worse than α = 0.5"))
    return judged


def _share(results: Results, scene: Scene, arm: str) -> Judged:
    seen = results.oracle_share(scene, arm)
    return Judged(
        "part of the paying oracle's gain",
        scene,
        arm,
        seen,
        ORACLE_SHARE,
        _verdict(seen, seen.low >= ORACLE_SHARE),
        "" if seen.seeds else "the paying oracle gains nothing here, or has not run",
    )


def _within(results: Results, scene: Scene, arm: str, reference: str, goal: str) -> Judged:
    seen = results.against(scene, arm, reference)
    verdict = _verdict(seen, seen.high <= NON_INFERIORITY)
    return Judged(goal, scene, arm, seen, NON_INFERIORITY, verdict)


def _anchor(results: Results, scene: Scene, arm: str) -> Iterator[Judged]:
    for regime in _regimes(results, scene, arm):
        error = results.mean(scene, arm, of_regime(regime, "anchor_error"))
        distance = results.mean(scene, arm, of_regime(regime, "anchor_distance"))
        if not error.seeds or math.isnan(error.mean):
            continue
        seen = min(error, distance, key=lambda each: each.mean)
        note = "distance to the plateau" if seen is distance else "distance to α*"
        verdict = _verdict(seen, seen.high <= ANCHOR_ERROR)
        yield Judged(f"anchor, {regime}", scene, arm, seen, ANCHOR_ERROR, verdict, note)


def _regimes(results: Results, scene: Scene, arm: str) -> list[str]:
    names: dict[str, None] = {}
    for cell in results.cells(scene, arm).values():
        for name in cell["regimes"]:
            names.setdefault(name)
    return list(names)


def _verdict(seen: Interval, reached: bool) -> Verdict:
    if seen.seeds < GOAL_SEEDS:
        return "not judged"
    return "reached" if reached else "missed"


def residual_ships(results: Results, full: str, base: str) -> tuple[bool, Interval]:
    """The shipping rule: mean pooled P99 of `full` over `base` across all scenes, seed by seed.

    The gain ships as other than 0 only where the whole interval lies below 0.
    """
    by_seed: dict[int, list[float]] = {}
    for scene in results.scenes:
        if scene.fault:
            continue
        for seed in results.seeds(scene, full, base):
            ours = results.cells(scene, full)[seed]["pooled"]["p99_ms"]
            theirs = results.cells(scene, base)[seed]["pooled"]["p99_ms"]
            by_seed.setdefault(seed, []).append(ours / theirs - 1.0)
    seen = interval([sum(values) / len(values) for values in by_seed.values()])
    return seen.seeds >= GOAL_SEEDS and seen.high < 0.0, seen
