"""A whole system of real processes under load, whose parts can be killed and started again."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import pytest
from hbm_demo.processes import Process, Processes
from hbm_demo.score_check import ScoreCheck, check_scores
from hbm_demo.settings import DemoSettings
from hbm_demo.system import ADAPTIVE, System, start_system
from hbm_load.client import LoadClient, LoadConfig
from hbm_load.generate import generate
from hbm_load.records import Outcome, Records
from hbm_load.scenario import load_scenario
from hbm_load.trace import Trace

SEED = 1
RATE_SCALE = 0.3
"""Of the demo's request rate: these tests are about what survives, not about speed."""


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Returns when `condition` holds; fails the test when it does not come to hold."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.05)


class Load:
    """Sends a trace in the background; `with` waits for its end by stopping it."""

    def __init__(self, url: str, seconds: float = 150.0) -> None:
        self.trace: Trace = generate(
            load_scenario("demo"), SEED, duration_s=seconds, rate_scale=RATE_SCALE
        )
        self._client = LoadClient(self.trace, LoadConfig(url=url, sample_share=0.2, timeout_s=15.0))
        self.records: Records = self._client.records
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def _run(self) -> None:
        self._loop.run_until_complete(self._client.run(self._stop))
        self._loop.close()

    @property
    def answered(self) -> int:
        """Requests answered with 2xx so far."""
        return int(self.records.ok.sum())

    def wait_answered(self, more: int) -> None:
        """Returns once `more` further requests have been answered well."""
        goal = self.answered + more
        wait_until(lambda: self.answered >= goal, f"{more} more answers")

    def statuses(self) -> dict[int, int]:
        """How many answers had which HTTP status (0: no answer)."""
        ended = np.array([outcome is not Outcome.NOT_SENT for outcome in self.records.outcome])
        values, counts = np.unique(self.records.status[ended], return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def check_scores(self) -> ScoreCheck:
        """The sampled answers against the cache-free reference."""
        return check_scores({"load": self.records}, self.trace, SEED)

    def __enter__(self) -> Load:
        self._thread.start()
        self.wait_answered(20)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30.0)
        assert not self._thread.is_alive()


class Running:
    """The system and its processes by name."""

    def __init__(self, processes: Processes, system: System) -> None:
        self.processes = processes
        self.system = system
        self._ports = {
            each.name: each.wait_ready(1.0).get("port")
            for name in processes.pids()
            if (each := processes.find(name)).ready_file is not None
        }

    def kill(self, name: str) -> Process:
        """SIGKILL to the process alone, not to its group."""
        process = self.processes.find(name)
        os.kill(process.pid, signal.SIGKILL)
        process.popen.wait()
        return process

    def restart(self, name: str) -> Process:
        """The same command again, on the port that others know it by."""
        dead = self.processes.find(name)
        command = [str(part) for part in dead.popen.args]  # type: ignore[union-attr]
        if "--port" in command and self._ports.get(name):
            command[command.index("--port") + 1] = str(self._ports[name])
        if dead.ready_file is not None:
            dead.ready_file.unlink(missing_ok=True)
        self.processes.forget(dead)
        started = self.processes.start(
            name, command, ready_file=dead.ready_file, environment={"OMP_NUM_THREADS": "1"}
        )
        if started.ready_file is not None:
            started.wait_ready(120.0)
        return started


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """Redis, two model servers with their sidecars, and the router."""
    # A short path: unix sockets live below it.
    directory = Path(tempfile.mkdtemp(prefix="hbm-"))
    settings = DemoSettings(seed=SEED, out=directory / "out")
    try:
        with Processes(directory / "logs") as processes:
            yield Running(processes, start_system(processes, settings, ADAPTIVE, directory, 2e6))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
