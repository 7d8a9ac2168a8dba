"""A dashboard drawn from its panels' data, for documents: Grafana's grid without Grafana."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import matplotlib
from PIL import Image

matplotlib.use("agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from hbm_dashboards.data import Asked, Series, named

Answers = Sequence[tuple[Asked, Sequence[Series]]]

COLUMNS: Final = 24
INCHES_PER_COLUMN: Final = 0.58
INCHES_PER_ROW: Final = 0.27
ROWS_OF_MARGIN: Final = 1
LONG_NAME: Final = 22
GAP_STEPS: Final = 3
COLOURS_OF_PNG: Final = 96
"""Kept when it is written: a third of the size."""
MAX_LINES: Final = 8
"""Named in a legend; the rest is drawn without."""
COLOURS: Final = (
    *("#3274d9", "#e0752d", "#56a64b", "#b877d9", "#e02f44", "#00a0a0", "#8a6d3b", "#7f7f7f"),
)
_SI: Final = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def draw(dashboard: Mapping[str, Any], answers: Sequence[Answers], path: Path) -> None:
    """Write a PNG. `answers`: what came back for each of `data.panels`; times are shown in UTC."""
    panels = dashboard["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(
        figsize=(COLUMNS * INCHES_PER_COLUMN, (rows + ROWS_OF_MARGIN) * INCHES_PER_ROW), dpi=72
    )
    figure.suptitle(dashboard["title"], fontsize=12, weight="bold", x=0.01, ha="left", y=0.998)
    waiting = iter(answers)
    for panel in panels:
        axes = figure.add_axes(_place(panel["gridPos"], rows + ROWS_OF_MARGIN, panel["type"]))
        if panel["type"] == "row":
            axes.axis("off")
            axes.text(0, 0.5, panel["title"], weight="bold", fontsize=10, va="center")
            continue
        axes.set_title(panel["title"], fontsize=8, loc="left", pad=3)
        _DRAWN[panel["type"]](axes, panel, next(waiting))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = BytesIO()
    figure.savefig(whole)
    with Image.open(whole) as image:
        image.convert("RGB").quantize(COLOURS_OF_PNG).save(path, optimize=True)


def shown(value: float, unit: str) -> str:
    """A value as a person reads it."""
    match unit:
        case "percentunit":
            return f"{100 * value:.3g} %"
        case "s":
            for factor, name in ((1e6, "µs"), (1e3, "ms")):
                if abs(value) * factor < 1000 and value:
                    return f"{value * factor:.3g} {name}"
            return f"{value:.3g} s" if abs(value) < 86_400 else f"{value / 86_400:.3g} d"
    suffix = {"reqps": "/s", "cps": "/s", "Bps": "B/s", "bytes": "B"}.get(unit, "")
    for factor, name in _SI:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {name}{suffix}"
    return f"{value:.3g} {suffix}".strip()


def _place(grid: Mapping[str, int], rows: int, kind: str) -> tuple[float, float, float, float]:
    """Left, bottom, width, height as shares of the picture, with room for titles and ticks."""
    top = 1 - (grid["y"] + ROWS_OF_MARGIN) / rows
    left, width, height = grid["x"] / COLUMNS, grid["w"] / COLUMNS, grid["h"] / rows
    if kind == "timeseries":
        below, above, before, after = 2.6 / rows, 1.2 / rows, 0.045, 0.012
    else:
        below, above, before, after = 0.3 / rows, 1.2 / rows, 0.01, 0.01
    if kind == "row":
        below = above = 0
    return left + before, top - height + below, width - before - after, height - below - above


def _unit(panel: Mapping[str, Any]) -> str:
    return str(panel["fieldConfig"]["defaults"].get("unit", "short"))


def _lines(axes: Axes, panel: Mapping[str, Any], answers: Answers) -> None:
    unit = _unit(panel)
    custom = panel["fieldConfig"]["defaults"].get("custom", {})
    stacked = custom.get("stacking", {}).get("mode") == "normal"
    lines = [
        (_short(named(asked.legend, one.labels)), _with_gaps(one.points))
        for asked, found in answers
        for one in found
        if one.points
    ]
    floor: dict[float, float] = {}
    for number, (name, points) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        times = [at for at, _ in points]
        values = [value + (floor.get(at, 0.0) if stacked else 0.0) for at, value in points]
        axes.plot(
            times, values, color=colour, lw=1, label=name if number < MAX_LINES else "_nolegend_"
        )
        if stacked:
            axes.fill_between(
                times, values, [floor.get(at, 0.0) for at, _ in points], color=colour, alpha=0.35
            )
            floor |= {at: value for (at, _), value in zip(points, values, strict=True)}
    axes.set_ylim(bottom=0, top=panel["fieldConfig"]["defaults"].get("max"))
    axes.margins(x=0.01)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, unit)))
    axes.xaxis.set_major_formatter(FuncFormatter(_clock))
    axes.tick_params(labelsize=6, length=2)
    axes.locator_params(nbins=5)
    axes.grid(alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if lines:
        axes.legend(
            *(axes.get_legend_handles_labels()),
            loc="upper left",
            bbox_to_anchor=(-0.02, -0.1),
            ncols=4 if max(len(name) for name, _ in lines) < LONG_NAME else 2,
            fontsize=5.5,
            frameon=False,
            handlelength=1,
            columnspacing=0.8,
        )


def _with_gaps(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """With a NaN wherever a series was away, so that no line is drawn over it."""
    step = min((b - a for (a, _), (b, _) in pairwise(points)), default=0.0)
    whole = points[:1]
    for (before, _), point in pairwise(points):
        if point[0] - before > GAP_STEPS * step:
            whole.append((before + step, math.nan))
        whole.append(point)
    return whole


def _short(name: str) -> str:
    """The end of a long name: there names of pods and nodes differ."""
    return name if len(name) <= LONG_NAME else f"…{name[-LONG_NAME:]}"


def _clock(at: float, _: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M")


def _number(axes: Axes, panel: Mapping[str, Any], answers: Answers) -> None:
    axes.axis("off")
    for _, found in answers:
        for one in found:
            if one.points:
                times, values = zip(*one.points, strict=True)
                axes.fill_between(times, values, color=COLOURS[0], alpha=0.15, lw=0)
                axes.set_ylim(0, 1.05 * max(*values, 1e-12))
                axes.text(
                    *(0.5, 0.5, shown(values[-1], _unit(panel))),
                    transform=axes.transAxes,
                    ha="center",
                    va="center",
                    fontsize=15,
                    color="#1f3a5f",
                )


def _table(axes: Axes, panel: Mapping[str, Any], answers: Answers) -> None:
    axes.axis("off")
    units = {
        override["matcher"]["options"]: each["value"]
        for override in panel["fieldConfig"]["overrides"]
        for each in override["properties"]
        if each["id"] == "unit"
    }
    headings = list(units)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for heading, (_, found) in zip(headings, answers, strict=True):
        for one in found:
            if one.points:
                row = rows.setdefault((one.labels["namespace"], one.labels["pod"]), {})
                row[heading] = shown(one.points[-1][1], units[heading])
    if rows:
        table = axes.table(
            [[*pod, *(row.get(one, "") for one in headings)] for pod, row in sorted(rows.items())],
            colLabels=["namespace", "pod", *headings],
            loc="upper left",
            cellLoc="left",
            edges="horizontal",
        )
        table.auto_set_font_size(False)
        table.set_fontsize(7)


_DRAWN: Final = {"timeseries": _lines, "stat": _number, "table": _table}
