"""Real parts to test the router with: HTTP servers, a Redis server, routers as they run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hbm_router.config import RouterSettings
from hbm_router.server import RouterServer
from hypothesis import settings

from tests.hbm_router.backend import Backend, backend_flag
from tests.hbm_router.published import Publisher, RedisProcess
from tests.hbm_router.waiting import wait_until

# A property must hold however busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture
async def backends() -> AsyncIterator[Callable[..., Awaitable[list[Backend]]]]:
    """`await backends("a", "b")` starts them."""
    started: list[Backend] = []

    async def start(*names: str) -> list[Backend]:
        fresh = [Backend(name) for name in names]
        for backend in fresh:
            await backend.start()
        started.extend(fresh)
        return fresh

    yield start
    for backend in started:
        await backend.stop()


@pytest.fixture
async def router() -> AsyncIterator[Callable[..., Awaitable[RouterServer]]]:
    """`await router(nodes, probe_interval_s=0, …)` starts one in this process."""
    started: list[RouterServer] = []

    async def start(nodes: list[Backend], **settings: Any) -> RouterServer:
        settings = {"probe_interval_s": 0, "seed": 1, "port": 0, **settings}
        server = RouterServer(RouterSettings(backends=backend_flag(nodes), **settings))
        await server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        await server.stop()
        assert server.plane.fleet.inflight == 0
        assert all(node.inflight == 0 for node in server.plane.fleet.nodes)


@dataclasses.dataclass
class Process:
    """`hbm router`, or another command with a ready file, as a real process."""

    popen: subprocess.Popen[bytes]
    port: int
    admin_port: int

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def terminate(self) -> None:
        self.popen.send_signal(signal.SIGTERM)


@pytest.fixture
def router_process(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*flags: str) -> Process:
        ready = tmp_path / f"ready-{len(started)}.json"
        popen = subprocess.Popen(
            [
                *(sys.executable, "-c", "from hbm_cli.main import main; main()", "router"),
                *("--ready-file", str(ready), *flags),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started.append(popen)

        def is_ready() -> bool:
            assert popen.poll() is None, f"the router ended with {popen.returncode}"
            return ready.exists()

        wait_until(is_ready, "the router's ready file")
        told = json.loads(ready.read_text())
        return Process(popen, told["port"], told["admin_port"])

    yield start
    for popen in started:
        popen.kill()
        popen.wait()


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    process.start()
    yield process
    process.kill()


@pytest.fixture
def redis_server(redis_process: RedisProcess) -> RedisProcess:
    """The session's Redis, running and empty."""
    if not redis_process._answers():
        redis_process.start()
    redis_process.client.flushall()
    return redis_process


@pytest.fixture
def publisher(redis_server: RedisProcess) -> Publisher:
    return Publisher(redis_server.client)
