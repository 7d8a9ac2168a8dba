"""Control blocks in a run directory of their own, and real child processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hbm_pool.contracts.records import (
    CostModel,
    RequestSample,
    RowClass,
    ServerInfo,
    TableMap,
)
from hypothesis import settings

DEADLINE_S = 60.0

# An example may take as long as a busy machine needs.
settings.register_profile("contracts", deadline=None)
settings.load_profile("contracts")


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """Like an emptyDir: every user may create files in it (pytest's own are for one user)."""
    directory = Path(tempfile.mkdtemp(prefix="hbm-run-"))
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def info() -> ServerInfo:
    return ServerInfo(
        node="node-α",
        model="hstu-demo",
        extents=1500,
        extent_bytes=2 << 20,
        page_tokens=64,
        pages_per_extent=2,
        max_sequence_tokens=4096,
        drop_block_tokens=512,
        tables=(TableMap("item", 100_000, 0, False), TableMap("category", 1000, 1, True)),
        classes=(RowClass(128, 16_384, 100_000, (0,)), RowClass(64, 32_768, 1000, (1,))),
        cost_model=CostModel.OVERLAP,
        sample_rate=0.01,
        alpha_min=0.1,
        alpha_max=0.9,
        slo_ms=50.0,
        device="cpu",
        versions={"torch": "2.13.0"},
    )


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., RequestSample]:
    """A sample whose every field follows from its number and its numbers of keys."""

    def make(number: int, history: int = 12, candidates: int = 3) -> RequestSample:
        base = np.uint64(number) << np.uint64(20)
        return RequestSample(
            user=number - (1 << 62),
            history_tokens=history * 10,
            candidates=candidates,
            rows_total=history * 20 + candidates,
            history_rows_total=history * 20,
            page_fingerprints=np.arange(history // 4, dtype=np.uint32) ^ np.uint32(number),
            history_keys=np.arange(history, dtype=np.uint64) + base,
            history_positions=np.arange(history, dtype=np.uint32) * np.uint32(10),
            candidate_keys=np.arange(candidates, dtype=np.uint64) ^ base,
        )

    return make


@pytest.fixture(scope="session")
def same_sample() -> Callable[[RequestSample, RequestSample], bool]:
    def same(left: RequestSample, right: RequestSample) -> bool:
        return left[:5] == right[:5] and all(
            np.array_equal(one, other) and one.dtype == other.dtype
            for one, other in zip(left[5:], right[5:], strict=True)
        )

    return same


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], Any], str], Any]:
    def wait(condition: Callable[[], Any], what: str) -> Any:
        until = time.monotonic() + DEADLINE_S
        while True:
            value = condition()
            if value:
                return value
            assert time.monotonic() < until, f"waited in vain for {what}"
            time.sleep(0)

    return wait


class Child:
    """A forked process that runs a function; killed and reaped at the end of the test."""

    def __init__(self, body: Callable[[], object], uid: int | None = None) -> None:
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                if uid is not None:
                    os.setgroups([])
                    os.setgid(uid)
                    os.setuid(uid)
                body()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def alive(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def wait(self) -> int:
        """Exit status; negative for the signal that ended it."""
        if self.status is None:
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
        return self.status


@pytest.fixture
def fork() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(body: Callable[[], object], uid: int | None = None) -> Child:
        child = Child(body, uid)
        children.append(child)
        return child

    yield start
    for child in children:
        if child.status is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
