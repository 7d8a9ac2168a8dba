"""Figures of the results document, small PNG files drawn from finished cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hbm_study.cells import Scene
from hbm_study.results import BEST_PAID, BEST_STATIC, STATIC, Results, p99
from hbm_study.summary import LATENCY_EDGES_MS, STEP_EDGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 100
_COLOURS = ("#0b6e99", "#d9730d", "#0f7b6c", "#6940a5", "#ad1a72", "#9b9a97", "#64473a", "#dfab01")


def _mean_over_seeds(results: Results, scene: Scene, arm: str, name: str) -> Any:
    rows = [
        [math.nan if value is None else value for value in cell[name]]
        for cell in results.cells(scene, arm).values()
    ]
    if not rows:
        return None
    stacked = np.array(rows, np.float64)
    known = np.isfinite(stacked)
    counts = known.sum(axis=0)
    sums = np.where(known, stacked, 0.0).sum(axis=0)
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def alpha_over_time(results: Results, scene: Scene, arms: Sequence[str], path: Path) -> bool:
    """α of each arm and α*, mean over seeds, in windows of the stream. False: nothing to draw."""

    def draw(axes: Axes) -> None:
        star = None
        for arm, colour in zip(arms, _COLOURS, strict=False):
            values = _mean_over_seeds(results, scene, arm, "alpha_over_time")
            if values is not None:
                axes.plot(np.linspace(0, 1, len(values)), values, label=arm, color=colour)
                star = _mean_over_seeds(results, scene, arm, "star_over_time")
        if star is not None:
            axes.plot(np.linspace(0, 1, len(star)), star, "k--", lw=1, label="α* (mean service)")
        axes.set(xlabel="share of the stream", ylabel="α", ylim=(0, 1))

    return _figure(results, scene, arms, path, draw)


def error_over_time(results: Results, scene: Scene, arms: Sequence[str], path: Path) -> bool:
    """|α̂ − α*| (solid) and |α − α*| (dotted), mean over seeds."""

    def draw(axes: Axes) -> None:
        for arm, colour in zip(arms, _COLOURS, strict=False):
            for name, line in (("anchor_error_over_time", "-"), ("applied_error_over_time", ":")):
                values = _mean_over_seeds(results, scene, arm, name)
                if values is not None and np.isfinite(values).any():
                    label = arm if line == "-" or name.startswith("applied") else None
                    axes.plot(
                        np.linspace(0, 1, len(values)),
                        values,
                        line,
                        color=colour,
                        label=f"{label} {'α̂' if line == '-' else 'α'}",
                    )
        axes.set(xlabel="share of the stream", ylabel="distance to α*")

    return _figure(results, scene, arms, path, draw)


def tails(results: Results, scene: Scene, arms: Sequence[str], path: Path) -> bool:
    """Share of requests slower than a latency, all seeds."""

    def draw(axes: Axes) -> None:
        edges = np.array(LATENCY_EDGES_MS)
        for arm, colour in zip(arms, _COLOURS, strict=False):
            rows = [cell["latency_histogram"] for cell in results.cells(scene, arm).values()]
            if rows:
                counts = np.sum(rows, axis=0)
                slower = 1.0 - np.cumsum(counts)[:-1] / counts.sum()
                axes.plot(edges, np.maximum(slower, 1e-5), label=arm, color=colour)
        axes.set(xscale="log", yscale="log", xlabel="latency, ms", ylabel="share that is slower")
        axes.set_ylim(1e-4, 1)

    return _figure(results, scene, arms, path, draw)


def steps(results: Results, scene: Scene, arms: Sequence[str], path: Path) -> bool:
    """Histogram of Δα per decision; decisions that change nothing are left out and counted."""

    def draw(axes: Axes) -> None:
        edges = ("<", *(f"{edge:+g}" for edge in STEP_EDGES))
        places = np.arange(len(edges))
        still = len(STEP_EDGES) // 2
        drawn = [arm for arm in arms if results.cells(scene, arm)]
        for index, arm in enumerate(drawn):
            counts = np.sum(
                [cell["alpha_steps"] for cell in results.cells(scene, arm).values()], axis=0
            ).astype(np.float64)
            total = counts.sum()
            kept = counts[still] / total
            counts[still] = 0.0
            axes.bar(
                places + index / (len(drawn) + 1),
                100.0 * counts / total,
                1 / (len(drawn) + 1),
                label=f"{arm} ({100 * kept:.1f} % unchanged)",
                color=_COLOURS[index % len(_COLOURS)],
            )
        axes.set_xticks(places, edges)
        axes.set(xlabel="Δα per decision, from", ylabel="decisions, %")

    return _figure(results, scene, arms, path, draw)


def static_curve(results: Results, scene: Scene, arms: Sequence[str], path: Path) -> bool:
    """P99 over static α, with each arm as a line across."""

    def draw(axes: Axes) -> None:
        statics = sorted(arm for arm in results.arms(scene) if arm.startswith(STATIC))
        points = [(float(a.removeprefix(STATIC)), results.mean(scene, a, p99)) for a in statics]
        axes.plot([x for x, _ in points], [y.mean for _, y in points], "k.-", label="static α")
        low = min((y.mean for _, y in points), default=1.0)
        for arm, colour in zip(arms, _COLOURS, strict=False):
            seen = results.mean(scene, arm, p99)
            if seen.seeds:
                axes.axhline(seen.mean, color=colour, lw=1, label=arm)
                low = min(low, seen.mean)
        axes.set(xlabel="α", ylabel="P99, ms", ylim=(0.9 * low, 3.0 * low))

    return _figure(results, scene, arms, path, draw)


def draw_all(results: Results, scene: Scene, folder: Path) -> dict[str, Path]:
    """All figures of a scene, by their titles."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{scene.workload}-{scene.load}-{scene.gather}".replace("/", "_")
    shown = ("full", "twin-adapter-gate", "twin", BEST_PAID, "paper", "ppo", "xgboost", "lstm")
    arms = [arm for arm in shown if results.cells(scene, arm)]
    found = {}
    for title, function, drawn in (
        ("P99 over α", static_curve, arms),
        ("α over time", alpha_over_time, arms[:5]),
        ("error over time", error_over_time, arms[:4]),
        ("latency", tails, [*arms[:3], BEST_STATIC, BEST_PAID]),
        ("steps of α", steps, arms[:6]),
    ):
        path = folder / f"{name}-{title.replace(' ', '-').replace('α', 'alpha')}.png"
        if function(results, scene, drawn, path):
            found[title] = path
    return found


def _figure(results: Results, scene: Scene, arms: Sequence[str], path: Path, draw: Any) -> bool:
    if not any(results.cells(scene, arm) for arm in arms):
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 3.2), layout="constrained")
    draw(axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    # Without the date and the version: equal results, equal bytes.
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    pyplot.close(figure)
    return True
