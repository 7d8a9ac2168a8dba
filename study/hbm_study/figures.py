"""Figures of the results document, PNG files drawn from finished cells: one page per scene."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hbm_study.cells import Scene
from hbm_study.results import BEST_PAID, BEST_STATIC, STATIC, Results, of_regime, p99
from hbm_study.summary import LATENCY_EDGES_MS, STEP_EDGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 100
COLOURS: Final = {
    "full": "#d9480f",
    "twin-adapter-gate": "#0b6e99",
    "twin": "#66a3c9",
    "drop": "#0f7b6c",
    "paper": "#6940a5",
    "ppo": "#b197dd",
    BEST_PAID: "#2f9e44",
    BEST_STATIC: "#222222",
    "static-0.50": "#868e96",
}
"""An arm has one colour on all pages."""
_GREY: Final = "#adb5bd"
WORST: Final = 1.5
"""Bars of P99 end there: what collapsed is written beside, not drawn to scale."""


def draw_scene(results: Results, scene: Scene, folder: Path) -> Path:
    """One page: P99 of all arms and over α, α and its error over time, latency, steps of α."""
    figure, panels = _page(3, 2, (9.4, 11.2))
    _bars(panels[0][0], results, scene)
    _static_curve(panels[0][1], results, scene)
    _alpha_over_time(panels[1][0], results, scene)
    _error_over_time(panels[1][1], results, scene)
    _tails(panels[2][0], results, scene)
    _steps(panels[2][1], results, scene)
    rate = "" if scene.rate is None else f", {100 * scene.rate:g} % of rows followed"
    figure.suptitle(f"{scene.workload}, load {scene.load}, {scene.gather}{rate}", fontsize=11)
    return _save(figure, folder / f"{scene.workload}-{scene.load}-{scene.gather}.png")


def draw_optima(results: Results, scenes: Sequence[Scene], folder: Path) -> Path:
    """Mean service time over α of each regime, a panel per workload."""
    columns = min(3, len(scenes))
    figure, panels = _page(-(-len(scenes) // columns), columns, (3.3 * columns, 0.0))
    every = [axes for row in panels for axes in row]
    for axes, scene in zip(every, scenes, strict=False):
        _service_curves(axes, results, scene)
    for axes in every[len(scenes) :]:
        axes.set_visible(False)
    return _save(figure, folder / "optima.png")


def draw_map(
    results: Results, scenes: Sequence[Scene], pairs: Sequence[tuple[str, str]], folder: Path
) -> Path:
    """P99 of one routing against another over node count and share of hot users, a panel each."""
    figure, panels = _page(1, len(pairs), (3.4 * len(pairs), 3.0))
    nodes = sorted({scene.nodes for scene in scenes})
    hot = sorted({scene.hot for scene in scenes if scene.hot is not None})
    for axes, (arm, reference) in zip(panels[0], pairs, strict=True):
        cells = np.full((len(hot), len(nodes)), np.nan)
        for scene in scenes:
            seen = results.against(scene, arm, reference)
            if scene.hot is not None and seen.seeds:
                cells[hot.index(scene.hot), nodes.index(scene.nodes)] = 100.0 * seen.mean
        shown = axes.imshow(
            cells, cmap="RdYlGn_r", vmin=-60, vmax=60, origin="lower", aspect="auto"
        )
        for (row, column), value in np.ndenumerate(cells):
            if np.isfinite(value):
                axes.text(column, row, f"{value:+.0f} %", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(nodes)), [str(each) for each in nodes])
        axes.set_yticks(range(len(hot)), [f"{100 * each:.0f} %" for each in hot])
        axes.set(xlabel="nodes", ylabel="hot users")
        axes.set_title(f"{arm.partition('+')[0]} against {reference.partition('+')[0]}")
        axes.grid(visible=False)
    figure.colorbar(shown, ax=panels[0].tolist(), label="P99, %")
    return _save(figure, folder / "nodes-and-hot-users.png")


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


def _drawn(results: Results, scene: Scene, *arms: str) -> list[str]:
    return [arm for arm in arms if results.cells(scene, arm)]


def _bars(axes: Axes, results: Results, scene: Scene) -> None:
    """P99 against the best static α, all arms that are no static split, with intervals."""
    arms = [a for a in results.arms(scene) if not a.startswith((STATIC, "oracle-paid"))]
    arms += _drawn(results, scene, BEST_PAID, "static-0.50")
    seen = {arm: results.against(scene, arm, BEST_STATIC) for arm in arms}
    order = sorted((a for a in arms if seen[a].seeds), key=lambda a: -seen[a].mean)
    for place, arm in enumerate(order):
        mean, low, high, _ = seen[arm]
        axes.barh(place, min(mean, WORST) * 100, color=COLOURS.get(arm, _GREY), height=0.7)
        if not math.isnan(low) and mean <= WORST:
            ends = [100 * min(low, WORST), 100 * min(high, WORST)]
            axes.plot(ends, [place, place], color="black", lw=1)
        if mean > WORST:
            axes.text(103 * WORST, place, f"{100 * mean:+,.0f} %", va="center", fontsize=6)
    axes.set_yticks(range(len(order)), order, fontsize=7)
    axes.axvline(0.0, color="black", lw=0.8)
    axes.set(title="P99 against the best static α, %")
    if order and seen[order[0]].mean > WORST:
        axes.set_xlim(right=122 * WORST)


def _static_curve(axes: Axes, results: Results, scene: Scene) -> None:
    statics = sorted(arm for arm in results.arms(scene) if arm.startswith(STATIC))
    alphas = [float(arm.removeprefix(STATIC)) for arm in statics]
    tails = [results.mean(scene, arm, p99).mean for arm in statics]
    axes.plot(alphas, tails, ".-", color=COLOURS[BEST_STATIC], label="static α")
    low = min(tails, default=1.0)
    arms = _drawn(results, scene, "full", "twin-adapter-gate", BEST_PAID, "paper")
    for arm in arms:
        seen = results.mean(scene, arm, p99).mean
        axes.axhline(seen, color=COLOURS[arm], lw=1.2, label=f"{arm} ({seen:.0f} ms)")
    shown = [low, *(results.mean(scene, arm, p99).mean for arm in arms)]
    low, most = min(shown), max(shown)
    axes.set(title="P99 over α, ms", xlabel="α", yscale="log")
    axes.set_ylim(0.8 * low, max(4.0 * low, 1.3 * most))
    axes.yaxis.set_major_formatter(_plain_number())
    axes.yaxis.set_minor_formatter(_plain_number())
    axes.tick_params(axis="y", which="both", labelsize=7)
    _legend(axes)


def _alpha_over_time(axes: Axes, results: Results, scene: Scene) -> None:
    star = None
    for arm in _drawn(results, scene, "full", "twin-adapter-gate", BEST_PAID, "paper"):
        values = _mean_over_seeds(results, scene, arm, "alpha_over_time")
        axes.plot(np.linspace(0, 1, len(values)), values, color=COLOURS[arm], lw=1.4, label=arm)
        star = _mean_over_seeds(results, scene, arm, "star_over_time")
    if star is not None:
        axes.plot(np.linspace(0, 1, len(star)), star, "k--", lw=1, label="α* (mean service)")
    axes.set(title="applied α over time", xlabel="share of the stream", ylim=(0, 1))
    _legend(axes)


def _error_over_time(axes: Axes, results: Results, scene: Scene) -> None:
    for arm in _drawn(results, scene, "twin-adapter-gate", "twin", "paper"):
        for name, line, said in (
            ("anchor_error_over_time", "-", "α̂"),
            ("applied_error_over_time", ":", "α"),
        ):
            values = _mean_over_seeds(results, scene, arm, name)
            if np.isfinite(values).any():
                places = np.linspace(0, 1, len(values))
                axes.plot(places, values, line, color=COLOURS[arm], lw=1.4, label=f"{arm}, {said}")
    axes.set(title="distance to α* over time", xlabel="share of the stream")
    axes.set_ylim(bottom=0.0)
    _legend(axes)


def _tails(axes: Axes, results: Results, scene: Scene) -> None:
    """Share of requests slower than a latency, all seeds."""
    edges = np.array(LATENCY_EDGES_MS)
    for arm in _drawn(results, scene, "full", "twin-adapter-gate", BEST_PAID, BEST_STATIC, "paper"):
        counts = np.sum(
            [c["latency_histogram"] for c in results.cells(scene, arm).values()], axis=0
        )
        slower = 1.0 - np.cumsum(counts)[:-1] / counts.sum()
        axes.plot(edges, np.maximum(slower, 1e-6), color=COLOURS[arm], lw=1.4, label=arm)
    axes.axhline(0.01, color="black", lw=0.6, ls=":")
    axes.set(title="share of requests that is slower", xlabel="latency, ms", xscale="log")
    axes.set(yscale="log", xlim=(5, None), ylim=(1e-4, 1))
    _legend(axes)


def _steps(axes: Axes, results: Results, scene: Scene) -> None:
    """Histogram of Δα per decision; decisions that change nothing are left out and counted."""
    names = ["< −.05"]
    names += [f"{low:+g}…{high:+g}" for low, high in pairwise(STEP_EDGES)]
    names = [name.replace("-", "−").replace("0.", ".") for name in [*names, "> +.05"]]
    still = len(STEP_EDGES) // 2
    shown = [index for index in range(len(names)) if index != still]
    arms = _drawn(results, scene, "full", "twin-adapter-gate", "paper")
    for index, arm in enumerate(arms):
        rows = [cell["alpha_steps"] for cell in results.cells(scene, arm).values()]
        counts = np.sum(rows, axis=0).astype(np.float64)
        share = 100.0 * counts / counts.sum()
        axes.barh(
            np.arange(len(shown)) + (index - (len(arms) - 1) / 2) * 0.8 / len(arms),
            share[shown],
            0.8 / len(arms),
            color=COLOURS[arm],
            label=f"{arm} ({share[still]:.1f} % unchanged)",
        )
    axes.set_yticks(range(len(shown)), [names[index] for index in shown], fontsize=7)
    axes.set(title="Δα per decision, % of decisions")
    _legend(axes)


def _service_curves(axes: Axes, results: Results, scene: Scene) -> None:
    statics = sorted(arm for arm in results.arms(scene) if arm.startswith(STATIC))
    alphas = [float(arm.removeprefix(STATIC)) for arm in statics]
    names: dict[str, None] = {}
    for arm in statics:
        for cell in results.cells(scene, arm).values():
            names |= dict.fromkeys(cell["regimes"])
    for regime in names:
        metric = of_regime(regime, "service_settled_ms")
        means = np.array([results.mean(scene, arm, metric).mean for arm in statics])
        axes.plot(alphas, 100.0 * (means / np.nanmin(means) - 1.0), ".-", lw=1, ms=3, label=regime)
    axes.axhline(1.0, color="black", lw=0.6, ls=":")
    axes.set(xlabel="α", ylim=(0, 12))
    axes.set_title(f"{scene.workload}: service over the best, %", fontsize=8)
    _legend(axes, 6)


def _legend(axes: Axes, size: int = 7) -> None:
    """Where nothing of what is shown has run, none."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=size)


def _plain_number() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}" if value < 1e4 else f"{value:.0e}")


def _page(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Figure and its panels, `[rows][columns]`; height 0: as the rows need."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    for name in ("axes.labelsize", "xtick.labelsize", "ytick.labelsize"):
        mpl.rcParams[name] = 8
    mpl.rcParams["axes.titlesize"] = 9
    figure, panels = pyplot.subplots(
        rows,
        columns,
        figsize=(size[0], size[1] or 2.5 * rows),
        layout="constrained",
        squeeze=False,
    )
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, panels


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and the version: equal results, equal bytes.
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    pyplot.close(figure)
    return path
