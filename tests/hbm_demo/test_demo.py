"""The real demo: every process real, short runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hbm_load.scenario import load_scenario

HBM = [sys.executable, "-m", "hbm_cli.main", "demo"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seconds", "1"], "--seconds: Input should be greater than or equal to 6 (got 1.0)"),
        (["--nodes", "0"], "--nodes: Input should be greater than or equal to 1 (got 0)"),
        (["--device", "tpu"], "--device: Input should be 'auto', 'cpu' or 'cuda' (got 'tpu')"),
        (["--scenario", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--trace", "nowhere.csv"], "nowhere.csv: cannot be read"),
        (["--rate", "0"], "--rate: Input should be greater than or equal to 0.1 (got 0.0)"),
        (["--out", "/proc/nowhere"], "/proc/nowhere cannot be written to"),
        (["--seconds", "soon"], "'--seconds': Input should be a valid number"),
        (["--wrong"], "--wrong"),
    ],
)
def test_bad_input_exits_2_before_anything_starts(
    tmp_path: Path, flags: list[str], said: str
) -> None:
    flags = flags if "--out" in flags else [*flags, "--out", str(tmp_path / "out")]
    done = subprocess.run([*HBM, *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out" / "logs").exists()


def test_a_scenario_beyond_the_model_is_refused(tmp_path: Path) -> None:
    raw = load_scenario("demo").model_dump(mode="json")
    raw["catalogue"] = 200_000
    path = tmp_path / "large.yaml"
    path.write_text(json.dumps(raw))
    done = subprocess.run(
        [*HBM, "--scenario", str(path), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "has 200000 items, the demo's model 100000" in done.stderr


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("stage", "sign", "seconds"),
    [
        ("start-up", "logs/adaptive/redis.log", "60"),
        ("servers start", "logs/adaptive/node-0-server.log", "60"),
        ("load", "logs/adaptive/load.log", "60"),
        ("tear-down", "requests-adaptive.parquet", "6"),
    ],
)
def test_ctrl_c_leaves_no_process(
    tmp_path: Path, marked, until, stage: str, sign: str, seconds: str
) -> None:
    environment, living = marked
    command = [*HBM, "--seconds", seconds, "--nodes", "1", "--out", str(tmp_path / "out")]
    demo = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    reached = tmp_path / "out" / sign
    until(lambda: reached.exists() or demo.poll() is not None, f"the demo reaches {stage}", 120)
    demo.send_signal(signal.SIGINT)
    _, said = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "stopped; no process is left" in said
    until(lambda: living() == [], "no process is left")


@pytest.mark.timeout(240)
def test_a_killed_demo_leaves_no_process(tmp_path: Path, marked, until) -> None:
    environment, living = marked
    command = [*HBM, "--seconds", "60", "--nodes", "1", "--out", str(tmp_path / "out")]
    demo = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    loading = tmp_path / "out/logs/adaptive/load.log"
    until(lambda: loading.exists() or demo.poll() is not None, "the load starts", 120)
    demo.kill()
    demo.wait()
    until(lambda: living() == [], "what it started ends too", 60)


@pytest.mark.timeout(300)
def test_a_server_that_dies_ends_the_demo_with_its_name(tmp_path: Path, marked, until) -> None:
    environment, living = marked
    command = [*HBM, "--seconds", "120", "--nodes", "1", "--out", str(tmp_path / "out")]
    demo = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    loading = tmp_path / "out/logs/adaptive/load.log"
    until(lambda: loading.exists() or demo.poll() is not None, "the load starts", 120)
    for pid in living():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"serve" in words:
            subprocess.run(["kill", "-9", str(pid)], check=True)
    _, said = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "node-0-server ended by SIGKILL" in said
    until(lambda: living() == [], "no process is left")


@pytest.mark.timeout(700)
def test_two_demos_side_by_side(tmp_path: Path, marked) -> None:
    """The whole demo, short, while a second one runs with the same output folder."""
    environment, _ = marked
    # What is set for other runs must not reach the demo's processes.
    environment = environment | {"HBM_ALPHA": "7", "HBM_BACKENDS": "nonsense"}
    out = tmp_path / "out"
    command = [*HBM, "--out", str(out), "--json"]
    log = tmp_path / "log.csv"
    rows = [f"{1_700_000_000 + i},user{i % 17},{i % 90} {i % 31}" for i in range(2000)]
    log.write_text("\n".join(["when,who,what", *rows, "broken line"]) + "\n")
    # A rate that one node serves beside a second demo on any machine.
    flags = ["--nodes", "1", "--seconds", "6", "--no-compare", "--trace", str(log), "--rate", "15"]
    calm = load_scenario("demo").model_dump(mode="json")
    for regime in calm["regimes"].values():
        regime["arrivals"]["rate_per_s"] = 25
    scenario = tmp_path / "calm.yaml"
    scenario.write_text(json.dumps(calm))
    processes = [
        subprocess.Popen(
            [*command, *each],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in (
            ["--seconds", "20", "--scenario", str(scenario)],
            [*flags, "--columns", "when,who,what"],
        )
    ]
    try:
        outputs = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.terminate()
    assert [process.returncode for process in processes] == [0, 0], outputs
    full, small = (json.loads(stdout) for stdout, _ in outputs)
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == ["out", "out-2"]
    for folder in folders:
        assert (tmp_path / folder / "report.html").stat().st_size > 50_000
    assert {
        json.loads((tmp_path / name / "summary.json").read_text())["seconds_per_arm"]
        for name in folders
    } == {6.0, 10.0}

    assert set(full["arms"]) == {"adaptive", "fixed"}
    assert full["requests"] == 2 * full["arms"]["adaptive"]["requests"] > 300
    assert set(full["arms"]["fixed"]["regimes"]) == {"steady", "trend", "burst"}
    assert set(full["arms"]["adaptive"]["requests_per_node"]) == {"node-0", "node-1"}
    for summary in (full, small):
        assert (summary["errors"], summary["dropped"]) == (0, 0)
        assert summary["checked_scores"] > 0
        assert (summary["mismatched_scores"], summary["integrity_violations"]) == (0, 0)
    assert set(small["arms"]) == {"adaptive"}
    assert small["trace"] == str(log)
    assert "1 of 2001 lines rejected; first: line 2002: has 1 fields" in outputs[1][1]
