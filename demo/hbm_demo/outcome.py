"""The result on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show(console: Console, summary: dict[str, Any], out: Path) -> None:
    """The table of both arms, what was checked, and where to read on."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("regime", "arm"):
        table.add_column(heading, no_wrap=True)
    for heading in ("n", "P50 ms", "P99 ms", "SLO", "KV", "EMB", "α", "α̂", "α*"):
        table.add_column(heading, justify="right", no_wrap=True)
    labels = list(next(iter(summary["arms"].values()))["regimes"])
    for label in labels:
        star = summary["alpha_star"].get(label, {})
        for number, (name, arm) in enumerate(summary["arms"].items()):
            regime = arm["regimes"][label]
            table.add_row(
                label if number == 0 else "",
                name,
                str(regime["n"]),
                _number(regime["p50_ms"], 1),
                _tail(regime),
                _percent(regime["slo_attainment"]),
                _percent(regime["kv_hit_rate"]),
                _percent(regime["emb_hit_rate"]),
                _number(regime["mean_alpha"]),
                _number(star.get("alpha_hat")) if name == "adaptive" else "",
                _number(star.get("alpha_star")) if number == 0 else "",
                end_section=number == len(summary["arms"]) - 1,
            )
    console.print(table)
    if any(_short(arm) for arm in summary["arms"].values()):
        console.print("* P95: P99 needs 1,000 requests", style="dim", highlight=False)
    alpha, decision = summary["alpha"], summary["decision_us"]
    if decision["n"] == 0:
        logs = out / "logs" / "adaptive"
        console.print(
            f"no decision was taken, so α could not move: read {logs}/*-sidecar.log",
            style="bold red",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"α between {_number(alpha['min'])} and {_number(alpha['max'])} in {alpha['moves']} moves; "
        f"α* shifts by {_number(summary['alpha_star_shift'])}; a decision took "
        f"{_number(decision['p50'], 0)} µs (P50 of {decision['n']}, under load)",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"{summary['requests']} requests, {summary['errors']} errors, "
        f"{summary['dropped']} dropped; "
        f"{summary['mismatched_scores']} of {summary['checked_scores']} checked scores differ; "
        f"{summary['integrity_violations']} broken invariants",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"{out / 'report.html'}  {out / 'summary.json'}", highlight=False, soft_wrap=True)


def _tail(regime: dict[str, Any]) -> str:
    if "p99_ms" in regime:
        return _number(regime["p99_ms"], 1)
    return f"{_number(regime['p95_ms'], 1)}*"


def _short(arm: dict[str, Any]) -> bool:
    return any("p95_ms" in regime for regime in arm["regimes"].values())


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f}%"
