"""What a wrong command line gets: exit 2 and one line, before anything starts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
from hbm_sidecar.cli import sidecar
from hbm_sidecar.config import SidecarConfig
from typer.main import get_command
from typer.testing import CliRunner


@pytest.fixture
def run(hbm_command, run_dir):
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [hbm_command, *arguments],
            capture_output=True,
            text=True,
            env=os.environ | environment,
            timeout=120,
        )

    return run


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--alpha-min", "0.8", "--alpha-max", "0.2"), "alpha"),
        (("--mode", "turbo"), "--mode"),
        (("--mode", "fixed"), "ALPHA_FIXED"),
        (("--redis-url", "http://x", "--node-url", "http://n"), "--redis-url"),
        (("--redis-url", "redis://x"), "node_url"),
        (("--node", "a b"), "--node"),
        (("--host", "256.1.1.1"), "--host"),
        (("--tick-ms", "0"), "--tick-ms"),
        (("--policy-file", "/"), "--policy-file: / is not a file"),
        (("--node", "x" * 254), "--node"),
        (("--slew-per-s", "0"), "--slew-per-s"),
        (("--move-fraction", "1.5"), "--move-fraction"),
        (("--dwell-ms", "-1"), "--dwell-ms"),
        (("--min-gain", "nan"), "--min-gain"),
        (("--curve-stale-ms", "inf"), "--curve-stale-ms"),
    ],
)
def test_wrong_flags(run_dir, flags, said) -> None:
    # In this process: nothing is wrong enough to be found only after the exec.
    result = CliRunner().invoke(sidecar, ["--run-dir", str(run_dir), "--port", "0", *flags])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert said in result.stderr
    assert not (run_dir / "sidecar.cb").exists()


def test_a_wrong_flag_of_the_installed_command(run, run_dir) -> None:
    result = run("sidecar", "--run-dir", str(run_dir), "--no-such-flag")
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "--no-such-flag" in result.stderr


def test_a_wrong_variable_is_named(run, run_dir) -> None:
    result = run("sidecar", "--run-dir", str(run_dir), HBM_ALPHA_MAX="0.01")
    assert result.returncode == 2
    assert "HBM_ALPHA_MAX" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    result = run("sidecar", "--run-dir", str(run_dir), HBM_DWELL_ACCESSES_PER_SLOT="-0.5")
    assert result.returncode == 2
    assert "HBM_DWELL_ACCESSES_PER_SLOT" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_busy_port(run, run_dir) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = run("sidecar", "--run-dir", str(run_dir), "--port", port)
    assert result.returncode == 2
    assert port in result.stderr
    assert "--port 0" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_run_dir_that_cannot_be_made(run, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    result = run("sidecar", "--run-dir", str(tmp_path / "file" / "run"), "--port", "0")
    assert result.returncode == 2
    assert "--run-dir" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", sorted(SidecarConfig.model_fields))
def test_every_setting_is_a_flag_whose_help_tells_variable_and_default(name) -> None:
    flags = {parameter.name: parameter for parameter in get_command(sidecar).params}
    assert flags[name].opts == [f"--{name.replace('_', '-')}"]
    text = flags[name].help
    assert f"HBM_{name.upper()}" in text
    default = SidecarConfig.model_fields[name].default
    if isinstance(default, float) and name != "refill_bytes_per_s":
        assert f", {default:g}]" in text


def test_a_second_sidecar_and_explain_over_the_socket_and_from_the_file(
    run, start_sidecar, start_server, wait_for, run_dir
) -> None:
    running = start_sidecar(
        "--mode", "fixed", "--alpha-fixed", "0.48", "--tick-ms", "50", "--slew-per-s", "0.15"
    )
    server = start_server()
    wait_for(lambda: abs(server.tell()["alpha"] - 0.48) < 0.01, "converged")
    second = run("sidecar", "--run-dir", str(run_dir), "--port", "0")
    assert second.returncode == 2
    assert str(running.process.pid) in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert running.public("/healthz").status_code == 200
    live = run("explain", "--run-dir", str(run_dir), "--last", "5", "--json")
    assert live.returncode == 0
    decisions = json.loads(live.stdout)
    assert len(decisions) == 5
    assert [each["tick"] for each in decisions] == sorted(each["tick"] for each in decisions)
    assert decisions[-1]["mode"] == "fixed"
    assert decisions[-1]["text"]
    shown = run("explain", "--run-dir", str(run_dir), "--last", "3")
    lines = shown.stdout.splitlines()
    assert len(lines) == 3
    assert "slew_per_s=0.15 " in shown.stderr
    for layer in ("anchor", "gate", "residual", "shield"):
        assert f"\n  {layer} " in shown.stderr
    assert running.state()["policy"] == SidecarConfig(slew_per_s=0.15).policy().flat()
    assert all("α=" in line and "mode fixed" in line for line in lines)
    running.stop()
    dead = run("explain", "--run-dir", str(run_dir), "--last", "5", "--json")
    assert dead.returncode == 0
    assert json.loads(dead.stdout)[-1]["tick"] >= decisions[-1]["tick"]


def test_explain_without_a_sidecar(run, tmp_path) -> None:
    result = run("explain", "--run-dir", str(tmp_path))
    assert result.returncode == 2
    assert "--run-dir" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_explain_of_a_foreign_file(run, tmp_path: Path) -> None:
    (tmp_path / "sidecar.cb").write_bytes(b"no control block" * 1000)
    result = run("explain", "--run-dir", str(tmp_path))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "sidecar.cb" in result.stderr
