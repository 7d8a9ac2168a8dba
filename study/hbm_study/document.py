"""The results document, written from finished cells: every number in it has its seeds."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from hbm_study import tables
from hbm_study.arms import load_arm
from hbm_study.cells import Scene
from hbm_study.characters import characters
from hbm_study.figures import draw_map, draw_optima, draw_scene
from hbm_study.goals import CONTROLS, DATA_SETS, OUT_OF_DISTRIBUTION, STRESS
from hbm_study.results import BEST_PAID, BEST_STATIC, Results, p99, pooled
from hbm_study.statistics import FIGURE_SEEDS, GOAL_SEEDS

_LAYERS: Final = (BEST_PAID, "oracle-free", *tables.OURS)
_SYSTEM: Final = (
    "static-0.50",
    *tables.SYSTEMS,
    "twin-adapter-gate",
    "full",
    "ablation-shield",
    "ablation-refill",
    "ablation-throttle",
)
_OTHERS: Final = ("pid", "climb", "bayes", "xgboost", "lstm", "ppo", "paper", "twin-adapter-gate")
_FAULTS: Final = ("static-0.50", "twin", "twin-adapter", "twin-adapter-gate", "full")
_DECIDERS: Final = ("twin-adapter-gate", "full")
_MAPS: Final = tuple(
    (f"{routing}+static-0.50", tables.FLEET_REFERENCE) for routing in ("cost_ms", "chwbl", "oracle")
)
_ORDER: Final = (*STRESS, *CONTROLS, *DATA_SETS, *OUT_OF_DISTRIBUTION)


def write_document(
    results: Results,
    path: Path,
    figures: Path,
    cache: Path,
    *,
    suite: str,
    description: str,
    seeds: Sequence[int],
    missing: int,
    left_out: dict[str, str],
    test: bool,
    note: str = "",
) -> None:
    """Writes the Markdown file and its figures; links are relative to the file. `cache`: that of
    the run, for what streams are like."""
    parts = [
        _head(suite, description, _finished_seeds(results) or seeds, missing, left_out, test, note),
        _goals(results),
        _traffic(results, figures, cache, path),
        _comparisons(results),
        *_single(results, figures, path),
        _decisions(results),
        _faults(results),
        _refill(results),
        _fleet(results, figures, path),
        _arms(results),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _head(
    suite: str,
    description: str,
    seeds: Sequence[int],
    missing: int,
    left_out: dict[str, str],
    test: bool,
    note: str,
) -> str:
    said = [
        "# Results of the policy",
        "",
        f"Written by `hbm eval --suite {suite}` ({description}) on "
        f"{datetime.now(UTC):%Y-%m-%d} at commit {_commit()}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores of {platform.machine()}; {_seeds(seeds)}. How it "
        "is run and what each arm is: [evaluation.md](evaluation.md). Simulated nodes with the "
        "costs of the standard node, no GPU.",
        "",
        "Lower is better. Differences are means over paired seeds with bootstrap intervals of "
        "95 %; *best static* is the static α with the lowest P99 over all seeds of a scene, *paid "
        "oracle* the best part of the way of an oracle that pays for its moves, both chosen in "
        f"hindsight. Under 2 % is noise. Figures with fewer than {FIGURE_SEEDS} seeds show that "
        f"something runs, not how well; goals are judged from {GOAL_SEEDS} seeds on.",
    ]
    for arm, reason in left_out.items():
        said += ["", f"Left out: `{arm}`: {reason}."]
    if missing:
        said += ["", f"**{missing} cells are missing**: the time was over before they were run."]
    if note:
        said += ["", note]
    if not test:
        said += ["", "**Not the frozen test set**: these numbers are no evidence."]
    return "\n".join(said)


def _seeds(seeds: Sequence[int]) -> str:
    return f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"


def _finished_seeds(results: Results) -> list[int]:
    """Seeds with any finished cell: a run that was stopped has fewer than its suite."""
    arms = ((scene, arm) for scene in results.scenes for arm in results.arms(scene))
    return sorted({seed for scene, arm in arms for seed in results.cells(scene, arm)})


def _goals(results: Results) -> str:
    parts = ["## Goals", "", tables.residual_sentence(results)]
    for arm in ("twin-adapter-gate", "full"):
        text = tables.goals_table(results, arm)
        if text:
            parts += ["", f"### {arm}", "", text]
    return "\n".join(parts)


def _plain(results: Results) -> list[Scene]:
    """One node, nothing goes wrong: stress cases first, serial before overlapped."""
    order = {name: index for index, name in enumerate(_ORDER)}
    return sorted(
        (scene for scene in results.scenes if not scene.fault and scene.nodes == 1),
        key=lambda s: (s.gather != "serial", order.get(s.workload, 99), s.workload, s.load),
    )


def _shown(results: Results) -> list[Scene]:
    """The plain scene of each workload."""
    return [s for s in _plain(results) if s.load == "1.0" and s.gather == "serial"]


def _traffic(results: Results, figures: Path, cache: Path, path: Path) -> str:
    scenes = [s for s in _shown(results) if results.cells(s, BEST_STATIC)]
    if not scenes:
        return ""
    drawn = draw_optima(results, scenes, figures)
    text = tables.characters_table(characters(results, scenes, cache))
    return "\n".join(
        [
            "## What traffic is like",
            "",
            "One seed each. α* by mean service time; dispersion: variance over mean of arrivals "
            "per second, 1 for a Poisson process. KV hits and row misses: over the range of α.",
            "",
            text,
            "",
            f"![mean service time over α]({_relative(drawn, path)})",
        ]
    )


def _single(results: Results, figures: Path, path: Path) -> list[str]:
    parts = []
    for scene in _plain(results):
        if scene.load != "1.0":
            continue
        text = [
            f"## {tables.scene_name(scene)}",
            "",
            tables.optima_table(results, scene),
            "",
            tables.arms_table(results, scene),
        ]
        if scene.gather == "serial":
            accuracy = tables.accuracy_table(results, scene)
            arms = (BEST_STATIC, "static-0.50", BEST_PAID, "oracle-free", *tables.OURS, "paper")
            drawn = draw_scene(results, scene, figures)
            text += [
                "",
                "Distance of α̂ and of the applied α to α* in the settled part, and regret in "
                "mean service time over the whole regime:",
                "",
                accuracy,
                "",
                "P99 by regime, ms:",
                "",
                tables.tail_table(results, scene, arms),
                "",
                f"![{tables.scene_name(scene)}]({_relative(drawn, path)})",
            ]
        parts.append("\n".join(text))
    return parts


def _comparisons(results: Results) -> str:
    """All scenes side by side: the controls beside the stress cases, both ways of gathering."""
    scenes = _plain(results)
    parts = ["## All scenes", "", "P99 against the best static α of each scene."]
    for title, arms in (
        ("Layers of the allocator", _LAYERS),
        ("Systems, and what shield, refill and throttle are worth", _SYSTEM),
        ("Other ways of choosing α", _OTHERS),
    ):
        # The last column is for comparison: alone it is a row of another table.
        told = [s for s in scenes if any(results.cells(s, arm) for arm in arms[:-1])]
        text = tables.comparison_table(results, told, arms)
        if text:
            parts += ["", f"### {title}", "", text]
    return "\n".join(parts) if len(parts) > 3 else ""


def _decisions(results: Results) -> str:
    text = tables.reasons_table(results, _shown(results), _DECIDERS)
    said = (
        "Share of decisions, in %, that changed the commanded α, and that gave each reason. How "
        "long a decision takes is in [results.md](results.md)."
    )
    if not text:
        return ""
    gate = tables.gate_table(results, _shown(results), "twin-adapter-gate")
    heading = (
        "The burst gate: the first opening after a change of regime has detected it, every other "
        "one is a false alarm. A ramp changes its regime at each level."
    )
    return "\n\n".join(["## Decisions", said, text, heading, gate])


def _faults(results: Results) -> str:
    rows = []
    for scene in results.scenes:
        if not scene.fault:
            continue
        for arm in _FAULTS:
            if not results.cells(scene, arm):
                continue
            rows.append(
                [
                    tables.scene_name(scene),
                    arm,
                    tables.number(results.mean(scene, arm, p99), 1),
                    tables.percent(results.against(scene, arm, "static-0.50")),
                    tables.number(results.mean(scene, arm, pooled("slo")).scaled(100.0), 2),
                    str(len(results.cells(scene, arm))),
                ]
            )
    text = tables.table(("fault", "arm", "P99, ms", "against α = 0.5", "SLO met, %", "seeds"), rows)
    return f"## Faults\n\n{text}" if text else ""


def _refill(results: Results) -> str:
    scenes = [s for s in _plain(results) if s.gather == "serial"]
    text = tables.refill_table(
        results, scenes, ("twin-adapter-gate", "ablation-refill", "ablation-throttle", BEST_PAID)
    )
    return f"## Bytes moved and refilled\n\n{text}" if text else ""


def _fleet(results: Results, figures: Path, path: Path) -> str:
    text = tables.fleet_table(results)
    if not text:
        return ""
    parts = ["## Several nodes behind the router", "", text]
    mapped = [s for s in results.scenes if s.nodes > 1 and s.hot is not None]
    pairs = [pair for pair in _MAPS if any(results.against(s, *pair).seeds for s in mapped)]
    if pairs:
        drawn = draw_map(results, mapped, pairs, figures)
        parts += ["", f"![P99 over nodes and hot users]({_relative(drawn, path)})"]
    return "\n".join(parts)


def _arms(results: Results) -> str:
    names: dict[str, None] = {}
    for scene in results.scenes:
        if scene.nodes > 1:
            continue
        for arm in results.arms(scene):
            names.setdefault(arm.rstrip("0123456789.").rstrip("-"))
    rows = [[f"`{name}`", load_arm(name).description] for name in names]
    return f"## Arms\n\n{tables.table(('arm', 'what'), rows)}"


def _relative(file: Path, document: Path) -> str:
    return Path(os.path.relpath(file, document.parent)).as_posix()


def _commit() -> str:
    """The checkout's commit; `unknown` outside one."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
