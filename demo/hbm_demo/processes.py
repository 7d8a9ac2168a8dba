"""Real processes that are gone when the demo is gone.

Each one leads its own process group and is asked by the kernel to end when the demo dies, whatever
killed it. Starting and stopping exclude each other, so that none can slip through between its start
and the list of what must be stopped.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

from hbm_demo.errors import ProcessFailed

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_POLL_S: Final = 0.02


class Process:
    """One started process with its log and, where it has one, its ready file."""

    def __init__(
        self, name: str, popen: subprocess.Popen[bytes], log: Path, ready_file: Path | None
    ) -> None:
        self.name = name
        self.popen = popen
        self.log = log
        self.ready_file = ready_file

    @property
    def pid(self) -> int:
        return self.popen.pid

    def wait_ready(self, timeout_s: float) -> dict[str, Any]:
        """Content of the ready file. Raises `ProcessFailed` when it does not come in time."""
        assert self.ready_file is not None, f"{self.name} has no ready file"
        deadline = time.monotonic() + timeout_s
        while True:
            # Renamed into place by its writer, so it is whole once it is there.
            if self.ready_file.exists():
                ready: dict[str, Any] = json.loads(self.ready_file.read_text())
                return ready
            self.check()
            if time.monotonic() > deadline:
                raise ProcessFailed(
                    f"{self.name} was not ready after {timeout_s:.0f} s; its log is {self.log}"
                )
            time.sleep(_POLL_S)

    def wait_done(self, timeout_s: float) -> None:
        """Returns when it has ended well. Raises `ProcessFailed` otherwise."""
        deadline = time.monotonic() + timeout_s
        while (status := self.popen.poll()) is None:
            if time.monotonic() > deadline:
                raise ProcessFailed(
                    f"{self.name} still runs after {timeout_s:.0f} s; its log is {self.log}"
                )
            time.sleep(_POLL_S)
        if status != 0:
            raise ProcessFailed(f"{self.name} ended {_told(status)}: {self.last_words()}")

    def check(self) -> None:
        """Raises `ProcessFailed` with the end of its log when it has ended."""
        status = self.popen.poll()
        if status is not None:
            raise ProcessFailed(f"{self.name} ended {_told(status)}: {self.last_words()}")

    def last_words(self) -> str:
        """The last line of the log that says something, or where the log is."""
        with contextlib.suppress(OSError):
            text = self.log.read_bytes()[-4096:].decode("utf-8", "replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if lines:
                return f"{lines[-1][:300]} (log: {self.log})"
        return f"nothing in {self.log}"


class Processes:
    """All processes of one arm. Leaving the context stops them, newest first."""

    def __init__(self, logs: Path, stop_timeout_s: float = 8.0) -> None:
        self._logs = logs
        self._stop_timeout_s = stop_timeout_s
        self._running: list[Process] = []
        self._lock = threading.Lock()
        self._stopped = False
        logs.mkdir(parents=True, exist_ok=True)

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        ready_file: Path | None = None,
        environment: Mapping[str, str] | None = None,
        stdout: int | None = None,
    ) -> Process:
        """Starts `command`. Its output goes to NAME.log, its stdout to `stdout` if given.

        Raises `ProcessFailed` once these processes have been stopped.
        """
        log = self._logs / f"{name}.log"
        parent = os.getpid()
        with log.open("ab") as sink, self._lock:
            if self._stopped:
                raise ProcessFailed(f"{name} is not started: everything is being stopped")
            popen = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=sink if stdout is None else stdout,
                stderr=sink,
                env=_inherited() | dict(environment or {}),
                start_new_session=True,
                preexec_fn=lambda: _follow(parent),
            )
            process = Process(name, popen, log, ready_file)
            self._running.append(process)
        return process

    def check_others(self, expected: Process) -> None:
        """Raises `ProcessFailed` when one other than `expected` has ended."""
        for process in self._running:
            if process is not expected:
                process.check()

    def forget(self, process: Process) -> None:
        """For a process that has ended by itself, as it should."""
        self._running.remove(process)
        _kill_group(process.pid, signal.SIGKILL)

    def pids(self) -> dict[str, int]:
        """Name and process id of each."""
        return {process.name: process.pid for process in self._running}

    def find(self, name: str) -> Process:
        """The process started under that name. Raises KeyError."""
        for process in self._running:
            if process.name == name:
                return process
        raise KeyError(name)

    def stop(self) -> None:
        """SIGTERM, newest first and all within one time limit; then SIGKILL to what is left. Any
        thread may call it, also a second time."""
        with self._lock:
            self._stopped = True
            for process in reversed(self._running):
                if process.popen.poll() is None:
                    process.popen.terminate()
            deadline = time.monotonic() + self._stop_timeout_s
            for process in reversed(self._running):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.popen.wait(max(0.0, deadline - time.monotonic()))
            for process in self._running:
                # The whole group: children that outlived their parent too.
                _kill_group(process.pid, signal.SIGKILL)
                process.popen.wait()
                if process.popen.stdout is not None:
                    process.popen.stdout.close()
            self._running.clear()

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def read_lines(stream: IO[bytes], rest: bytearray) -> list[bytes]:
    """Whole lines that can be read from a non-blocking stream now; `rest` keeps the last part."""
    with contextlib.suppress(BlockingIOError):
        while chunk := os.read(stream.fileno(), 65536):
            rest += chunk
    *lines, tail = bytes(rest).split(b"\n")
    rest[:] = tail
    return lines


def _follow(parent: int) -> None:
    """In the child, before exec: end when the demo ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def _inherited() -> dict[str, str]:
    """Our environment without HBM_*: what the user set for other runs must not reach these."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HBM_")}


def _kill_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _told(status: int) -> str:
    if status < 0:
        return f"by {signal.Signals(-status).name}"
    return f"with exit code {status}"
