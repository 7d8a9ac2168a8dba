"""What a choice is made on, what it is, and how it is told."""

from __future__ import annotations

from typing import Final, NamedTuple

from hbm_router import wire
from hbm_router.fleet import Node


class Facts(NamedTuple):
    """What is known about a request without reading its body."""

    user: int | None
    """Signed 64-bit user hash; `None` for an anonymous request."""
    history_tokens: int
    candidates: int
    source: str
    deadline_ms: float | None = None
    shards: tuple[int, ...] = ()


class Choice(NamedTuple):
    """Where a request goes, and why."""

    node: Node
    est_ms: float | None
    """Expected cost there, queue included; `None` where nothing is known."""
    work_ms: float
    """The part of it that occupies the node."""
    hit_probability: float
    kv: str
    why: str
    facts: Facts
    """What the choice was made on."""

    def header_lines(self, *, retried: bool) -> bytes:
        """X-HBM-Node and X-HBM-Decision, ready to be sent."""
        est = "" if self.est_ms is None else f"est_ms={self.est_ms:.1f};"
        retry = ";retry=1" if retried else ""
        return (
            f"{_NODE}: {self.node.name}\r\n"
            f"{_DECISION}: kv={self.kv};{est}why={self.why};source={self.facts.source}{retry}\r\n"
        ).encode()


_NODE: Final = wire.NODE.decode()
_DECISION: Final = wire.DECISION.decode()


class NodeCost(NamedTuple):
    """One node's line in an explanation."""

    name: str
    usable: bool
    cost_ms: float | None
    queue_ms: float
    own_ms: float
    hit_probability: float
    cached_tokens: int
    trust: float
    inflight: int
    score: float | None
