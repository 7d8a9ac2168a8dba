"""Which nodes may be used: what requests and health checks have shown.

A node is out for one of three reasons, each with its own way back:

* unreachable: a connection was refused. A fact, not an opinion: out at once. Back when
  `probe_successes` health checks succeeded, or after the ejection time where there are no checks.
  A connection that *times out* may be a busy node's and counts as one failed request.
* probed down: `probe_failures` health checks in a row failed. Back after `probe_successes` good
  ones.
* ejected: `outlier_failures` requests in a row failed (502 of ours, 504, or the backend's own 500,
  502, 504). Back after a time that doubles with each further ejection: a node whose health check
  is fine but whose answers are not would otherwise return at once. 503 and 429 are a busy node's
  honest answer and count neither way.

Panic (Envoy's rule): with less than `panic_ratio` of the nodes healthy the verdicts are more
likely to be wrong than right, or the few would drown; then all but the unreachable are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hbm_router.config import RouterSettings
from hbm_router.fleet import Fleet, Node

FAILURE_STATUS: Final = frozenset({500, 502, 504})
NEUTRAL_STATUS: Final = frozenset({429, 503})


class OutlierDetector:
    """Keeps the health fields of nodes. Lives on the data path's event loop."""

    def __init__(
        self,
        fleet: Fleet,
        settings: RouterSettings,
        clock: Callable[[], float],
        ejected: Callable[[Node, str], None] = lambda node, reason: None,
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._clock = clock
        self._on_ejected = ejected
        self._usable: list[bool] = []
        self._version = -1
        self._next_return_s = 0.0
        self.panic = False
        self.version = 0
        """Grows whenever `usable` changes."""

    # -- evidence

    def answered(self, node: Node, status: int) -> None:
        """A response head came."""
        if status in FAILURE_STATUS:
            self.failed(node)
        elif status not in NEUTRAL_STATUS:
            node.consecutive_failures = 0
            if node.ejected_until_s <= self._clock():
                node.ejections = 0

    def failed(self, node: Node) -> None:
        """A request to the node failed after it had been connected."""
        node.consecutive_failures += 1
        if node.consecutive_failures >= self._settings.outlier_failures:
            self._eject(node, "failures")

    def reached(self, node: Node) -> None:
        """A connection was made for a request, or enough health checks succeeded."""
        if node.unreachable:
            node.unreachable = False
            node.ejected_until_s = 0.0
            self._fleet.health_version += 1

    def unreachable(self, node: Node) -> None:
        """A connection was refused: nobody listens there."""
        now_s = self._clock()
        if not node.unreachable or node.ejected_until_s <= now_s:
            node.ejected_until_s = now_s + self._settings.ejection_s
            self._fleet.health_version += 1
        if not node.unreachable:
            node.unreachable = True
            self._on_ejected(node, "unreachable")

    def probed(self, node: Node, *, reachable: bool, good: bool) -> None:
        """A health check ended."""
        if not reachable:
            self.unreachable(node)
        if good:
            node.probe_failures = 0
            node.probe_successes += 1
            if node.probe_successes >= self._settings.probe_successes:
                self.reached(node)
                if node.probed_down:
                    node.probed_down = False
                    self._fleet.health_version += 1
        else:
            node.probe_successes = 0
            node.probe_failures += 1
            if node.probe_failures >= self._settings.probe_failures and not node.probed_down:
                node.probed_down = True
                self._fleet.health_version += 1
                self._on_ejected(node, "probe")

    def _eject(self, node: Node, reason: str) -> None:
        settings = self._settings
        duration_s = min(settings.max_ejection_s, settings.ejection_s * 2.0**node.ejections)
        node.ejections = min(node.ejections + 1, 30)
        node.consecutive_failures = 0
        node.ejected_until_s = self._clock() + duration_s
        self._fleet.health_version += 1
        self._on_ejected(node, reason)

    # -- verdict

    def healthy(self, node: Node, now_s: float) -> bool:
        """The verdict on one node, panic aside."""
        if node.probed_down:
            return False
        if node.unreachable and self._settings.probe_interval_s > 0:
            return False
        return node.ejected_until_s <= now_s

    def usable(self, now_s: float) -> list[bool]:
        """Per index of `fleet.nodes`: may it get requests? The list is not to be changed."""
        if self._version == self._fleet.health_version and now_s < self._next_return_s:
            return self._usable
        nodes = self._fleet.nodes
        healthy = [self.healthy(node, now_s) for node in nodes]
        self.panic = bool(nodes) and sum(healthy) < self._settings.panic_ratio * len(nodes)
        if self.panic:
            reachable = [not node.unreachable for node in nodes]
            healthy = reachable if any(reachable) else [True] * len(nodes)
        if healthy != self._usable or self._version != self._fleet.health_version:
            self._usable = healthy
            self.version += 1
        self._version = self._fleet.health_version
        self._next_return_s = min(
            (node.ejected_until_s for node in nodes if node.ejected_until_s > now_s),
            default=float("inf"),
        )
        return self._usable


class RetryBudget:
    """Second tries as a share of requests, so that retries cannot amplify an overload.

    A bucket: each request adds `ratio`, each retry takes 1. It starts full at `burst`, so that
    one dying node's requests in flight find room.
    """

    def __init__(self, ratio: float, burst: float = 100.0) -> None:
        self._ratio = ratio
        self._burst = burst if ratio > 0 else 0.0
        self.tokens = self._burst

    def earn(self) -> None:
        """A request came in."""
        if self.tokens < self._burst:
            self.tokens += self._ratio

    def spend(self) -> bool:
        """Takes one retry out of the budget, if there is one."""
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True
