"""What the nodes say about themselves while they serve: their control blocks, read several times a
second. Reading is a memory map: it costs the nodes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_policy.costs import CostConstants, DeclaredCosts
from hbm_pool.contracts.control_block import ControlBlockError, ServerView, SidecarView
from hbm_pool.contracts.records import DECISION, TELEMETRY, ServerInfo

from hbm_demo.system import Node

COUNTERS: Final = (
    "requests",
    "errors",
    "overloads",
    "uncached_requests",
    "kv_lookups",
    "kv_hits",
    "kv_tokens_reused",
    "kv_tokens_computed",
    "kv_evicted_users",
    "emb_accesses",
    "emb_misses",
    "emb_evictions",
    "gather_ms",
    "compute_ms",
    "service_ms",
    "foreground_bytes",
    "refill_bytes",
    "moves",
    "moved_extents",
    "relocated_rows",
)
_GAUGES: Final = ("alpha", "alpha_target", "queue_depth", "link_busy", "kv_users")
_MAX_DECISIONS: Final = 64


class NodeSample(NamedTuple):
    """One look at one node. Counters are cumulative since its start."""

    time_s: float  # since the start of the load
    node: str
    alpha: float
    alpha_target: float
    anchor: float  # α̂; NaN while unknown
    queue_depth: float
    link_busy: float
    kv_users: float
    counters: dict[str, float]


class NodeDescription(NamedTuple):
    """What a sweep needs to know of a node."""

    info: ServerInfo
    costs: CostConstants


class NodeObserver:
    """Looks at one node. Its parts may be missing or restart: then the last values stay."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._server: ServerView | None = None
        self._sidecar: SidecarView | None = None
        self._telemetry: npt.NDArray[Any] = np.zeros((), dtype=TELEMETRY)
        self._anchor = float("nan")
        self._newest_ns = 0
        self.decisions: list[npt.NDArray[Any]] = []

    def sample(self, time_s: float) -> NodeSample | None:
        """The node now; None before its server has published anything."""
        self._server = _view(self._server, ServerView, self.node.run_dir)
        self._sidecar = _view(self._sidecar, SidecarView, self.node.run_dir)
        self._read_decisions()
        if self._server is None or not self._server.read_telemetry(self._telemetry):
            return None
        record = self._telemetry
        gauges = {name: float(record[name]) for name in _GAUGES}
        return NodeSample(
            time_s=time_s,
            node=self.node.name,
            anchor=self._anchor,
            counters={name: float(record[name]) for name in COUNTERS},
            **gauges,
        )

    def described(self) -> NodeDescription | None:
        """What the node is and what it declares its work to cost; None when it never said."""
        costs = DeclaredCosts().constants(self._telemetry)
        if self._server is None or costs is None:
            return None
        return NodeDescription(self._server.info, costs)

    def all_decisions(self) -> npt.NDArray[Any]:
        """Every decision seen, `[n] DECISION`, in order."""
        if not self.decisions:
            return np.empty(0, dtype=DECISION)
        return np.concatenate(self.decisions)

    def _read_decisions(self) -> None:
        if self._sidecar is None:
            return
        newest = self._sidecar.read_decisions(_MAX_DECISIONS)
        fresh = newest[newest["monotonic_ns"] > self._newest_ns]
        if len(fresh):
            self._newest_ns = int(fresh["monotonic_ns"][-1])
            self._anchor = float(fresh["anchor"][-1])
            self.decisions.append(fresh)


def _view(view: Any, kind: Any, directory: Path) -> Any:
    """The view, mapped anew when its owner restarted; what there was when that fails."""
    try:
        if view is None:
            return kind.open(directory)
        view.refresh()
    except (ControlBlockError, OSError):
        pass
    return view
