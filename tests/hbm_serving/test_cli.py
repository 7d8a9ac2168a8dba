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
import pytest

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
    done = subprocess.run(
        [sys.executable, "-m", "hbm_cli.main", "serve", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    return done.stderr


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
        (["--config", "tiny", "--host", "300.1.1.1"], "cannot listen on 300.1.1.1"),
    ],
)
def test_wrong_configuration_exits_2_with_one_line(flags: list[str], said: str) -> None:
    line = refused(*flags)
    assert said in line
    assert line.count("\n") == 1


def test_a_taken_port_is_said(serve: Callable[..., Served]) -> None:
    served = serve()
    port = str(served.listening["port"])
    line = refused("--config", "tiny", "--host", "127.0.0.1", "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}" in line


def test_sigterm_drains_and_exits_0(serve: Callable[..., Served]) -> None:
    served = serve()
    assert set(served.listening) == {"pid", "host", "port", "admin_port"}
    assert served.listening["pid"] == served.process.pid
    with httpx.Client(base_url=served.url, timeout=30) as client:
        for _ in range(5):
            assert client.post("/v1/rank", json=BODY).status_code == 200
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0
    assert not served.ready_file.exists()
    said = served.said()
    assert '"stopped"' in said
    assert "Traceback" not in said


def test_environment_sets_what_flags_do(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HBM_SEED", "3")
    by_environment = serve()
    monkeypatch.delenv("HBM_SEED")
    by_flag, other = serve("--seed", "3"), serve("--seed", "4", "--no-cache", "--no-pipeline")
    scores: list[Any] = [
        httpx.post(f"{served.url}/v1/rank", json=BODY).json()["scores"]
        for served in (by_environment, by_flag, other)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert scores[0] != pytest.approx(scores[2], abs=1e-3)


def test_admin_endpoints_are_not_on_the_public_port(serve: Callable[..., Served]) -> None:
    served = serve()
    assert httpx.post(f"{served.url}/v1/admin/rows", json={}).status_code == 404
    assert httpx.get(f"{served.admin_url}/v1/admin/integrity").json() == {"violations": []}
