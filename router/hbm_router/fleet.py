"""The backends as the router sees them now: health, requests in flight, connections.

Owned by the event loop of the data path. Requests hold `Node` objects, not indices, so that a
node may leave while requests are in flight on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hbm_router.discovery import Backend
from hbm_router.hashring import HashRing

if TYPE_CHECKING:
    from hbm_router.upstream import UpstreamPool


class Node:
    """One backend. `index` is its place in `Fleet.nodes`, -1 once it has left."""

    __slots__ = (
        "backend",
        "before_ms",
        "consecutive_failures",
        "ejected_until_s",
        "ejections",
        "era",
        "index",
        "inflight",
        "inflight_ms",
        "kv_precision",
        "name",
        "pool",
        "probe_failures",
        "probe_successes",
        "probed_down",
        "unreachable",
    )

    def __init__(self, backend: Backend, index: int) -> None:
        self.backend = backend
        self.name = backend.name
        self.index = index
        self.pool: UpstreamPool | None = None
        # Load that this router knows first hand.
        self.inflight = 0
        self.inflight_ms = 0.0  # estimated work of the requests in flight
        self.before_ms = 0.0  # the part of it that was sent before the node's last heartbeat
        self.era = 0  # heartbeats seen
        self.kv_precision = 0.98  # share of predicted KV hits that came true, moving average
        # Health, kept by `outlier`.
        self.unreachable = False  # refused or failed the last connection
        self.probed_down = False
        self.probe_failures = 0
        self.probe_successes = 0
        self.consecutive_failures = 0
        self.ejections = 0
        self.ejected_until_s = 0.0

    def heard(self) -> None:
        """A heartbeat came in: what is in flight now is part of the queue it reports."""
        self.era += 1
        self.before_ms = self.inflight_ms


class Ticket(NamedTuple):
    """A request in flight on a node; given back exactly once."""

    node: Node
    work_ms: float
    era: int
    user_key: int | None = None
    """Digest key of the user; `None` for an anonymous request."""
    history_tokens: int = 0


class Fleet:
    """All nodes, their ring, and what is in flight on them."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.names: tuple[str, ...] = ()
        self.by_name: dict[str, Node] = {}
        self.ring = HashRing(())
        self.inflight = 0
        self.health_version = 0
        """Grows when a node's health or the list of nodes changes."""

    def update(
        self, backends: Sequence[Backend], left: Callable[[Node], None] | None = None
    ) -> None:
        """Takes over a new list; nodes with the same name and address keep their state."""
        old = self.by_name
        nodes: list[Node] = []
        for index, backend in enumerate(backends):
            node = old.get(backend.name)
            if node is None or node.backend != backend:
                node = Node(backend, index)
            node.index = index
            nodes.append(node)
        kept = {id(node) for node in nodes}
        for node in self.nodes:
            if id(node) not in kept:
                node.index = -1
                if left is not None:
                    left(node)
        self.nodes = nodes
        self.by_name = {node.name: node for node in nodes}
        names = tuple(node.name for node in nodes)
        if names != self.names:
            self.names = names
            self.ring = HashRing(names)
        self.health_version += 1

    def admit(
        self, node: Node, work_ms: float, user_key: int | None = None, history_tokens: int = 0
    ) -> Ticket:
        """Counts a request onto a node."""
        node.inflight += 1
        node.inflight_ms += work_ms
        self.inflight += 1
        return Ticket(node, work_ms, node.era, user_key, history_tokens)

    def release(self, ticket: Ticket) -> None:
        """Takes it off again."""
        node = ticket.node
        self.inflight -= 1
        node.inflight -= 1
        assert node.inflight >= 0, f"node {node.name} gave back more requests than it took"
        if node.inflight == 0:  # no drift from adding and subtracting floats
            node.inflight_ms = 0.0
            node.before_ms = 0.0
            return
        node.inflight_ms = max(0.0, node.inflight_ms - ticket.work_ms)
        if ticket.era != node.era:
            node.before_ms = max(0.0, node.before_ms - ticket.work_ms)
