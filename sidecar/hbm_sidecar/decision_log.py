"""The file that takes every decision, on request, for `hbm replay-decisions`.

Written by decide behind its tick, when nothing waits for it any more. It is bounded: a file that is
full becomes PATH.1, and a new one begins with the whole state, so that each can be replayed alone.
What cannot be written switches the log off and says so; decisions go on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hbm_policy import Decision, Policy, PolicyState, Reading
from hbm_policy.replay import Recorder


class DecisionLog:
    """One log. `limit_bytes`: of one file; two are kept."""

    def __init__(self, path: Path, limit_bytes: int, log: Any) -> None:
        self._path = path
        self._limit = limit_bytes
        self._log = log
        self._recorder = Recorder()
        self._fd = -1
        self._written = 0
        self._policy: Policy | None = None
        self._off = False

    def add(
        self,
        policy: Policy,
        residual: str,
        before: PolicyState,
        reading: Reading,
        decision: Decision,
    ) -> None:
        """One decision of `policy` on (`reading`, `before`); `residual`: digits of its hash."""
        if self._off:
            return
        try:
            if self._fd < 0 or self._written >= self._limit:
                self._open()
            if policy is not self._policy:
                self._policy = policy
                self._write(self._recorder.start(policy.config, residual, before))
            self._write(self._recorder.tick(reading, decision))
        except OSError as error:
            self._off = True
            self._log.warning(
                "decisions are not logged any more", file=str(self._path), why=str(error)
            )

    def _open(self) -> None:
        """A file of its own for this process: what another one left becomes PATH.1."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._path.exists():
            self._path.rename(self._path.with_name(f"{self._path.name}.1"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o644)
        self._written, self._policy = 0, None

    def _write(self, line: str) -> None:
        """One write per line: a kill leaves whole lines but for the last."""
        raw = line.encode()
        done = os.write(self._fd, raw)
        self._written += done
        if done != len(raw):
            raise OSError(28, "no room for a whole line")
