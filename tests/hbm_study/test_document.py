"""The document says what was seen, of every arm, and what is missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hbm_study.backends import JoblibBackend
from hbm_study.cells import Scene, Store
from hbm_study.document import write_document
from hbm_study.export import write_tables
from hbm_study.frozen import NotFrozen, check_frozen, frozen
from hbm_study.goals import judge, residual_ships
from hbm_study.results import Results
from hbm_study.run import Plan, run_suite
from hbm_study.suite import Block, Suite

ARMS = ("static-0.20", "static-0.50", "oracle-free", "oracle-paid-1.00", "twin-adapter-gate", "pid")


@pytest.fixture(scope="module")
def cells(
    workload_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    where = str(workload_file)
    fleet = ("round_robin+static-0.50", "cost_ms+static-0.50", "cost_ms+twin")
    suite = Suite(
        schema_version=1,
        description="test",
        blocks=(
            Block(workloads=(where,), loads=("0.8",), seeds=2, arms=ARMS),
            Block(workloads=(where,), loads=("0.8",), seeds=1, arms=("twin",), faults=("nan",)),
            Block(workloads=(where,), loads=("0.8",), seeds=1, arms=fleet, nodes=(2,), hot=(0.3,)),
        ),
    )
    plan, store = Plan.of(suite), Store(tmp_path_factory.mktemp("cells"))
    assert plan.left_out == {}
    assert run_suite(plan, store, cache, JoblibBackend(1), 600.0, lambda done: None) == {}
    return list(store.results(plan.cells.values()))


def _document(
    cells: list[dict[str, Any]], folder: Path, cache: Path | None = None, **options: Any
) -> str:
    path = folder / "results.md"
    told: dict[str, Any] = {
        "suite": "smoke",
        "description": "test",
        "seeds": [1, 2],
        "missing": 0,
        "left_out": {},
        "test": True,
    }
    write_document(Results(cells), path, folder / "images", cache or folder, **{**told, **options})
    return path.read_text(encoding="utf-8")


def test_every_arm_is_in_it_the_losing_ones_too(
    cells: list[dict[str, Any]], tmp_path: Path
) -> None:
    text = _document(cells, tmp_path)
    shown = (arm if arm != "oracle-paid-1.00" else "paid oracle" for arm in ARMS[1:])
    for arm in (*shown, "twin", "cost_ms+twin"):
        assert re.search(rf"^\|.*{re.escape(arm)}", text, re.MULTILINE), arm
    assert "## Faults" in text
    assert "2 nodes" not in text.split("## Several nodes")[0]
    assert "nan ±" not in text


@pytest.fixture(scope="module")
def whole(
    cells: list[dict[str, Any]], cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The document and its folder, of scenes that are shown in full: those at load 1."""
    folder = tmp_path_factory.mktemp("document")
    moved = [{**each, "scene": {**each["scene"], "load": "1.0"}} for each in cells]
    return _document(moved, folder, cache), folder


def test_links_of_figures_lead_to_files(whole: tuple[str, Path]) -> None:
    text, folder = whole
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    # A page of the scene, α* of its regimes, nodes over hot users.
    assert len(links) == 3
    assert all((folder / link).stat().st_size > 1000 for link in links)


def test_traffic_is_described_regime_by_regime(whole: tuple[str, Path]) -> None:
    text = whole[0].split("## What traffic is like")[1]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| /")][:2]
    by_regime = {row[1]: row for row in rows}
    assert set(by_regime) == {"rows", "users"}
    revisits = {name: int(row[7].removesuffix(" %")) for name, row in by_regime.items()}
    assert revisits["users"] > revisits["rows"] + 30


def test_reasons_of_decisions_are_counted(whole: tuple[str, Path]) -> None:
    text = whole[0].split("## Decisions")[1].split("## ")[0]
    assert "α changed" in text
    assert "twin-adapter-gate" in text
    assert "false alarms" in text


def test_what_is_missing_or_no_test_is_said(cells: list[dict[str, Any]], tmp_path: Path) -> None:
    text = _document(cells, tmp_path, missing=7, test=False, left_out={"lstm": "not trained"})
    assert "7 cells are missing" in text
    assert "Not the frozen test set" in text
    assert "`lstm`: not trained" in text


def test_two_seeds_judge_no_goal(cells: list[dict[str, Any]]) -> None:
    judged = judge(Results(cells), "twin-adapter-gate")
    assert judged
    assert {each.verdict for each in judged} == {"not judged"}
    assert all(each.seen.seeds == 2 for each in judged if each.seen.seeds)


def _made(arm: str, seed: int, p99_ms: float, **scene: Any) -> dict[str, Any]:
    told = Scene("trend", "1.0", "serial", seed)._replace(**scene)
    return {
        "scene": told._asdict(),
        "arm": arm,
        "pooled": {"p99_ms": p99_ms},
        "regimes": {"a": {"anchor_error": 0.015, "anchor_distance": 0.0}},
    }


def _trend(ours: float) -> Results:
    cells = []
    for seed in range(1, 11):
        noise = 1.0 + 0.002 * seed
        for arm, value in (
            ("static-0.50", 100.0),
            ("static-0.30", 110.0),
            ("oracle-paid-1.00", 80.0),
            ("full", ours),
            ("twin-adapter-gate", 90.0),
        ):
            cells.append(_made(arm, seed, value * noise))
    return Results(cells)


@pytest.mark.parametrize(("ours", "verdict"), [(84.0, "reached"), (88.0, "missed")])
def test_seventy_percent_of_the_paying_oracle_are_asked(ours: float, verdict: str) -> None:
    judged = {each.goal: each for each in judge(_trend(ours), "full")}
    share = judged["part of the paying oracle's gain"]
    assert share.verdict == verdict
    assert share.seen.mean == pytest.approx((100.0 - ours) / 20.0)
    assert judged["not worse than α = 0.5"].verdict == "reached"
    assert judged["anchor, a"].verdict == "reached"


def test_the_residual_ships_only_when_the_interval_excludes_zero() -> None:
    assert residual_ships(_trend(85.0), "full", "twin-adapter-gate")[0]
    assert not residual_ships(_trend(90.0), "full", "twin-adapter-gate")[0]
    assert not residual_ships(_trend(95.0), "full", "twin-adapter-gate")[0]


def test_tables_for_others_hold_a_row_per_regime(
    cells: list[dict[str, Any]], tmp_path: Path
) -> None:
    import pyarrow.parquet as parquet

    write_tables(cells, tmp_path)
    table = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert len(table) == sum(1 + len(each["regimes"]) for each in cells)
    pooled = [row for row in table if row["regime"] == "" and row["arm"] == "pid"]
    assert {row["seed"] for row in pooled} == {1, 2}
    assert all(row["p99_ms"] > 0.0 for row in pooled)


def test_the_frozen_scenarios_are_the_shipped_ones() -> None:
    check_frozen(frozen().workloads, [1, 20])


def test_another_content_or_seed_is_no_test(workload_file: Path) -> None:
    with pytest.raises(NotFrozen, match=re.escape(str(workload_file))):
        check_frozen([str(workload_file)], [1])
    with pytest.raises(NotFrozen, match="2001"):
        check_frozen(["trend"], [1, 2001])
