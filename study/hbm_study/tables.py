"""The tables of the results document, from finished cells. Markdown, one function per question."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from hbm_sim.describe import RegimeCharacter

from hbm_study.cells import Scene
from hbm_study.goals import Judged, judge, residual_ships
from hbm_study.results import (
    BEST_PAID,
    BEST_STATIC,
    STATIC,
    Metric,
    Results,
    of_regime,
    p99,
    pooled,
    whole,
)
from hbm_study.statistics import Interval
from hbm_study.summary import STEP_EDGES

HEAD = tuple[str, ...]
FLEET_REFERENCE = "round_robin+static-0.50"
OURS = ("twin", "twin-adapter", "twin-adapter-gate", "drop", "defaults", "full")
SYSTEMS = ("kv-opt", "kv-emb-opt")
_SHOWN_STATICS = ("static-0.10", "static-0.30", "static-0.50", "static-0.70", "static-0.90")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; empty when there is no row."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines])


def percent(seen: Interval, digits: int = 1) -> str:
    """`−12.3 % [−14.0, −10.1]`; a dash for nothing."""
    if not seen.seeds or math.isnan(seen.mean):
        return "–"
    mean = f"{100.0 * seen.mean:+.{digits}f} %"
    if math.isnan(seen.low):
        return f"{mean} (one seed)"
    return f"{mean} [{100.0 * seen.low:+.{digits}f}, {100.0 * seen.high:+.{digits}f}]"


def number(seen: Interval, digits: int = 2, unit: str = "") -> str:
    """`12.34 ± 0.20`, half the width of the interval behind the sign; one seed has none."""
    if not seen.seeds or math.isnan(seen.mean):
        return "–"
    if math.isnan(seen.low):
        return f"{seen.mean:.{digits}f}{unit}"
    half = (seen.high - seen.low) / 2.0
    return f"{seen.mean:.{digits}f}{unit} ± {half:.{digits}f}"


def scene_name(scene: Scene) -> str:
    """`trend, load 1.0, serial`."""
    load = "equal QPS" if scene.load == "equal" else f"load {scene.load}"
    parts = [scene.workload, load, scene.gather]
    if scene.fault:
        parts.append(scene.fault)
    if scene.nodes > 1:
        parts.append(f"{scene.nodes} nodes")
    if scene.hot is not None:
        parts.append(f"{100 * scene.hot:.0f} % hot users")
    if scene.requests is not None:
        parts.append(f"first {scene.requests:,} requests")
    return ", ".join(parts)


def ordered(results: Results, scene: Scene) -> list[str]:
    """Arms as tables show them: hindsight first, statics, ours, then everybody else."""
    arms = results.arms(scene)
    ours = [a for a in (*SYSTEMS, *OURS) if a in arms]
    hindsight = [BEST_STATIC, BEST_PAID, *(a for a in arms if a == "oracle-free")]
    statics = [a for a in _SHOWN_STATICS if a in arms]
    taken = {*ours, *hindsight, *statics}
    rest = [
        a for a in arms if a not in taken and not a.startswith((STATIC, "oracle-", "ablation-"))
    ]
    return [a for a in (*hindsight, *statics, *ours, *rest) if results.cells(scene, a)]


def arms_table(results: Results, scene: Scene) -> str:
    """Every arm on one scene: P99, SLO, service, α, moves."""
    rows = []
    for arm in ordered(results, scene):
        behind = results.resolve(scene, arm)
        name = arm if behind == arm else f"{arm} ({behind})"
        rows.append(
            [
                name,
                number(results.mean(scene, arm, p99), 1),
                percent(results.against(scene, arm, BEST_STATIC)),
                percent(results.against(scene, arm, "static-0.50")),
                number(results.mean(scene, arm, pooled("slo")).scaled(100.0), 2),
                number(results.mean(scene, arm, pooled("service_ms")), 3),
                number(results.mean(scene, arm, whole("regret")).scaled(100.0), 2),
                number(results.mean(scene, arm, whole("moved_bytes")).scaled(1e-9), 1),
                number(results.mean(scene, arm, whole("refill_bytes")).scaled(1e-9), 1),
                str(results.mean(scene, arm, p99).seeds),
            ]
        )
    head = (
        "arm",
        "P99, ms",
        "P99 against best static",
        "against α = 0.5",
        "SLO met, %",
        "service, ms",
        "regret, %",
        "moved, GB",
        "refilled, GB",
        "seeds",
    )
    return table(head, rows)


def regimes(results: Results, scene: Scene) -> list[str]:
    """Names of the regimes of a scene, in order of first appearance."""
    names: dict[str, None] = {}
    for arm in results.arms(scene):
        for cell in results.cells(scene, arm).values():
            for name in cell["regimes"]:
                names.setdefault(name)
    return list(names)


def accuracy_table(results: Results, scene: Scene) -> str:
    """Shape of the paper's Table III: per arm and regime |α̂ − α*|, |α − α*| and regret."""
    rows = []
    names = regimes(results, scene)
    for arm in ordered(results, scene):
        cells = [arm if results.resolve(scene, arm) == arm else str(results.resolve(scene, arm))]
        for regime in names:
            applied = results.mean(scene, arm, of_regime(regime, "applied_error"))
            anchor = results.mean(scene, arm, of_regime(regime, "anchor_error"))
            regret = results.mean(scene, arm, of_regime(regime, "regret")).scaled(100.0)
            anchor_text = "–" if math.isnan(anchor.mean) else f"{anchor.mean:.3f}"
            cells.append(f"{anchor_text} / {applied.mean:.3f} / {regret.mean:+.2f} %")
        rows.append(cells)
    return table(("arm", *(f"{name}: α̂ / α / regret" for name in names)), rows)


def optima_table(results: Results, scene: Scene) -> str:
    """α* of each regime by both criteria, with the plateau."""
    arms = results.arms(scene)
    if not arms:
        return ""
    rows = []
    for regime in regimes(results, scene):

        def mean(name: str, regime: str = regime) -> float:
            return results.mean(scene, arms[0], of_regime(regime, name)).mean

        requests = [
            cell["regimes"][regime]["requests"]
            for cell in results.cells(scene, arms[0]).values()
            if regime in cell["regimes"]
        ]
        rows.append(
            [
                regime,
                f"{mean('alpha_star'):.3f}",
                f"{mean('plateau_low'):.3f} to {mean('plateau_high'):.3f}",
                f"{mean('alpha_star_tail'):.3f}",
                f"{sum(requests):,}",
            ]
        )
    head = ("regime", "α* by mean service", "plateau (1 %)", "α* by P99", "requests, all seeds")
    return table(head, rows)


def tail_table(results: Results, scene: Scene, arms: Sequence[str]) -> str:
    """P99 per regime beside the pooled one."""
    names = regimes(results, scene)
    rows = []
    for arm in arms:
        if not results.cells(scene, arm):
            continue
        tails = [number(results.mean(scene, arm, of_regime(r, "p99_ms")), 1) for r in names]
        rows.append([arm, number(results.mean(scene, arm, p99), 1), *tails])
    return table(("arm", "pooled", *names), rows)


def goals_table(results: Results, arm: str) -> str:
    """Each goal on each scene, the missed ones too."""
    rows = []
    for each in judge(results, arm):
        rows.append(
            [
                each.goal + (f" ({each.note})" if each.note else ""),
                scene_name(each.scene),
                _seen(each),
                _limit(each),
                f"**{each.verdict}**" if each.verdict == "missed" else each.verdict,
                str(each.seen.seeds),
            ]
        )
    return table(("goal", "scene", "seen", "limit", "verdict", "seeds"), rows)


def _seen(judged: Judged) -> str:
    if judged.goal.startswith("anchor"):
        return number(judged.seen, 3)
    return percent(judged.seen)


def _limit(judged: Judged) -> str:
    if judged.goal.startswith("anchor"):
        return f"≤ {judged.limit}"
    sign = "≥" if judged.goal.startswith("part") else "≤"
    return f"{sign} {100.0 * judged.limit:+.0f} %"


def comparison_table(
    results: Results, scenes: Iterable[Scene], arms: Sequence[str], metric: Metric = p99
) -> str:
    """One row per scene, one column per arm: the difference to the best static α."""
    rows = []
    for scene in scenes:
        seen = [percent(results.against(scene, arm, BEST_STATIC, metric)) for arm in arms]
        if any(text != "–" for text in seen):
            best = results.resolve(scene, BEST_STATIC) or ""
            rows.append([scene_name(scene), best.removeprefix(STATIC), *seen])
    return table(("scene", "best static", *arms), rows)


def refill_table(results: Results, scenes: Iterable[Scene], arms: Sequence[str]) -> str:
    """Bytes copied in the background, and how many of the requests' copies waited for them."""
    rows = []
    for scene in scenes:
        for arm in arms:
            if not results.cells(scene, arm):
                continue
            critical = results.mean(scene, arm, whole("critical_share")).scaled(100.0)
            rows.append(
                [
                    scene_name(scene),
                    arm,
                    number(results.mean(scene, arm, whole("moves")), 1),
                    number(results.mean(scene, arm, whole("moved_bytes")).scaled(1e-9), 1),
                    number(results.mean(scene, arm, whole("refill_bytes")).scaled(1e-9), 1),
                    number(results.mean(scene, arm, whole("foreground_bytes")).scaled(1e-9), 0),
                    number(critical, 2),
                    percent(results.against(scene, arm, BEST_STATIC)),
                ]
            )
    head = (
        "scene",
        "arm",
        "moves",
        "moved, GB",
        "refilled, GB",
        "missed rows, GB",
        "copies that waited for refill, %",
        "P99 against best static",
    )
    return table(head, rows)


def fleet_table(results: Results) -> str:
    """Routing policies on several nodes, against round robin with α = 0.5."""
    rows = []
    for scene in results.scenes:
        if scene.nodes == 1:
            continue
        for arm in results.arms(scene):
            slo = results.mean(scene, arm, pooled("slo")).scaled(100.0)
            hits = results.mean(scene, arm, pooled("kv_hit")).scaled(100.0)
            rows.append(
                [
                    str(scene.nodes),
                    "–" if scene.hot is None else f"{100 * scene.hot:.0f} %",
                    scene.workload,
                    arm,
                    number(results.mean(scene, arm, p99), 1),
                    percent(results.against(scene, arm, FLEET_REFERENCE)),
                    number(slo, 2),
                    number(hits, 1),
                    number(results.mean(scene, arm, whole("busiest_node")), 2),
                ]
            )
    head = (
        "nodes",
        "hot users",
        "workload",
        "routing + arm",
        "P99, ms",
        "against round robin",
        "SLO met, %",
        "KV hit, %",
        "busiest ÷ mean",
    )
    return table(head, rows)


def reasons_table(results: Results, scenes: Iterable[Scene], arms: Sequence[str]) -> str:
    """How many decisions gave each reason, in per cent; a decision may give several."""
    rows, names = [], dict[str, None]()
    shares: list[tuple[Scene, str, dict[str, float], float]] = []
    for scene in scenes:
        for arm in arms:
            cells = results.cells(scene, arm).values()
            decisions = sum(cell["decisions"] for cell in cells)
            if not decisions:
                continue
            counts: dict[str, float] = {}
            for cell in cells:
                for name, count in cell["reasons"].items():
                    counts[name] = counts.get(name, 0) + 100.0 * count / decisions
            names |= dict.fromkeys(counts)
            still = len(STEP_EDGES) // 2
            moved = sum(sum(cell["alpha_steps"]) - cell["alpha_steps"][still] for cell in cells)
            shares.append((scene, arm, counts, 100.0 * moved / decisions))
    for scene, arm, counts, moved in shares:
        told = [f"{counts[name]:.1f}" if name in counts else "–" for name in names]
        rows.append([scene_name(scene), arm, f"{moved:.1f}", *told])
    said = (name.lower().replace("_", " ") for name in names)
    return table(("scene", "arm", "α changed", *said), rows)


def gate_table(results: Results, scenes: Iterable[Scene], arm: str) -> str:
    """Detections and false alarms of the burst gate, all seeds of a scene together."""
    rows = []
    for scene in scenes:
        cells = [cell for cell in results.cells(scene, arm).values() if "gate" in cell]
        if not cells:
            continue
        sums = {name: sum(cell["gate"][name] for cell in cells) for name in cells[0]["gate"]}
        hours = sum(cell["hours"] for cell in cells)
        delay = f"{sums['delay_s'] / sums['detected']:.1f}" if sums["detected"] else "–"
        rows.append(
            [
                scene_name(scene),
                str(sums["changes"]),
                str(sums["detected"]),
                delay,
                str(sums["false"]),
                f"{sums['false'] / hours:.1f}",
                f"{hours:.2f}",
            ]
        )
    head = (
        "scene",
        "changes of regime",
        "detected",
        "mean delay, s",
        "false alarms",
        "per hour",
        "hours",
    )
    return table(head, rows)


def characters_table(characters: Iterable[tuple[str, RegimeCharacter]]) -> str:
    """What traffic is like, regime by regime."""
    rows = []
    for workload, each in characters:
        best = each.optimum.by_service
        hits = each.optimum.kv_hit_ratio
        misses = each.optimum.emb_miss_ratio
        rows.append(
            [
                workload,
                each.regime,
                f"{best.alpha:.3f}",
                f"{best.plateau_low:.2f} to {best.plateau_high:.2f}",
                f"{each.per_s:.0f}",
                f"{each.dispersion:.2f}",
                f"{each.history_median:,.0f}",
                f"{100 * each.revisit_share:.0f} %",
                f"{100 * each.hot_user_share:.0f} %",
                f"{100 * each.row_shares['1.0%']:.0f} %",
                f"{100 * hits[-1]:.0f} to {100 * hits[0]:.0f} %",
                f"{100 * misses[0]:.0f} to {100 * misses[-1]:.0f} %",
            ]
        )
    head = (
        "workload",
        "regime",
        "α*",
        "within 1 %",
        "requests/s at load 1",
        "dispersion",
        "history, median",
        "revisits",
        "requests of the top 1 % of users",
        "lookups of the top 1 % of rows",
        "KV hits, α .9 to .1",
        "row misses, α .1 to .9",
    )
    return table(head, rows)


def residual_sentence(results: Results) -> str:
    """What the shipping rule says, as far as seeds allow."""
    ships, seen = residual_ships(results, "full", "twin-adapter-gate")
    if not seen.seeds:
        return "No learned residual has been evaluated."
    said = f"P99 of the full stack against the stack without residual: {percent(seen, 2)}"
    end = "the interval lies below 0: it may ship" if ships else "its gain ships as 0"
    count = f"{seen.seeds} seed{'s' if seen.seeds > 1 else ''}"
    return f"{said}, {count}, all scenes without faults; {end}."
