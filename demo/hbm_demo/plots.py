"""The figures of the report as SVG text: no script, no font, nothing to be fetched."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from hbm_load.records import Records
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from hbm_demo.arm import ArmResult
from hbm_demo.summary import series_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARM_COLOURS: Final = {"adaptive": "#0b6e99", "fixed": "#c2571a"}
_NODE_COLOURS: Final = ("#0b6e99", "#7a3b9c", "#2a8a4a", "#b8860b", "#a32638", "#4a5a6a")
_WINDOW_S: Final = 2.0
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hbm",
    "font.size": 11,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.constrained_layout.use": True,
}


def alpha_over_time(result: ArmResult, optima: Mapping[str, Any]) -> str:
    """α and α̂ of each node, and α* of each regime where the sweep found one."""
    figure, axes = _figure(2.9)
    _bands(axes, result.records)
    for colour, node in zip(_cycle(), result.nodes, strict=False):
        series = series_of(result.samples, node)
        axes.plot(series.time_s, series.alpha, color=colour, lw=2, label=f"α {node}")
        axes.plot(series.time_s, series.anchor, color=colour, lw=1, ls=":", label=f"α̂ {node}")
    labelled = False
    for label, start, stop in steps_of(result.records):
        star = optima.get(label, {}).get("alpha_star")
        if star is not None:
            name = None if labelled else "α* (sweep)"
            axes.hlines(star, start, stop, color="#222222", lw=1.2, ls="--", label=name)
            labelled = True
    axes.set_ylim(0, 1)
    return _svg(figure, axes, "time, s", "share of the pool for rows")


def hit_rates(arms: Iterable[ArmResult]) -> str:
    """KV and EMB hit rate of each arm over time."""
    figure, axes = _figure(2.9)
    for number, result in enumerate(arms):
        records = result.records
        if number == 0:
            _bands(axes, records)
        middle, windows = _windows(records)
        colour = ARM_COLOURS.get(result.arm.name, "#444444")
        reused = records.numbers["kv_reused_tokens"]
        looked_up = records.numbers["rows_looked_up"]
        missed = records.numbers["rows_missed"]
        kv = [_mean(reused[window] > 0) for window in windows]
        emb = [
            1.0 - np.nansum(missed[window]) / max(1.0, np.nansum(looked_up[window]))
            if len(window)
            else np.nan
            for window in windows
        ]
        axes.plot(middle, kv, color=colour, lw=1.8, label=f"KV, {result.arm.title}")
        axes.plot(middle, emb, color=colour, lw=1.4, ls="--", label=f"EMB, {result.arm.title}")
    axes.set_ylim(0, 1.02)
    return _svg(figure, axes, "time, s", "hit rate")


def latency_over_time(arms: Iterable[ArmResult], slo_ms: float) -> str:
    """P50 and P95 of windows of a few seconds, both arms."""
    figure, axes = _figure(3.1)
    for number, result in enumerate(arms):
        if number == 0:
            _bands(axes, result.records)
        middle, windows = _windows(result.records)
        latency = np.where(result.records.ok, result.records.latency_ms, np.nan)
        colour = ARM_COLOURS.get(result.arm.name, "#444444")
        for q, width in ((50, 1.0), (95, 2.0)):
            values = [_percentile(latency[window], q) for window in windows]
            axes.plot(middle, values, color=colour, lw=width, label=f"P{q}, {result.arm.title}")
    axes.axhline(slo_ms, color="#a32638", lw=1, ls=":", label=f"SLO {slo_ms:g} ms")
    axes.set_yscale("log")
    _plain_log(axes.yaxis)
    return _svg(figure, axes, "time, s (windows of 2 s)", "latency, ms")


def latency_distribution(arms: Iterable[ArmResult], slo_ms: float) -> str:
    """Share of requests slower than a latency, per regime; both axes logarithmic."""
    listed = list(arms)
    labels = listed[0].records.labels
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 2.9))
        axes = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for index, label in enumerate(labels):
        for result in listed:
            records = result.records
            latency = records.latency_ms[(records.regime == index) & records.ok]
            latency = np.sort(latency[np.isfinite(latency)])
            slower = 1.0 - np.arange(len(latency)) / max(1, len(latency))
            colour = ARM_COLOURS.get(result.arm.name, "#444444")
            axes[index].plot(latency, slower, color=colour, lw=1.6, label=result.arm.title)
        axes[index].axvline(slo_ms, color="#a32638", lw=1, ls=":")
        axes[index].set_title(label, fontsize=11)
        axes[index].set_xscale("log")
        axes[index].set_yscale("log")
        axes[index].set_ylim(1e-3, 1.1)
        _plain_log(axes[index].xaxis, most_labels=4)
    axes[0].legend(loc="lower left")
    return _svg(figure, axes[0], "latency, ms", "share slower", legend=False)


def copied_bytes(arms: Iterable[ArmResult]) -> str:
    """Rows copied from the host: by the refill in the background, and by requests that missed."""
    figure, axes = _figure(2.9)
    for number, result in enumerate(arms):
        if number == 0:
            _bands(axes, result.records)
        colour = ARM_COLOURS.get(result.arm.name, "#444444")
        edges = _edges(result.records)
        for name, style, what in (
            ("refill_bytes", "-", "refill"),
            ("foreground_bytes", "--", "misses"),
        ):
            total = np.zeros(len(edges) - 1)
            for node in result.nodes:
                series = series_of(result.samples, node)
                if len(series.time_s):
                    at = np.interp(edges, series.time_s, series.counters[name])
                    total += np.diff(at)
            rate = total / np.diff(edges) / 1e6
            middle = (edges[:-1] + edges[1:]) / 2
            axes.plot(
                middle, rate, color=colour, ls=style, lw=1.6, label=f"{what}, {result.arm.title}"
            )
    axes.set_ylim(bottom=0)
    return _svg(figure, axes, "time, s", "from the host, MB/s")


def routed_requests(result: ArmResult) -> str:
    """Requests per second of each node, stacked, and the share that found their user's KV."""
    figure, axes = _figure(2.9)
    records = result.records
    _bands(axes, records)
    edges = _edges(records)
    middle = (edges[:-1] + edges[1:]) / 2
    nodes = np.array(records.texts["node"])
    base = np.zeros(len(middle))
    for colour, node in zip(_cycle(), result.nodes, strict=False):
        at = records.intended_s[nodes == node]
        rate = np.histogram(at, edges)[0] / np.diff(edges)
        axes.fill_between(
            middle, base, base + rate, color=colour, alpha=0.75, lw=0, label=node, step="mid"
        )
        base = base + rate
    axes.set_ylim(bottom=0)
    return _svg(figure, axes, "time, s", "requests per second")


def steps_of(records: Records) -> list[tuple[str, float, float]]:
    """(label, first, last intended time) of each stretch of one regime, in order."""
    if not len(records):
        return []
    borders = np.flatnonzero(np.diff(records.regime)) + 1
    starts = [0, *borders.tolist()]
    stops = [*borders.tolist(), len(records)]
    return [
        (
            records.labels[records.regime[start]],
            float(records.intended_s[start]),
            float(records.intended_s[stop - 1]),
        )
        for start, stop in zip(starts, stops, strict=True)
    ]


def _figure(height: float) -> tuple[Figure, Any]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, height))
        return figure, figure.subplots()


def _svg(figure: Figure, axes: Axes, x: str, y: str, *, legend: bool = True) -> str:
    with mpl.rc_context(_STYLE):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if legend:
            count = len(axes.get_legend_handles_labels()[0])
            figure.legend(loc="outside upper center", ncols=min(3, max(1, count)))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # An inline element: without the XML head, without the metadata block, which names vocabularies
    # by address, and wide as its column.
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    head, rest = svg.split(">", 1)
    return re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + rest


def _plain_log(axis: Any, most_labels: int = 12) -> None:
    """Ticks at 1, 2 and 5 of each decade if they have room, else at 1, written as plain numbers."""
    low, high = axis.get_view_interval()
    room = 3.0 * math.log10(high / low) <= most_labels
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if room else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _bands(axes: Axes, records: Records) -> None:
    """Names and shades the regimes."""
    for number, (label, start, stop) in enumerate(steps_of(records)):
        if number % 2 == 0:
            axes.axvspan(start, stop, color="#000000", alpha=0.04, lw=0)
        axes.annotate(
            label,
            ((start + stop) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=9.5,
            color="#555555",
        )


def _edges(records: Records) -> npt.NDArray[np.float64]:
    duration = float(records.intended_s[-1]) if len(records) else 1.0
    return np.linspace(0.0, max(duration, 1e-3), max(2, round(duration / _WINDOW_S) + 1))


def _windows(
    records: Records,
) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.int64]]]:
    edges = _edges(records)
    borders = np.searchsorted(records.intended_s, edges)
    windows = [np.arange(low, high) for low, high in itertools.pairwise(borders)]
    return (edges[:-1] + edges[1:]) / 2, windows


def _cycle() -> Iterable[str]:
    while True:
        yield from _NODE_COLOURS


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _percentile(values: npt.NDArray[np.float64], q: int) -> float:
    finite = values[np.isfinite(values)]
    return float(np.percentile(finite, q)) if len(finite) else float("nan")
