"""Metrics of the router, `hbm_router_*`. docs/metrics-router.md has a row for each.

What every request counts is kept in `tallies`. What can be read off the fleet is read when scraped,
so that series of nodes that have left vanish with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hbm_router.choice import Choice
from hbm_router.tallies import Distribution, Tally
from hbm_router.wire import Refusal

LATENCY_S: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0),
)
DECISION_S: Final = (
    *(1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5),
    *(1e-4, 2e-4, 5e-4, 1e-3),
)
ERROR_S: Final = (
    *(-1.0, -0.25, -0.1, -0.05, -0.025, -0.01, -0.005, -0.001),
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0),
)
OUTCOMES: Final = ("tp", "fp", "fn", "tn")

NodeRow = tuple[str, dict[str, float]]


class _FleetCollector(Collector):
    """Gauges per node, read when scraped."""

    def __init__(self, rows: Callable[[], Iterable[NodeRow]]) -> None:
        self._rows = rows

    def collect(self) -> Iterable[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for name, values in self._rows():
            for key, value in values.items():
                family = families.get(key)
                if family is None:
                    text = NODE_GAUGES[key]
                    family = GaugeMetricFamily(f"hbm_router_{key}", text, labels=["node"])
                    families[key] = family
                family.add_metric([name], value)
        return families.values()


NODE_GAUGES: Final = {
    "node_inflight": "Requests of this router in flight on the node",
    "node_healthy": "1 while the node may be chosen",
    "node_trust": "Belief in the node's last words, 0 to 1",
    "node_kv_precision": "Share of predicted KV hits that came true, moving average",
    "node_connections": "Connections to the node, busy or idle",
    "digest_age_seconds": "Time since the node's last heartbeat was first seen",
    "digest_users": "Users the node says it holds",
    "digest_bytes": "Size of the node's digest",
}


class RouterMetrics:
    """All instruments, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"hbm_router_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"hbm_router_{name}", text, buckets=buckets, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"hbm_router_{name}", text, registry=self.registry)

        def tally(name: str, text: str, *labels: str) -> Tally:
            made = Tally(f"hbm_router_{name}", text, *labels)
            self.registry.register(made)
            return made

        def distribution(name: str, text: str, bounds: tuple[float, ...]) -> Distribution:
            made = Distribution(f"hbm_router_{name}", text, bounds)
            self.registry.register(made)
            return made

        self._requests = tally("requests", "Requests answered, by status", "code")
        self.request_s = distribution(
            "request_duration_seconds", "From the request's head to the last byte", LATENCY_S
        )
        self.upstream_ttfb_s = distribution(
            "upstream_ttfb_seconds", "From sending a request to the response's head", LATENCY_S
        )
        self.decision_s = distribution("decision_duration_seconds", "Choosing a node", DECISION_S)
        self._decisions = tally("decisions", "Requests sent to a node, and why", "node", "why")
        self._errors = counter("errors", "Answers of the router's own, by reason", "reason")
        self._dropped = counter("dropped", "Requests shed, by reason", "reason")
        self.cut_short = counter("responses_cut_short", "Responses broken off amid", "reason")
        self.retries = counter("retries", "Second tries, by reason", "reason")
        self.retries_denied = counter("retries_denied", "Second tries the budget did not allow")
        self.ejections = counter("ejections", "Nodes taken out, by reason", "node", "reason")
        self._kv_predicted = tally(
            "kv_predicted", "KV hits predicted against the server's word", "outcome"
        )
        self.cost_error_s = distribution(
            "cost_error_seconds",
            "Service and queue as the server tells, less the estimate",
            ERROR_S,
        )
        self._sources = tally("length_source", "Where the length of a history came from", "source")
        self.digests_rejected = counter(
            "digest_rejected", "What nodes said and was not believed, by reason", "reason"
        )
        self.digests_accepted = counter("digest_accepted", "Digests taken over")
        self.polls = counter("store_polls", "Reads of Redis, by result", "result")
        self.store_up = gauge("store_up", "1 while Redis answers, 0 while not or not configured")
        self.poll_s = histogram(
            "store_poll_seconds", "One read of Redis, decoding included", LATENCY_S
        )
        self.unmatched_nodes = gauge("store_unmatched_nodes", "Nodes in Redis that are no backend")
        self.snapshot_entries = gauge("snapshot_entries", "(user, node) pairs in the snapshot")
        self.client_connections = gauge("client_connections", "Open client connections")
        self.inflight = gauge("inflight", "Requests in flight")
        self.memory_users = gauge("memory_users", "Users whose history length is remembered")
        self.speculative_users = gauge("speculative_users", "Users that count as resident by route")
        self.panic = gauge("panic", "1 while too few nodes are healthy and health is ignored")
        self.loop_lag_s = histogram("event_loop_lag_seconds", "Lateness of a timer", LATENCY_S)

        self.discovery_up = gauge("discovery_up", "1 while the watch of EndpointSlices stands")
        self.discovery_failures = counter("discovery_failures", "Watches that failed")
        self.endpoints = Gauge(
            "hbm_router_endpoints",
            "Endpoints of the Service, by state",
            ("state",),
            registry=self.registry,
        )
        self.kube_requests = counter(
            "kube_requests", "Requests to the Kubernetes API; code 0: no answer", "verb", "code"
        )

        for outcome in OUTCOMES:
            self._kv_predicted.counts[(outcome,)] = 0

    def watch_fleet(self, rows: Callable[[], Iterable[NodeRow]]) -> None:
        """Adds the gauges per node."""
        self.registry.register(_FleetCollector(rows))

    def finished(self, status: int, seconds: float) -> None:
        """A request has been answered, or its client has left (499)."""
        self._requests.counts[(str(status),)] += 1
        self.request_s.observe(seconds)

    def decided(self, choice: Choice, seconds: float) -> None:
        """A node has been chosen."""
        self._decisions.counts[(choice.node.name, choice.why)] += 1
        self._sources.counts[(choice.facts.source,)] += 1
        self.decision_s.observe(seconds)

    def predicted(self, outcome: str) -> None:
        """A server has said whether a predicted hit (`p`) or miss (`n`) was right (`t`) or not."""
        self._kv_predicted.counts[(outcome,)] += 1

    def refused(self, refusal: Refusal) -> None:
        """The router answers by itself."""
        (self._dropped if refusal.dropped else self._errors).labels(refusal.reason).inc()

    def forget_node(self, name: str) -> None:
        """Drops the series of a node that has left."""
        counts = self._decisions.counts
        for key in [key for key in counts if key[0] == name]:
            del counts[key]
