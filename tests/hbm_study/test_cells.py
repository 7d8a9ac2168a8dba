"""Cells: kept whole, found again, never taken for another; suites go on where they ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hbm_study.arms import ArmError, load_arm
from hbm_study.backends import JoblibBackend, RayBackend
from hbm_study.cells import Cell, Scene, Store, cell_key
from hbm_study.evaluate import Done, config_of, evaluate, key_of
from hbm_study.fleet_cells import ROUTINGS
from hbm_study.results import BEST_STATIC, Results
from hbm_study.run import Plan, run_suite
from hbm_study.scene import SceneData
from hbm_study.suite import Block, Suite, SuiteError, load_suite
from hbm_study.summary import gate_alarms

ARMS = ("static-0.20", "static-0.50", "static-0.80", "oracle-free", "twin")


def _suite(workload: Path, seeds: int = 2) -> Suite:
    block = Block(workloads=(str(workload),), loads=("0.8",), seeds=seeds, arms=("all",))
    return Suite(schema_version=1, description="test", arm_lists={"all": ARMS}, blocks=(block,))


@pytest.mark.parametrize("name", ["smoke", "core", "paper", "full"])
def test_shipped_suites_name_known_arms_and_scenes(name: str) -> None:
    cells = load_suite(name).cells()
    assert cells
    assert len(set(cells)) == len(cells)
    for arm in {cell.arm for cell in cells}:
        config_of(arm)


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(SuiteError, match="one of: smoke, core, paper, full"):
        load_suite("huge")


def test_a_suite_of_ones_own_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    block = "{workloads: [steady], seeds: 1, arms: [twin], rate: 0.002}"
    file.write_text(f"schema_version: 1\ndescription: mine\nblocks: [{block}]\n")
    assert load_suite(str(file)).cells() == [
        Cell(Scene("steady", "1.0", "serial", 1, rate=0.002), "twin")
    ]
    file.write_text("schema_version: 1\ndescription: mine\nblocks: [{workloads: [steady]}]\n")
    with pytest.raises(SuiteError, match=r"mine.yaml: blocks.0.seeds: this key is required"):
        load_suite(str(file))


def test_no_two_workers_sweep_the_same_stream_while_there_is_another(
    workload_file: Path, tmp_path: Path
) -> None:
    plan = Plan.of(
        Suite(
            schema_version=1,
            description="test",
            blocks=(
                Block(
                    workloads=(str(workload_file),),
                    loads=("0.8", "equal"),
                    gathers=("serial", "overlap"),
                    seeds=2,
                    arms=("twin",),
                ),
            ),
        )
    )

    class Pairs:
        """Two workers that each take a job before either is done."""

        def run(self, function: Any, jobs: Iterable[Any]) -> Iterator[Any]:
            waiting = iter(jobs)
            while pair := list(islice(waiting, 2)):
                seen.append({job.scene.sweep for job in pair})
                for job in pair:
                    yield Done(job.scene, (), (), 0.0)

    seen: list[set[Scene]] = []
    run_suite(plan, Store(tmp_path), tmp_path, Pairs(), 600.0, lambda done: None)
    assert [len(sweeps) for sweeps in seen] == [2, 2, 2, 2]


def test_the_named_baselines_hold_one_split(data: SceneData) -> None:
    alphas = {}
    for name in ("kv-opt", "kv-emb-opt"):
        result, ticks = evaluate(data, name, load_arm(name))
        assert ticks is None
        assert result["moves"] == 0
        alphas[name] = result["alpha_mean"]
    assert alphas["kv-opt"] == pytest.approx(data.spec.info.alpha_min, abs=0.01)
    best = data.best["rows"].by_service.alpha
    assert alphas["kv-emb-opt"] == pytest.approx(best, abs=1.0 / data.spec.info.extents)


@pytest.mark.parametrize("name", [f"{routing}+static-0.50" for routing in ROUTINGS])
def test_every_routing_serves_all_requests(scene: Scene, cache: Path, name: str) -> None:
    fleet = scene._replace(nodes=2, requests=150)
    result, ticks = evaluate(SceneData(fleet, cache), name, config_of(name))
    assert ticks is None
    assert result["pooled"]["requests"] == 300
    assert result["pooled"]["refused"] == 0


@pytest.mark.parametrize("arm", ["kv-emb-opt", "twin-adapter", "pid"])
def test_what_needs_more_than_readings_is_refused_on_fleets(arm: str) -> None:
    with pytest.raises(ArmError, match="on fleets run"):
        config_of(f"cost_ms+{arm}")


def test_first_seeds_of_everything_come_first() -> None:
    seeds = [cell.scene.seed for cell in load_suite("paper").cells()]
    assert seeds == sorted(seeds)


def test_a_key_changes_with_all_that_a_result_depends_on() -> None:
    cell = Cell(Scene("a", "1.0", "serial", 1), "pid")
    keys = {
        cell_key(cell, "w", {"p": 1}),
        cell_key(cell, "v", {"p": 1}),
        cell_key(cell, "w", {"p": 2}),
        cell_key(cell._replace(scene=cell.scene._replace(seed=2)), "w", {"p": 1}),
        cell_key(cell._replace(arm="twin"), "w", {"p": 1}),
    }
    assert len(keys) == 5


def test_a_model_that_was_trained_anew_is_another_arm(tmp_path: Path) -> None:
    model, arm = tmp_path / "m.json", tmp_path / "mine.yaml"
    arm.write_text(f"kind: xgboost\ndescription: mine\nmodel: {model}\n")
    cell = Cell(Scene("a", "1.0", "serial", 1), str(arm))
    keys = []
    for content in (b"one", b"two", b"one"):
        model.write_bytes(content)
        keys.append(key_of(cell, "w"))
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]


def test_a_cell_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("k", {"a": 1.5, "b": [math.nan]}, {"time_s": [0.25, 0.5]})
    assert store.load("k") == {"a": 1.5, "b": [None]}
    ticks = store.ticks("k")
    assert ticks is not None
    assert ticks["time_s"].tolist() == [0.25, 0.5]
    with pytest.raises(KeyError):
        store.load("other")


def test_a_suite_without_time_runs_nothing_and_goes_on_later(
    workload_file: Path, tmp_path: Path, cache: Path
) -> None:
    plan, store = Plan.of(_suite(workload_file)), Store(tmp_path)
    backend = JoblibBackend(1)
    left = run_suite(plan, store, cache, backend, 0.0, lambda done: None)
    assert len(left) == len(plan.cells) == 2 * len(ARMS)
    seen: list[str] = []
    left = run_suite(plan, store, cache, backend, 600.0, lambda done: seen.extend(done.finished))
    assert left == {}
    assert len(seen) == len(plan.cells)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert run_suite(plan, store, cache, backend, 600.0, lambda done: None) == {}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == written


def test_worker_processes_finish_the_same_cells(
    workload_file: Path, tmp_path: Path, cache: Path
) -> None:
    plan = Plan.of(_suite(workload_file))
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    run_suite(plan, one, cache, JoblibBackend(1), 600.0, lambda done: None)
    run_suite(plan, two, cache, JoblibBackend(2), 600.0, lambda done: None)
    for key in plan.cells.values():
        first, second = one.load(key), two.load(key)
        first.pop("seconds")
        second.pop("seconds")
        assert first == second


def test_ray_finishes_the_same_cells(workload_file: Path, tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("ray", reason="hbm-partition[ray] is not installed")
    plan = Plan.of(_suite(workload_file))
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    run_suite(plan, one, cache, JoblibBackend(1), 600.0, lambda done: None)
    assert run_suite(plan, two, cache, RayBackend(2), 600.0, lambda done: None) == {}
    for key in plan.cells.values():
        first, second = one.load(key), two.load(key)
        first.pop("seconds")
        second.pop("seconds")
        assert first == second


def test_curves_and_statics_from_the_cache_are_those_that_were_computed(
    scene: Scene, tmp_path: Path
) -> None:
    fresh, again = SceneData(scene, tmp_path), SceneData(scene, tmp_path)
    for name in ("static-0.50", "twin-adapter-gate"):
        first, _ = evaluate(fresh, name, load_arm(name))
        second, _ = evaluate(again, name, load_arm(name))
        assert str(first) == str(second)


def test_kept_statics_serve_another_load_and_overlap_exactly(scene: Scene, tmp_path: Path) -> None:
    SceneData(scene, tmp_path).static(0.5)
    other = scene._replace(load="1.1", gather="overlap")
    kept = SceneData(other, tmp_path).static(0.5)
    fresh = SceneData(other, tmp_path / "empty").static(0.5)
    assert kept.latency_ms == pytest.approx(fresh.latency_ms)
    assert kept.service_ms == pytest.approx(fresh.service_ms)


def test_figures_are_over_offered_requests(data: SceneData) -> None:
    result, ticks = evaluate(data, "twin", load_arm("twin"))
    counted = int(data.stream.counted.sum())
    assert result["pooled"]["requests"] == counted
    assert sum(each["requests"] for each in result["regimes"].values()) == counted
    assert sum(result["latency_histogram"]) == counted - result["pooled"]["refused"]
    assert ticks is not None
    assert len(ticks["alpha"]) == len(ticks["time_s"])


def test_a_restarted_server_costs_a_static_split_too(data: SceneData, cache: Path) -> None:
    restarted = SceneData(data.scene._replace(fault="restart"), cache)
    whole, _ = evaluate(data, "static-0.50", load_arm("static-0.50"))
    hurt, ticks = evaluate(restarted, "static-0.50", load_arm("static-0.50"))
    assert hurt["pooled"]["service_ms"] > whole["pooled"]["service_ms"]
    assert ticks is not None
    assert len(set(ticks["target"].tolist())) == 1


def test_no_static_beats_the_free_oracle_in_mean_service(data: SceneData) -> None:
    oracle, _ = evaluate(data, "oracle-free", load_arm("oracle-free"))
    for name in ("static-0.20", "static-0.50", "static-0.80"):
        static, _ = evaluate(data, name, load_arm(name))
        assert static["pooled"]["service_ms"] >= oracle["pooled"]["service_ms"] * 0.999
        assert static["regret"] >= -0.001


def test_the_best_static_is_chosen_over_all_shared_seeds() -> None:
    def cell(arm: str, seed: int, p99_ms: float) -> dict[str, object]:
        scene = Scene("w", "1.0", "serial", seed)
        return {"scene": scene._asdict(), "arm": arm, "pooled": {"p99_ms": p99_ms}, "regimes": {}}

    cells = [
        cell("static-0.20", 1, 10.0),
        cell("static-0.20", 2, 40.0),
        cell("static-0.50", 1, 12.0),
        cell("static-0.50", 2, 30.0),
        cell("twin", 1, 11.0),
        cell("twin", 2, 27.0),
    ]
    results = Results(cells)
    scene = results.scenes[0]
    assert results.resolve(scene, BEST_STATIC) == "static-0.50"
    seen = results.against(scene, "twin", BEST_STATIC)
    assert seen.seeds == 2
    assert seen.mean == pytest.approx((11.0 / 12.0 + 27.0 / 30.0) / 2.0 - 1.0)


def test_the_first_alarm_after_a_change_detects_it_and_others_are_false(data: SceneData) -> None:
    stream = data.stream
    change_s = float(stream.arrival_s[stream.warm_up + 500])
    time_s = np.array(
        [change_s - 3.0, change_s - 2.0, change_s + 1.0, change_s + 2.0, change_s + 3.0]
    )
    early = gate_alarms(data, time_s, np.array([False, True, False, True, False]))
    assert early["delay_s"] == pytest.approx(2.0)
    assert (early["detected"], early["false"], early["changes"]) == (1, 1, 1)
    never = gate_alarms(data, time_s, np.zeros(5, np.bool_))
    assert never == {"openings": 0, "changes": 1, "detected": 0, "delay_s": 0, "false": 0}


def test_where_traffic_never_changes_every_alarm_is_false(scene: Scene, cache: Path) -> None:
    steady = SceneData(scene._replace(requests=300), cache)
    seen = gate_alarms(steady, np.arange(4.0), np.array([False, True, False, True]))
    assert (seen["changes"], seen["detected"], seen["false"]) == (0, 0, 2)
