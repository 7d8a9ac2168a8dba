"""What admin knows: it reads both files of the control block and keeps the last good values.

Either file may be missing, foreign or damaged at any time; that is counted, said once, and looked
at again later. Nothing here blocks: a call costs some microseconds and at most a remapping.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from hbm_policy import Reason
from hbm_pool.contracts.control_block import (
    ControlBlockError,
    ControlBlockMissing,
    ServerView,
    SidecarBlock,
    SidecarView,
    age_s,
)
from hbm_pool.contracts.records import CURVES, TELEMETRY

from hbm_sidecar.explain import reason_codes, starts_move
from hbm_sidecar.metrics import SidecarMetrics
from hbm_sidecar.residency import ResidencyMirror
from hbm_sidecar.supervisor import CHILDREN_FILE

T = TypeVar("T")

DECISIONS_READ: Final = 256
_CHANGES: Final = int(
    Reason.SERVER_RESTARTED
    | Reason.MOVE_STARTED
    | Reason.MOVE_FINISHED
    | Reason.MOVE_STOPPED
    | Reason.BOUNDED
    | Reason.SERVER_LIMITED
)
SNAPSHOT_RETRY_S: Final = 1.0
"""A snapshot that has been asked for and did not come is asked for again."""
REOPEN_S: Final = 0.25


class Growth:
    """Turns a number that starts again from 0 with its process into increments of a counter."""

    def __init__(self) -> None:
        self._last = 0

    def to(self, value: int) -> int:
        """What has been added since the last call."""
        added = value - self._last if value >= self._last else value
        self._last = value
        return added


class Observer:
    """Views of both files, the residency mirror, and the metrics that follow from them.

    `clock_ns` is CLOCK_MONOTONIC in nanoseconds.
    """

    def __init__(
        self,
        run_dir: Path,
        stale_s: float,
        metrics: SidecarMetrics,
        log: Any,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.run_dir = run_dir
        self.telemetry = np.zeros((), dtype=TELEMETRY)
        self.curves = np.zeros((), dtype=CURVES)
        self.mirror = ResidencyMirror()
        self.server: ServerView | None = None
        self.sidecar: SidecarView | None = None
        self.problems: dict[str, str] = {}
        """Why a file cannot be used, by file name."""
        self.block: SidecarBlock | None = None
        """Admin's own regions of sidecar.cb: intent and the word that asks for a snapshot."""
        self._stale_s = stale_s
        self._metrics = metrics
        self._log = log
        self._clock_ns = clock_ns
        self._reopen_at_ns = 0
        self._asked_at_ns = 0
        self._last_tick = -1
        # What was decided before this process began has been counted by the one before it.
        self._last_decision_ns = clock_ns()
        self._decided = False
        self.intent_generation = 0
        """Of the wish that the newest decision followed; 0: no decision was seen yet."""
        self.intent_followed_ns = 0
        """Time of the first decision that followed it, as far as seen."""
        self.anchor = self.target = math.nan
        """Of the newest decision."""
        self.last_change: np.ndarray | None = None
        """The newest decision that started, ended or bent a move, `()` of dtype DECISION."""
        self._children: dict[str, Growth] = {}
        self._twin_requests, self._twin_lost = Growth(), Growth()

    # -- state -----------------------------------------------------------------------------------

    def telemetry_age_s(self) -> float:
        """Age of the newest telemetry, infinite before the first."""
        return age_s(self.telemetry)

    def server_fresh(self) -> bool:
        """Whether the server has spoken within the limit."""
        return age_s(self.telemetry) <= self._stale_s

    # -- one look --------------------------------------------------------------------------------

    def look(self, snapshot_refresh_s: float) -> None:
        """Bring everything up to date: views, telemetry, residency, decisions, metrics."""
        self._open()
        if self.server is not None:
            self._guard("server.cb", lambda: self._look_at_server(snapshot_refresh_s))
        if self.sidecar is not None:
            self._guard("sidecar.cb", self._look_at_sidecar)
        self._look_at_children()
        self._metrics.telemetry_age.set(self.telemetry_age_s())
        self._metrics.server_up.set(self.server_fresh())
        self._metrics.residency_users.set(len(self.mirror))
        self._metrics.residency_exact.set(self.mirror.exact)

    def _open(self) -> None:
        if self.block is not None and self.block.replaced():
            self.block, self._reopen_at_ns = None, 0
            self._asked_at_ns = 0  # a snapshot asked for in the old file will not come
        now = self._clock_ns()
        if now < self._reopen_at_ns:
            return
        self._reopen_at_ns = now + int(REOPEN_S * 1e9)
        if self.server is None:
            self.server = self._attempt("server.cb", lambda: ServerView.open(self.run_dir))
        if self.sidecar is None:
            self.sidecar = self._attempt("sidecar.cb", lambda: SidecarView.open(self.run_dir))
        if self.block is None:
            self.block = self._attempt("sidecar.cb", lambda: SidecarBlock.open(self.run_dir))

    def _attempt(self, file: str, opening: Callable[[], T]) -> T | None:
        try:
            opened = opening()
        except (ControlBlockError, OSError) as error:
            self._refuse(file, error)
            return None
        if self.problems.pop(file, None) is not None:
            self._log.info("control block usable", file=file)
        return opened

    def _guard(self, file: str, look: Callable[[], None]) -> None:
        """Run `look`; a file that turned bad under us is dropped and opened again later."""
        try:
            look()
        except (ControlBlockError, OSError) as error:
            self._refuse(file, error)
            if file == "server.cb":
                self.server = None
            else:
                self.sidecar = None

    def _refuse(self, file: str, error: Exception) -> None:
        text = str(error)
        if not isinstance(error, ControlBlockMissing):
            self._metrics.block_errors.labels(file).inc()
        if self.problems.get(file) != text:
            self._log.warning("control block not usable", file=file, why=text)
        self.problems[file] = text

    def _look_at_server(self, snapshot_refresh_s: float) -> None:
        server, mirror = self.server, self.mirror
        assert server is not None
        server.refresh()
        if not server.read_telemetry(self.telemetry):
            return
        newest = int(self.telemetry["residency_sequence"])
        if server.boot_epoch != mirror.boot_epoch:
            self._log.info("server seen", boot_epoch=server.boot_epoch, node=server.info.node)
            self._metrics.server_boots.inc()
            mirror.restart(server.boot_epoch, newest)
            self._asked_at_ns = 0
        gaps, snapshots = mirror.gaps, mirror.snapshots
        events, gap = server.read_residency()
        mirror.feed(events, gap, newest)
        self._metrics.residency_gaps.inc(mirror.gaps - gaps)
        if mirror.gaps > gaps:
            self._log.warning("gap in the residency ring; asking for a snapshot")
            self._asked_at_ns = 0
        snapshot = server.read_snapshot()
        if snapshot is not None:
            mirror.take(snapshot)
        self._metrics.snapshots_taken.inc(mirror.snapshots - snapshots)
        self._ask_for_snapshot(snapshot_refresh_s)

    def _ask_for_snapshot(self, refresh_s: float) -> None:
        wait_s = SNAPSHOT_RETRY_S if not self.mirror.exact else refresh_s
        now = self._clock_ns()
        if self.block is None or not self.server_fresh() or wait_s == 0.0:
            return
        if self._asked_at_ns and now - self._asked_at_ns < int(wait_s * 1e9):
            return
        self.block.request_snapshot()
        self._asked_at_ns = now
        self._metrics.snapshots_asked.inc()

    def _look_at_sidecar(self) -> None:
        view, metrics = self.sidecar, self._metrics
        assert view is not None
        view.refresh()
        if view.read_curves(self.curves):
            metrics.curve_age.set(age_s(self.curves))
            metrics.twin_warm.set(float(self.curves["warm"]))
            metrics.twin_requests.inc(self._twin_requests.to(int(self.curves["requests"])))
            metrics.ring_lost.inc(self._twin_lost.to(int(self.curves["requests_lost"])))
        records = view.read_decisions(DECISIONS_READ)
        fresh = records[records["monotonic_ns"] > self._last_decision_ns]
        if len(fresh) == 0:
            return
        # Ticks of a dead server are not logged, so a jump alone does not mean a loss.
        skipped = int(fresh[0]["tick"]) - self._last_tick - 1
        if len(fresh) == DECISIONS_READ and self._last_tick >= 0 and skipped > 0:
            metrics.decisions_unseen.inc(skipped)
        for record in fresh:
            metrics.decisions.inc()
            metrics.decision_latency.observe(float(record["latency_us"]) * 1e-6)
            metrics.decision_due.observe(float(record["due_us"]) * 1e-6)
            if starts_move(record):
                metrics.moves.inc()
            for code in reason_codes(int(record["reasons"])):
                metrics.decision_reasons.labels(code).inc()
            if int(record["intent_generation"]) != self.intent_generation:
                self.intent_generation = int(record["intent_generation"])
                self.intent_followed_ns = int(record["monotonic_ns"])
            if int(record["reasons"]) & _CHANGES:
                self.last_change = record.copy()
        newest = fresh[-1]
        self._last_tick = int(newest["tick"])
        self._last_decision_ns, self._decided = int(newest["monotonic_ns"]), True
        self.anchor, self.target = float(newest["anchor"]), float(newest["target"])
        metrics.alpha.set(float(newest["alpha"]))
        metrics.anchor.set(self.anchor)
        metrics.target.set(self.target)
        metrics.gain.set(float(newest["gain"]))

    def decision_age_s(self) -> float:
        """Time since the newest decision, NaN before the first."""
        if not self._decided:
            return math.nan
        return (self._clock_ns() - self._last_decision_ns) / 1e9

    def children(self) -> dict[str, Any]:
        """What the supervisor last said of its children; empty when it said nothing."""
        try:
            said = json.loads((self.run_dir / CHILDREN_FILE).read_bytes())
            children: dict[str, Any] = said["children"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return children

    def _look_at_children(self) -> None:
        for name, child in self.children().items():
            growth = self._children.setdefault(name, Growth())
            self._metrics.child_restarts.labels(name).inc(growth.to(int(child["restarts"])))
