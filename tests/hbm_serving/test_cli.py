"""`hbm serve` as a process: exit codes, one line, ready file, SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import structlog
from hbm_pool.contracts.control_block import ServerView, SidecarBlock
from hbm_pool.contracts.records import COMMAND, TELEMETRY
from hbm_serving.cli import app
from hbm_serving.config import load_config
from hbm_serving.reference import ReferenceScorer
from hbm_serving.settings import ServeSettings, read_settings
from typer.testing import CliRunner

BODY = {"history": {"items": [1, 2], "timestamps": [1, 2]}, "candidates": [3]}


class Served:
    """One `hbm serve` process."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.ready_file = folder / "ready.json"
        self.log = (folder / "serve.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hbm_cli.main", "serve", "--config", "tiny", "--port", "0",
             "--host", "127.0.0.1", "--ready-file", str(self.ready_file), *flags],
            stderr=self.log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        pause = threading.Event()
        while not self.ready_file.exists():
            assert self.process.poll() is None, self.said()
            pause.wait(0.02)
        self.listening = json.loads(self.ready_file.read_text())
        self.url = f"http://127.0.0.1:{self.listening['port']}"
        self.admin_url = f"http://127.0.0.1:{self.listening['admin_port']}"

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        self.log.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(*flags: str) -> Served:
        folder = tmp_path / f"server{len(started)}"
        folder.mkdir()
        started.append(Served(folder, *flags))
        return started[-1]

    yield start
    for served in started:
        served.end()


def refused(*flags: str) -> str:
    """The one line with which `hbm serve` refuses to start."""
    done = CliRunner().invoke(app, list(flags))
    structlog.reset_defaults()  # the runner's standard error is gone
    assert done.exit_code == 2
    assert done.stdout == ""
    return done.stderr


def test_wrong_configuration_ends_the_process_with_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hbm_cli.main", "serve", "--config", "tiny", "--alpha", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("hbm serve: tiny: pool.alpha")
    assert done.stderr.count("\n") == 1


def test_a_directory_as_ready_file_is_refused(tmp_path: Path) -> None:
    said = refused("--config", "tiny", "--ready-file", str(tmp_path))
    assert said == (f"hbm serve: --ready-file: {tmp_path} is a directory; name a file in it\n")


def test_a_run_directory_has_one_server(serve: Callable[..., Served], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    first = serve("--run-dir", str(run_dir))
    said = refused("--config", "tiny", "--port", "0", "--run-dir", str(run_dir))
    assert f"{run_dir} already has a server" in said
    assert said.count("\n") == 1
    assert httpx.post(f"{first.url}/v1/rank", json=BODY).status_code == 200
    first.process.kill()
    first.process.wait(30)
    second = serve("--run-dir", str(run_dir))  # what was killed holds nothing
    assert httpx.post(f"{second.url}/v1/rank", json=BODY).status_code == 200


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--config", "tiny", "--alpha", "0.95"], "alpha=0.95 <= alpha_max=0.7"),
        (["--config", "tiny", "--alpha-min", "0.8"], "alpha_min=0.8"),
        (["--config", "tiny", "--pool-bytes", "4096"], "pool_bytes"),
        (["--config", "tiny", "--device", "tpu"], "device=tpu"),
        (["--config", "tiny", "--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--config", "tiny", "--ready-file", "/nowhere/at/all"], "/nowhere/at is not a directory"),
        (["--config", "tiny", "--run-dir", "/nowhere"], "--run-dir: /nowhere is not a directory"),
        (["--config", "tiny", "--run-dir", "/proc/version"], "/proc/version is not a directory"),
        (["--config", "tiny", "--node", "a/b"], "--node: 'a/b' is no name; use letters"),
        (["--config", "tiny", "--port", "70000"], "--port: Input should be less than or equal to"),
        (["--config", "tiny", "--host", "300.1.1.1"], "cannot listen on 300.1.1.1"),
    ],
)
def test_wrong_configuration_exits_2_with_one_line(flags: list[str], said: str) -> None:
    line = refused(*flags)
    assert said in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("HBM_PORT", "http", "--port: Input should be a valid integer"),
        ("HBM_NODE", "node one", "--node: 'node one' is no name"),
        ("HBM_RUN_DIR", "/nowhere", "--run-dir: /nowhere is not a directory"),
        ("HBM_ALPHA", "0.95", "alpha=0.95 <= alpha_max=0.7"),
        ("HBM_CONFIG", "nowhere.yaml", "nowhere.yaml: cannot be read"),
    ],
)
def test_variables_say_the_same_as_flags(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv("HBM_CONFIG", "tiny")
    monkeypatch.setenv(variable, value)
    line = refused()
    assert said in line
    assert line.count("\n") == 1


def test_every_setting_is_a_flag_and_a_variable() -> None:
    told = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    for name in ServeSettings.model_fields:
        assert f"HBM_{name.upper()}" in told
        assert name == "log_json" or f"--{name.replace('_', '-')}" in told


def test_an_empty_variable_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HBM_RUN_DIR", "")
    monkeypatch.setenv("HBM_LINK_BYTES_PER_S", "0")
    settings = read_settings({"seed": 5})
    assert settings.run_dir is None
    assert settings.overrides() == {"server.seed": 5, "pool.link_bytes_per_s": None}


def test_one_life_of_a_server(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Seed from the environment, an unusable run directory, a taken port, admin apart, drain."""
    monkeypatch.setenv("HBM_SEED", "3")
    run_dir = tmp_path / "run"
    (run_dir / "server.cb").mkdir(parents=True)  # where the control block should be
    served = serve("--run-dir", str(run_dir), "--no-pipeline")
    monkeypatch.delenv("HBM_SEED")
    assert set(served.listening) == {"pid", "host", "port", "admin_port"}
    assert served.listening["pid"] == served.process.pid
    assert "serving without control block" in served.said()

    port = str(served.listening["port"])
    line = refused("--config", "tiny", "--host", "127.0.0.1", "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}" in line

    assert httpx.post(f"{served.url}/v1/admin/rows", json={}).status_code == 404
    assert httpx.get(f"{served.admin_url}/v1/admin/integrity").json() == {"violations": []}

    reference = ReferenceScorer.from_config(load_config("tiny", {"server.seed": 3}))
    expected = reference.score([1, 2], [1, 2], [3])
    with httpx.Client(base_url=served.url, timeout=30) as client:
        for _ in range(5):
            answer = client.post("/v1/rank", json=BODY)
            assert answer.json()["scores"] == pytest.approx(expected.tolist(), abs=1e-5)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0
    assert not served.ready_file.exists()
    assert '"stopped"' in served.said()
    assert "Traceback" not in served.said()


def write_command(block: SidecarBlock, view: ServerView, alpha: float, generation: int) -> None:
    record = np.zeros((), dtype=COMMAND)
    record["boot_epoch"], record["generation"] = view.boot_epoch, generation
    record["alpha"], record["refill_bytes_per_s"] = alpha, 1e6
    block.write_command(record)


def telemetry(view: ServerView) -> Any:
    record = np.zeros((), dtype=TELEMETRY)
    view.refresh()
    wait_until(lambda: view.read_telemetry(record))
    return record


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    pause = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("the condition did not come true")


def test_control_block_through_kills_on_both_sides(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    """α follows commands; it stays without a sidecar; a killed server starts a new epoch."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    first = serve("--run-dir", str(run_dir))
    view = ServerView.open(run_dir)
    assert view.info.model == "hbm-tiny"
    epoch = view.boot_epoch
    block = SidecarBlock.create(run_dir)

    # An idle server takes a command over.
    write_command(block, view, 0.6, 1)
    wait_until(lambda: int(telemetry(view)["command_generation"]) == 1)
    wait_until(lambda: abs(float(telemetry(view)["alpha"]) - 0.6) < 0.02)

    # The sidecar is gone, with its file: α stays, requests are served.
    (run_dir / "sidecar.cb").unlink()
    for _ in range(3):
        answer = httpx.post(f"{first.url}/v1/rank", json=BODY, headers={"X-User-ID": "u"})
        assert answer.status_code == 200
        assert float(answer.headers["x-hbm-alpha"]) == pytest.approx(0.6, abs=0.02)
    seen: list[Any] = []

    def all_seen() -> bool:
        seen.extend(view.read_requests(10)[0])
        return len(seen) == 3

    wait_until(all_seen)
    wait_until(lambda: int(telemetry(view)["requests"]) == 3)

    # The server is killed: its file stays, and ages.
    first.process.kill()
    first.process.wait(30)
    age_s = view.telemetry_age_s()
    wait_until(lambda: view.telemetry_age_s() > age_s)
    block = SidecarBlock.create(run_dir)
    write_command(block, view, 0.3, 7)

    # Its successor has a new epoch and ignores what was meant for the dead one.
    second = serve("--run-dir", str(run_dir))
    wait_until(view.refresh)
    assert view.boot_epoch != epoch
    assert httpx.post(f"{second.url}/v1/rank", json=BODY).status_code == 200
    assert float(telemetry(view)["alpha"]) == pytest.approx(0.4, abs=0.02)
    write_command(block, view, 0.3, 1)
    wait_until(lambda: int(telemetry(view)["command_generation"]) == 1)
    wait_until(lambda: abs(float(telemetry(view)["alpha"]) - 0.3) < 0.02)
