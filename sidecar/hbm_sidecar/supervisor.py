"""PID 1 of the sidecar: starts decide, twin and admin, restarts them, and never exits for them.

Standard library only, so that it stays small and starts at once: `hbm sidecar` checks the
configuration, takes the lock on the run directory, binds the admin port and becomes this module by
exec. The children inherit the listening socket, so the port stays the same when admin restarts.

All signals of interest are blocked and taken one by one (`hbm_sidecar.signals`).
A child dies with its supervisor (`PR_SET_PDEATHSIG`), whatever kills it.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from hbm_sidecar.signals import SignalWait

CHILDREN: Final = ("admin", "decide", "twin")
ADMIN_FD: Final = "HBM_SIDECAR_ADMIN_FD"
"""Number of the listening socket that admin inherits."""
LOCK_FD: Final = "HBM_SIDECAR_LOCK_FD"
"""Number of the descriptor that holds the lock on the run directory."""
CHILDREN_FILE: Final = "sidecar.children.json"
"""Who runs, how often each was started again, and how it last ended."""
LOCK_FILE: Final = "sidecar.lock"
BLOCK_FILE: Final = "sidecar.cb"
WATCH_S: Final = 0.5
"""How often it looks whether its files are still there."""
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_LAST_S: Final = 10.0
HEALTHY_S: Final = 10.0
"""A child that lived so long starts its back-off anew."""
GRACE_S: Final = 5.0
"""Time from SIGTERM to SIGKILL."""

_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)


def backoff_s(failures: int) -> float:
    """Pause before the start that follows `failures` quick deaths in a row: doubling, bounded."""
    if failures == 0:
        return 0.0
    return min(BACKOFF_LAST_S, BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 16))


def how_it_ended(status: int) -> str:
    """Words for a wait status: `exit 1`, `SIGKILL`."""
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit {os.waitstatus_to_exitcode(status)}"


class Child:
    """One supervised process and its restarts."""

    def __init__(self, name: str, keep: bool) -> None:
        self.name = name
        self.keep = keep
        """False: it is done once it has ended with 0."""
        self.pid: int | None = None
        self.done = False
        self.starts = 0
        self.failures = 0
        self.started_at = 0.0
        self.due_at = 0.0
        self.last_end = ""

    @property
    def restarts(self) -> int:
        """Starts beyond the first."""
        return max(0, self.starts - 1)

    def ended(self, status: int, now: float) -> None:
        """Note the end and when the next start is due."""
        self.pid = None
        self.last_end = how_it_ended(status)
        if not self.keep and status == 0:
            self.done = True
            return
        self.failures = 0 if now - self.started_at >= HEALTHY_S else self.failures + 1
        self.due_at = now + backoff_s(self.failures)


class Supervisor:
    """Keeps its children running until it is told to stop.

    `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        environment: Mapping[str, str],
        block_ready: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_dir = run_dir
        self._environment = dict(environment)
        self._clock = clock
        fd = environment.get(ADMIN_FD)
        self._admin_fd = None if fd is None else int(fd)
        self._libc = ctypes.CDLL(None, use_errno=True)
        lock = environment.get(LOCK_FD)
        self._lock_fd = None if lock is None else int(lock)
        self._stopping = False
        # Files known to be missing: those not made yet at the start, later each is said once.
        self._lost = {CHILDREN_FILE} if block_ready else {CHILDREN_FILE, BLOCK_FILE}
        self._children = [Child(name, keep=True) for name in CHILDREN]
        self._prepare = Child("prepare", keep=False)
        self._prepare.done = block_ready
        self._children.insert(0, self._prepare)

    def run(self) -> None:
        """Supervise until SIGTERM or SIGINT, then stop all children and return."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        signals = SignalWait(_SIGNALS)
        _log("info", "started", run_dir=str(self._run_dir))
        while True:
            now = self._clock()
            self._bring_back(now)
            due = [child for child in self._children if self._is_due(child, now)]
            for child in due:
                self._start(child, now)
            if due:
                self._publish()
            got = signals.take(self._pause_s())
            if self._reap():
                self._publish()
            if got in (signal.SIGTERM, signal.SIGINT):
                break
        self._stop()
        _log("info", "stopped")

    def _is_due(self, child: Child, now: float) -> bool:
        return child.pid is None and not child.done and now >= child.due_at

    def _pause_s(self) -> float:
        now = self._clock()
        waits = [c.due_at - now for c in self._children if c.pid is None and not c.done]
        return min(WATCH_S, max(0.0, min(waits, default=WATCH_S)))

    def _bring_back(self, now: float) -> None:
        """Make anew what somebody deleted from the run directory under us.

        A new `sidecar.cb` is another inode: the children and the server map it anew. Admin looks
        after its socket itself.
        """
        if self._is_gone(BLOCK_FILE) and self._prepare.done:
            self._prepare.done, self._prepare.due_at = False, now
        if self._is_gone(CHILDREN_FILE):
            self._publish()
        if self._lock_fd is not None and self._is_gone(LOCK_FILE):
            self._lock_anew(self._lock_fd)

    def _is_gone(self, name: str) -> bool:
        if os.path.exists(self._run_dir / name):
            self._lost.discard(name)
            return False
        if name not in self._lost:
            self._lost.add(name)
            _log("warning", "file is gone from the run directory; it is made anew", file=name)
        return True

    def _lock_anew(self, lock_fd: int) -> None:
        """A lock on a deleted file keeps no second sidecar away."""
        try:
            fd = os.open(self._run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.pwrite(fd, str(os.getpid()).encode(), 0)
                os.dup2(fd, lock_fd, inheritable=False)
            finally:
                os.close(fd)
        except OSError as error:
            _log("error", "cannot lock the run directory again", error=str(error))

    def _start(self, child: Child, now: float) -> None:
        parent = os.getpid()
        command = [sys.executable, "-P", "-m", f"hbm_sidecar.{child.name}"]
        child.started_at = now
        try:
            pid = os.fork()
        except OSError as error:  # out of pids or memory: as if it had died at once
            child.failures += 1
            child.due_at = now + backoff_s(child.failures)
            _log("error", "cannot start", child=child.name, error=str(error))
            return
        if pid == 0:
            self._become(command, parent, takes_port=child.name == "admin")
        child.pid = pid
        child.starts += 1
        event = "child started" if child.starts == 1 else "child started again"
        _log("info", event, child=child.name, pid=pid)

    def _become(self, command: list[str], parent: int, takes_port: bool) -> NoReturn:
        """Turn the forked copy into `command`; never returns."""
        try:
            if self._admin_fd is not None:
                os.set_inheritable(self._admin_fd, takes_port)
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # the supervisor died before the line above
                os._exit(1)
            # Ctrl-C reaches the whole group; only the supervisor acts on it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.execve(command[0], command, self._environment)
        finally:
            os._exit(127)

    def _reap(self) -> bool:
        """Collect every ended process, adopted orphans too; True when a child was among them."""
        ours = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return ours
            if pid == 0:
                return ours
            for child in self._children:
                if child.pid == pid:
                    child.ended(status, self._clock())
                    ours = True
                    if not child.done:
                        _log(
                            "info" if self._stopping else "warning",
                            "child ended",
                            child=child.name,
                            pid=pid,
                            how=child.last_end,
                        )

    def _stop(self) -> None:
        """SIGTERM to all, SIGKILL to what is left after the grace time."""
        self._stopping = True
        ended = SignalWait((signal.SIGCHLD,))
        self._signal(signal.SIGTERM)
        until = self._clock() + GRACE_S
        while self._alive() and (left := until - self._clock()) > 0:
            ended.take(left)
            self._reap()
        self._signal(signal.SIGKILL)
        while self._alive():
            ended.take(0.1)
            self._reap()

    def _alive(self) -> bool:
        return any(child.pid is not None for child in self._children)

    def _signal(self, signum: signal.Signals) -> None:
        for child in self._children:
            if child.pid is not None:
                try:
                    os.kill(child.pid, signum)
                except ProcessLookupError:
                    pass

    def _publish(self) -> None:
        """Say who runs, for admin and for people. A full disk is no reason to stop."""
        state = {
            "pid": os.getpid(),
            "children": {
                child.name: {
                    "pid": child.pid,
                    "restarts": child.restarts,
                    "last_end": child.last_end,
                }
                for child in self._children
                if child.keep or child.starts
            },
        }
        path = self._run_dir / CHILDREN_FILE
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(state))
            temporary.rename(path)
        except OSError as error:
            _log("warning", "cannot publish children", error=str(error))


def _log(level: str, event: str, **fields: Any) -> None:
    """One line, as `hbm_sidecar.log` writes it, without its imports."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    line = {"process": "supervisor", **fields, "event": event, "level": level, "timestamp": stamp}
    if sys.stderr.isatty():
        text = " ".join(f"{key}={value}" for key, value in fields.items())
        sys.stderr.write(f"{stamp}Z [{level}] {event} {text} process=supervisor\n")
    else:
        sys.stderr.write(json.dumps(line | {"timestamp": f"{stamp}Z"}) + "\n")
    sys.stderr.flush()


def main() -> None:
    """Entry after exec: `python -m hbm_sidecar.supervisor BLOCK_READY`."""
    run_dir = Path(os.environ["HBM_RUN_DIR"])
    if LOCK_FD in os.environ:
        os.set_inheritable(int(os.environ[LOCK_FD]), False)
    Supervisor(run_dir, os.environ, block_ready=sys.argv[1:] == ["block-ready"]).run()


if __name__ == "__main__":
    main()
