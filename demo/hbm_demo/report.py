"""`report.html`: one file that needs nothing else, for a screen, a phone and paper."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from hbm_demo import plots
from hbm_demo.arm import ArmResult

_CSS = """
:root { --ink: #1d2329; --soft: #5b6670; --line: #d9dee3; --mark: #0b6e99; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; background: #fff; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p { margin: .3rem 0 .8rem; max-width: 46rem; } .soft { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; } figure { margin: 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; max-width: 52rem; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { text-align: right; padding: .3rem .55rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child, .text { text-align: left; }
tr.first td { border-top: 2px solid var(--line); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem;
  margin: 1rem 0; }
.tile { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem; }
.tile b { display: block; font-size: 1.25rem; }
.tile span { color: var(--soft); font-size: .85rem; }
.bad { color: #a32638; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } h2 { break-after: avoid; }
  .tile { break-inside: avoid; } .wide { overflow: visible; } table { font-size: 9px; }
  th, td { padding: .2rem .3rem; } }
"""


def render(summary: dict[str, Any], arms: list[ArmResult], slo_ms: float) -> str:
    """The whole page."""
    adaptive = arms[0]
    sections = [
        _head(summary),
        _tiles(summary),
        "<h2>Both arms, per regime</h2>",
        "<p>The same requests twice. Latency counts from the intended arrival (open loop). "
        "α* is the best fixed α of a node on the requests it was sent, found by simulation.</p>",
        f'<div class="wide">{_table(summary)}</div>',
        _figure(
            "α and α̂ over time",
            "α is the share of the pool given to embedding rows; α̂ is what the twin takes for "
            "the best one; α follows it at a limited speed, because a move costs cached KV or "
            "rows.",
            plots.alpha_over_time(adaptive, summary["alpha_star"]),
        ),
        _figure("Hit rates", "In windows of two seconds.", plots.hit_rates(arms)),
        _figure("Latency over time", "", plots.latency_over_time(arms, slo_ms)),
        _figure(
            "Latency, all requests",
            "How many requests are slower than a given latency; the dotted line is the SLO.",
            plots.latency_distribution(arms, slo_ms),
        ),
        _figure(
            "Traffic from the host",
            "Rows copied in the background (refill) and while a request waited (misses).",
            plots.copied_bytes(arms),
        ),
        _figure(
            "Where requests went",
            "Requests per second and node, α moving.",
            plots.routed_requests(adaptive),
        ),
        _details(summary),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>HBM Partition: demo</title><style>{_CSS}</style></head><body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _head(summary: dict[str, Any]) -> str:
    machine = summary["machine"]
    what = f"scenario {summary['scenario']}" if summary["scenario"] else f"log {summary['trace']}"
    return (
        "<h1>HBM Partition: one pool, two caches</h1>"
        f'<p class="soft">{escape(what)}, seed {summary["seed"]}, {summary["nodes"]} nodes, '
        f"{summary['seconds_per_arm']:g} s per arm, on {machine['cores']} × "
        f"{escape(str(machine['cpu']))}</p>"
    )


def _tiles(summary: dict[str, Any]) -> str:
    alpha = summary["alpha"]
    failed = summary["errors"] + summary["dropped"]
    wrong = summary["mismatched_scores"] + summary["integrity_violations"]
    tiles = [
        (f"{_number(alpha['min'])} – {_number(alpha['max'])}", "range of α"),
        (str(alpha["moves"]), f"moves ({alpha['moves_up']} up, {alpha['moves_down']} down)"),
        (str(summary["requests"]), f"requests, {failed} failed or dropped"),
        (
            str(wrong),
            f"wrong scores or broken invariants ({summary['checked_scores']} scores checked)",
        ),
        (_decision(summary["decision_us"]), "per decision, under load"),
        (f"{summary['refill_bytes'] / 1e6:.1f} MB", "refilled in the background"),
    ]
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
            for value, label in tiles
        )
        + "</div>"
    )


def _table(summary: dict[str, Any]) -> str:
    head = ["regime", "arm", "n", "P50 ms", "P99 ms", "SLO met", "KV hits", "EMB hits"]
    head += ["mean α", "α̂ settled", "α*"]
    rows = []
    first_arm = next(iter(summary["arms"].values()))
    for label in [*first_arm["regimes"], "all"]:
        for number, (name, arm) in enumerate(summary["arms"].items()):
            regime = arm["all"] if label == "all" else arm["regimes"][label]
            star = summary["alpha_star"].get(label, {})
            cells = [
                label if number == 0 else "",
                arm["title"],
                str(regime["n"]),
                _number(regime["p50_ms"], 1),
                tail_text(regime),
                _percent(regime["slo_attainment"]),
                _percent(regime["kv_hit_rate"]),
                _percent(regime["emb_hit_rate"]),
                _number(regime["mean_alpha"]),
                _number(star.get("alpha_hat")) if name == "adaptive" else "",
                _number(star.get("alpha_star")) if number == 0 else "",
            ]
            kind = ' class="first"' if number == 0 else ""
            text = "".join(
                f'<td class="text">{escape(cell)}</td>'
                if place == 1
                else f"<td>{escape(cell)}</td>"
                for place, cell in enumerate(cells)
            )
            rows.append(f"<tr{kind}>{text}</tr>")
    titles = "".join(
        f"<th{' class=text' if place == 1 else ''}>{escape(title)}</th>"
        for place, title in enumerate(head)
    )
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _details(summary: dict[str, Any]) -> str:
    rows: list[tuple[str, Iterable[str]]] = []
    arms = summary["arms"].values()
    rows.append(("evicted users / rows", (_evictions(arm) for arm in arms)))
    rows.append(("extents moved", (str(arm["moved_extents"]) for arm in arms)))
    rows.append(("rows relocated by moves", (str(arm["relocated_rows"]) for arm in arms)))
    rows.append(("copied while requests waited", (_megabytes(arm) for arm in arms)))
    rows.append(("all cores busy", (_percent(arm["cpu"]["busy_share"]) for arm in arms)))
    rows.append(("time stolen by the host", (_percent(arm["cpu"]["steal_share"]) for arm in arms)))
    rows.append(("waiting for a core", (_percent(arm["cpu"]["run_queue_share"]) for arm in arms)))
    rows.append(("load generator late by, P50", (_lag(arm["load_lag_ms"]) for arm in arms)))
    head = "".join(f"<th>{escape(arm['title'])}</th>" for arm in summary["arms"].values())
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    versions = ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    return (
        f'<h2>Details</h2><div class="wide"><table><thead><tr><th></th>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="soft">{escape(versions)}</p>'
    )


def tail_text(regime: dict[str, Any]) -> str:
    """P99, or P95 marked as such where there are too few requests."""
    if "p99_ms" in regime:
        return _number(regime["p99_ms"], 1)
    return f"{_number(regime['p95_ms'], 1)} (P95)"


def _figure(title: str, text: str, svg: str) -> str:
    shown = f"<p>{escape(text)}</p>" if text else ""
    return f"<h2>{escape(title)}</h2>{shown}<figure>{svg}</figure>"


def _decision(decision: dict[str, Any]) -> str:
    return "–" if decision["p50"] is None else f"{decision['p50']:.0f} µs"


def _evictions(arm: dict[str, Any]) -> str:
    return f"{arm['evictions']['kv_users']} / {arm['evictions']['emb_rows']}"


def _megabytes(arm: dict[str, Any]) -> str:
    return f"{arm['foreground_bytes'] / 1e6:.1f} MB"


def _lag(lag: dict[str, Any]) -> str:
    return f"{_number(lag['p50_ms'], 2)} ms"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f} %"
