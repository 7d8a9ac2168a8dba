"""A long-running program that outlives the command that started it and is never mistaken."""

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hbm_e2e.errors import HarnessError
from hbm_e2e.waiting import wait_for


class Daemon:
    """One program with its log, and a pid file that also holds the start time.

    Any process may stop what another one started; a recycled pid is never signalled.
    """

    def __init__(self, name: str, command: Sequence[str | Path], folder: Path) -> None:
        self.name = name
        self.log = folder / "logs" / f"{name}.log"
        self._command = [str(word) for word in command]
        self._pid_file = folder / "run" / f"{name}.pid"
        self._launcher: subprocess.Popen[bytes] | None = None

    def start(
        self,
        *,
        enter: Sequence[str] = (),
        forks: bool = False,
        environ: dict[str, str] | None = None,
    ) -> None:
        """Start unless running. `enter` goes before the command; with `forks` it runs the command
        as its child (`nsenter --pid` does), and that child is the daemon."""
        if self.alive:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._pid_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._launcher = subprocess.Popen(
                [*enter, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **(environ or {})},
            )
        pid = self._launcher.pid
        if forks:
            pid = wait_for(lambda: self._child_of(pid), 10, f"{self.name} to start")
        started = _start_time(pid)
        if started is None:
            raise HarnessError(f"{self.name} ended at once: {self.last_words()}")
        self._pid_file.write_text(json.dumps({"pid": pid, "started": started}))

    @property
    def pid(self) -> int | None:
        """Pid in the initial namespace, None when not running."""
        try:
            known = json.loads(self._pid_file.read_text())
        except (OSError, ValueError):
            return None
        if self._launcher is not None:
            self._launcher.poll()  # reaps it, if it is ours and dead
        return known["pid"] if _start_time(known["pid"]) == known["started"] else None

    @property
    def alive(self) -> bool:
        return self.pid is not None

    def send(self, number: signal.Signals) -> None:
        pid = self.pid
        if pid is None:
            raise HarnessError(f"{self.name} is not running")
        os.kill(pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone; nothing happens when it does not run."""
        self._end(signal.SIGKILL, 10)

    def stop(self, grace_s: float = 10) -> None:
        """SIGTERM, then SIGKILL after `grace_s`; nothing happens when it does not run."""
        if not self._end(signal.SIGTERM, grace_s):
            self.kill()

    def _end(self, number: signal.Signals, timeout_s: float) -> bool:
        pid = self.pid
        if pid is None:
            return True
        os.kill(pid, number)
        try:
            wait_for(lambda: not self.alive, timeout_s, f"{self.name} to end", every_s=0.02)
        except HarnessError:
            return False
        self._pid_file.unlink(missing_ok=True)
        return True

    def last_words(self, lines: int = 3) -> str:
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return "no log"
        return " | ".join(text.strip().splitlines()[-lines:]) or "no output"

    def _child_of(self, pid: int) -> int | None:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            children = []
        if not children and self._launcher is not None and self._launcher.poll() is not None:
            raise HarnessError(f"{self.name} ended at once: {self.last_words()}")
        return int(children[0]) if children else None


def _start_time(pid: int) -> int | None:
    """Clock tick at which the process started; None for no process or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])
