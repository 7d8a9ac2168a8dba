"""A description as one HTML page with its plots inside, and as single PNG files."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hbm_sim.describe import Description


def write_report(found: Description, path: Path) -> list[Path]:
    """Writes PATH.html with all plots inside, or PATH.png and one file per plot beside it.

    Raises ValueError for another ending.
    """
    if path.suffix == ".html":
        path.write_text(_page(found), encoding="utf-8")
        return [path]
    if path.suffix != ".png":
        raise ValueError(f"{path}: a report is .html or .png")
    written = []
    for name, figure in _figures(found):
        part = path.with_name(f"{path.stem}-{name}.png")
        part.write_bytes(_png(figure))
        written.append(part)
    return written


def _page(found: Description) -> str:
    plots = "".join(
        f'<h2>{html.escape(name.replace("-", " "))}</h2><img alt="{html.escape(name)}" '
        f'src="data:image/png;base64,{base64.b64encode(_png(figure)).decode()}">'
        for name, figure in _figures(found)
    )
    head = "".join(f"<th>{html.escape(title)}</th>" for title in TITLES)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table_rows(found)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(found.name)}</title><style>"
        "body{font-family:sans-serif;max-width:70em;margin:2em auto}"
        "td,th{padding:.2em .8em;text-align:right}td:first-child,th:first-child{text-align:left}"
        "img{max-width:100%}</style></head><body>"
        f"<h1>{html.escape(found.name)}</h1><p>{html.escape(summary(found))}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{plots}</body></html>\n"
    )


TITLES = (
    "regime",
    "requests",
    "per s",
    "dispersion",
    "history",
    "revisits",
    "hot users",
    "α* (mean)",
    "plateau",
    "α* (P99)",
    "mean ms",
    "P99 ms",
)


def table_rows(found: Description) -> Iterator[tuple[str, ...]]:
    """One line per regime, under `TITLES`."""
    for each in found.regimes:
        mean, tail = each.optimum.by_service, each.optimum.by_p99
        yield (
            each.regime,
            str(each.requests),
            f"{each.per_s:.1f}",
            f"{each.dispersion:.2f}",
            f"{each.history_median:.0f}",
            f"{each.revisit_share:.0%}",
            f"{each.hot_user_share:.0%}",
            f"{mean.alpha:.3f}",
            f"{mean.plateau_low:.2f}-{mean.plateau_high:.2f}",
            f"{tail.alpha:.3f}",
            f"{mean.value_ms:.2f}",
            f"{tail.value_ms:.1f}",
        )


def summary(found: Description) -> str:
    """What it means for the choice of α, in two sentences."""
    if found.plateau_shift == 0.0:
        verdict = (
            "one α is within 1 % of the best in every regime: moving it brings next to nothing"
        )
    else:
        verdict = (
            f"the plateaus of the regimes are {found.plateau_shift:.2f} apart: the best single α "
            f"costs {found.static_regret:.1%} of service time over each regime's own, which is "
            "what free and instant moves would save"
        )
    return (
        f"{found.requests} requests in {found.duration_s:.0f} s; α* moves by {found.shift:.2f} "
        f"between regimes. Here {verdict}."
    )


def _figures(found: Description) -> Iterator[tuple[str, Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4))
    left, right = figure.subplots(1, 2)
    for each in found.regimes:
        line = left.plot(found.alpha, each.optimum.mean_service_ms, label=each.regime)[0]
        left.axvline(each.optimum.by_service.alpha, color=line.get_color(), ls=":")
        right.plot(found.alpha, each.optimum.p99_ms, label=each.regime)
    left.set(xlabel="α", ylabel="mean service, ms")
    right.set(xlabel="α", ylabel="P99 latency, ms", yscale="log")
    left.legend()
    yield "cost-over-alpha", figure
    figure = Figure(figsize=(9, 4))
    left, right = figure.subplots(1, 2)
    for each in found.regimes:
        left.plot(each.kv_reuse.size_bytes / 1e9, each.kv_reuse.hit_ratio, label=each.regime)
        right.plot(each.row_reuse.size_bytes / 1e9, each.row_reuse.hit_ratio, label=each.regime)
    left.set(xlabel="KV, GB", ylabel="users still there", xscale="log")
    right.set(xlabel="rows, GB", ylabel="rows still there (no KV hits)", xscale="log")
    left.legend()
    yield "reuse", figure
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    for each in found.regimes:
        optimum = each.optimum
        axes.plot(optimum.kv_hit_ratio, optimum.emb_miss_ratio, ".-", label=each.regime)
    axes.set(xlabel="KV hit ratio", ylabel="EMB miss ratio")
    axes.legend()
    yield "what-alpha-trades", figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
