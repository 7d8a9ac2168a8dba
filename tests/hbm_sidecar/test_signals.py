"""Signals are taken as they come; time spent stopped is no signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hbm_sidecar.signals import SignalWait

WAITER = """
import signal, sys, time
from hbm_sidecar.signals import SignalWait
wanted = (signal.SIGTERM, signal.SIGCHLD)
signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
waiter = SignalWait(wanted)
timeout_s = float(sys.argv[1])
print(time.monotonic() + timeout_s, flush=True)
for _ in range(int(sys.argv[2])):
    taken = waiter.take(timeout_s)
    print(taken.name if taken else None, time.monotonic(), flush=True)
"""


@pytest.fixture
def start_waiter() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(timeout_s: float, times: int = 1) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WAITER, str(timeout_s), str(times)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.communicate()


def state(pid: int) -> str:
    """As `ps` shows it: S sleeps, T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def line(waiter: subprocess.Popen[str]) -> str:
    assert waiter.stdout is not None
    return waiter.stdout.readline()


@pytest.mark.parametrize("told", [None, signal.SIGTERM, signal.SIGCHLD])
def test_a_stop_that_outlasts_the_wait_is_no_signal(
    told: signal.Signals | None,
    start_waiter: Callable[..., subprocess.Popen[str]],
    wait_for: Callable[..., object],
) -> None:
    waiter = start_waiter(1.0)
    until = float(line(waiter))
    wait_for(lambda: state(waiter.pid) == "S", "it waits")
    os.kill(waiter.pid, signal.SIGSTOP)
    wait_for(lambda: state(waiter.pid) == "T", "it is stopped")
    if told is not None:
        os.kill(waiter.pid, told)
    wait_for(lambda: time.monotonic() > until, "its time is over")
    os.kill(waiter.pid, signal.SIGCONT)
    assert line(waiter).split()[0] == ("None" if told is None else told.name)


def test_a_short_stop_does_not_end_the_wait(
    start_waiter: Callable[..., subprocess.Popen[str]], wait_for: Callable[..., object]
) -> None:
    waiter = start_waiter(3.0)
    until = float(line(waiter))
    for _ in range(3):
        wait_for(lambda: state(waiter.pid) == "S", "it waits")
        os.kill(waiter.pid, signal.SIGSTOP)
        wait_for(lambda: state(waiter.pid) == "T", "it is stopped")
        os.kill(waiter.pid, signal.SIGCONT)
    taken, ended = line(waiter).split()
    assert taken == "None"
    assert float(ended) >= until - 0.01


def test_signals_are_taken_one_by_one(
    start_waiter: Callable[..., subprocess.Popen[str]], wait_for: Callable[..., object]
) -> None:
    waiter = start_waiter(60.0, 2)
    line(waiter)
    wait_for(lambda: state(waiter.pid) == "S", "it waits")
    os.kill(waiter.pid, signal.SIGSTOP)
    wait_for(lambda: state(waiter.pid) == "T", "it is stopped")
    for signum in (signal.SIGTERM, signal.SIGCHLD):
        os.kill(waiter.pid, signum)
    os.kill(waiter.pid, signal.SIGCONT)
    assert {line(waiter).split()[0] for _ in range(2)} == {"SIGTERM", "SIGCHLD"}


def test_without_time_it_only_looks() -> None:

    assert SignalWait((signal.SIGUSR2,)).take(0.0) is None
    assert SignalWait((signal.SIGUSR2,)).take(-1.0) is None
