from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import orjson
import pytest
from hbm_demo import check, live, outcome
from hbm_demo.arm import ArmResult
from hbm_demo.report import render
from hbm_demo.score_check import ScoreCheck
from hbm_demo.settings import DemoSettings
from hbm_demo.summary import percentiles, regime_at, summarise
from hbm_demo.system import ADAPTIVE
from rich.console import Console

SETTINGS = DemoSettings()


@pytest.fixture
def summary(arms: list[ArmResult], optima) -> dict:
    made = summarise(SETTINGS, arms, optima, ScoreCheck(38, 0, 1e-7, ""), 50.0, 200.0)
    return json.loads(orjson.dumps(made))


def test_every_promised_field_is_there(summary: dict, arms: list[ArmResult]) -> None:
    count = len(arms[0].records)
    assert summary["requests"] == 2 * count
    assert (summary["errors"], summary["dropped"]) == (2, 2)
    assert summary["mismatched_scores"] == summary["integrity_violations"] == 0
    assert summary["seed"] == 1
    assert {"torch", "numpy", "hbm-partition"} <= summary["versions"].keys()
    steady = summary["arms"]["adaptive"]["regimes"]["steady"]
    # One error and one drop among the requests of the first regime: both miss the SLO.
    assert steady["n"] == steady["offered"] - 2 >= 1000
    assert steady["slo_attainment"] == pytest.approx(1 - 2 / steady["offered"])
    assert "p95_ms" not in steady
    assert 0 < steady["p50_ms"] < steady["p99_ms"]
    assert steady["kv_hit_rate"] == pytest.approx(0.25, abs=0.01)
    assert steady["emb_hit_rate"] == pytest.approx(0.75)
    # gather 4, compute 2, service 5 of each: 1 of 4 is hidden.
    assert steady["overlap"] == pytest.approx(0.25)
    assert summary["arms"]["fixed"]["regimes"]["trend"]["mean_alpha"] == 0.5
    assert summary["decision_us"] == {"n": 1200, "p50": 299.5, "p99": pytest.approx(593, abs=1)}
    assert summary["refill_bytes"] > 0


def test_moves_that_were_not_commanded_do_not_count(arms: list[ArmResult], optima) -> None:
    """A ramp is one move; in mode recommend, or while α is held, none is carried out."""
    decisions = {node: each.copy() for node, each in arms[0].decisions.items()}
    decisions["node-0"]["generation"][200:] = 0  # the move down is only recommended
    arm = arms[0]._replace(decisions=decisions)
    made = summarise(SETTINGS, [arm], optima, ScoreCheck(38, 0, 1e-7, ""), 50.0, 200.0)
    assert made["alpha"] == {"min": 0.2, "max": 0.8, "moves": 3, "moves_up": 2, "moves_down": 1}


def test_alpha_and_its_moves_are_counted_per_node(summary: dict) -> None:
    assert summary["alpha"] == {"min": 0.2, "max": 0.8, "moves": 4, "moves_up": 2, "moves_down": 2}
    assert summary["arms"]["fixed"]["alpha"]["moves"] == 0


def test_settled_anchor_stands_beside_the_optimum(summary: dict) -> None:
    found = summary["alpha_star"]
    assert found["steady"]["alpha_hat"] == pytest.approx(0.8)
    assert found["steady"]["distance"] == pytest.approx(0.0, abs=1e-9)
    assert found["burst"]["alpha_hat"] == pytest.approx(0.2)
    assert found["trend"]["nodes"]["node-1"]["alpha_star"] == 0.25
    # The settled half of the trend lies behind the jump from 0.8 to 0.2.
    assert found["trend"]["distance"] == pytest.approx(0.05, abs=0.02)
    assert found["trend"]["plateau_distance"] == pytest.approx(0.0, abs=0.02)
    assert summary["alpha_star_shift"] == pytest.approx(0.6)


def test_few_requests_get_no_p99() -> None:
    values = np.arange(999.0)
    assert set(percentiles(values)) == {"n", "p50_ms", "p95_ms"}
    assert set(percentiles(np.arange(1000.0))) == {"n", "p50_ms", "p99_ms"}
    assert percentiles(np.array([np.nan])) == {"n": 0, "p50_ms": None, "p95_ms": None}


def test_samples_belong_to_the_regime_of_the_newest_request(arms: list[ArmResult]) -> None:
    records = arms[0].records
    times = np.array([-1.0, 1.0, 40.0, 80.0, 1e6])
    assert regime_at(records, times).tolist() == [-1, 0, 1, 2, -1]


def test_a_restarted_server_counts_from_zero(arms: list[ArmResult], optima) -> None:
    first = arms[0]
    half = len(first.samples) // 2
    lost = first.samples[half].counters["refill_bytes"]
    restarted = [
        *first.samples[:half],
        *(
            sample._replace(
                counters={name: max(0.0, count - lost) for name, count in sample.counters.items()}
            )
            for sample in first.samples[half:]
        ),
    ]
    made = summarise(
        SETTINGS,
        [first._replace(samples=restarted), arms[1]],
        optima,
        ScoreCheck(1, 0, 0.0, ""),
        50.0,
        1.0,
    )
    whole = summarise(SETTINGS, arms, optima, ScoreCheck(1, 0, 0.0, ""), 50.0, 1.0)
    assert made["refill_bytes"] == pytest.approx(whole["refill_bytes"], rel=0.01)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            # Names of XML vocabularies look like addresses and are never fetched.
            if name.startswith("xmlns") or value is None:
                continue
            if name in ("src", "href", "xlink:href", "data", "action", "poster"):
                self.addresses.append(value)
            self.addresses += re.findall(r"https?://\S+|url\((?!#)[^)]*\)", value)


def test_the_report_needs_nothing_else(summary: dict, arms: list[ArmResult]) -> None:
    text = render(summary, arms, 50.0)
    page = _Page()
    page.feed(text)
    assert [address for address in page.addresses if not address.startswith("#")] == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "@import" not in text
    assert page.tags.count("svg") == 6
    assert "viewport" in text
    assert len(text.encode()) < 5_000_000
    for label in ("steady", "trend", "burst"):
        assert label in text


def test_the_report_of_one_arm_and_of_no_answers(summary: dict, arms: list[ArmResult]) -> None:
    only = dict(summary, arms={"adaptive": summary["arms"]["adaptive"]}, alpha_star={})
    assert "<svg" in render(only, arms[:1], 50.0)


def test_a_good_summary_passes_and_each_fault_is_named(summary: dict, tmp_path: Path) -> None:
    good = json.loads(json.dumps(summary))
    for arm in good["arms"].values():
        arm["errors"] = arm["dropped"] = 0
    good["errors"] = good["dropped"] = 0
    assert list(check.problems(good)) == []
    faults = {
        "mismatched_scores is 1": lambda s: s.update(mismatched_scores=1),
        "errors is 3": lambda s: s.update(errors=3),
        "no score was checked": lambda s: s.update(checked_scores=0),
        "kv_users is 0": lambda s: s["evictions"].update(kv_users=0),
        "moves_down is 0": lambda s: s["alpha"].update(moves_down=0),
        "less than 0.2": lambda s: s.update(alpha_star_shift=0.1),
        "burst: the settled": lambda s: s["alpha_star"]["burst"].update(distance=0.11),
        "fields are missing: versions": lambda s: s.pop("versions"),
        "adaptive/trend: without kv_hit_rate": lambda s: s["arms"]["adaptive"]["regimes"][
            "trend"
        ].update(kv_hit_rate=None),
    }
    for said, damage in faults.items():
        bad = json.loads(json.dumps(good))
        damage(bad)
        assert any(said in problem for problem in check.problems(bad)), said
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(good))
    assert check.main([str(path)]) == 0
    path.write_text("{}")
    assert check.main([str(path)]) == 1
    path.write_text("{")
    assert check.main([str(path)]) == 2


def test_the_table_fits_a_terminal_of_80_columns(summary: dict) -> None:
    console = Console(width=80, record=True)
    outcome.show(console, summary, Path("out/demo"))
    text = console.export_text()
    assert "…" not in text
    for word in ("steady", "trend", "burst", "adaptive", "fixed", "report.html"):
        assert word in text


def test_sidecars_that_decided_nothing_are_told_of(summary: dict) -> None:
    """Theirs restart by themselves, so the demo ends well: it must not look as if α had held."""
    console = Console(width=80, record=True)
    outcome.show(console, summary, Path("out/demo"))
    assert "no decision was taken" not in console.export_text()
    summary["decision_us"] = {"n": 0, "p50": None, "p95": None}
    outcome.show(console, summary, Path("out/demo"))
    assert "read out/demo/logs/adaptive/*-sidecar.log" in console.export_text()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_live_view_shows_the_state(arms: list[ArmResult], terminal: bool) -> None:
    console = Console(width=100, force_terminal=terminal, record=True)
    progress = {
        "total": 100,
        "finished": 40,
        "in_flight": 3,
        "errors": 0,
        "dropped": 0,
        "regime": "trend",
        "window_n": 40,
        "p50_ms": 5.25,
        "tail_ms": 17.5,
        "tail_percentile": 95,
        "slo_attainment": 0.975,
        "kv_hit_rate": None,
        "emb_hit_rate": 0.5,
        "nodes": {"node-0": 22, "node-1": 18},
    }
    view = live.LiveView(console)
    view.say("starting")
    view.update(ADAPTIVE, None, [])
    view.update(ADAPTIVE, progress, arms[0].samples[200:202])
    view.close()
    shown = console.export_text()
    for word in ("trend", "40/100", "5.2 ms", "P95", "17.5 ms", "97.5", "0.80", "22", "18"):
        assert word in shown, word


def test_sparkline() -> None:
    assert live.sparkline([0.0, 0.5, 1.0, 7.0, -1.0]) == "▁▅██▁"
