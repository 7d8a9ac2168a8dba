"""Metrics `hbm_operator_*` of the controller (docs/metrics-operator.md). Label sets are bounded."""

from __future__ import annotations

import time
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class ControllerMetrics:
    """The controller's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.reconciles = Counter(
            "hbm_operator_reconcile",
            "Looks at one object, by kind and what came of it.",
            ["kind", "result"],
            registry=self.registry,
        )
        self.duration = Histogram(
            "hbm_operator_reconcile_duration_seconds",
            "One look at one object, requests included.",
            ["kind"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "hbm_operator_queue_depth",
            "Objects that are due to be looked at or are being looked at.",
            registry=self.registry,
        )
        self.watch_activity = Gauge(
            "hbm_operator_watch_last_event_timestamp_seconds",
            "When a watch was last heard of, bookmarks included.",
            ["resource"],
            registry=self.registry,
        )
        self.api_requests = Counter(
            "hbm_operator_api_requests",
            "Requests to the API server by verb and HTTP status; code 0: no answer.",
            ["verb", "resource", "code"],
            registry=self.registry,
        )
        self.api_duration = Histogram(
            "hbm_operator_api_request_duration_seconds",
            "One request to the API server.",
            ["verb"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.partitions = Gauge(
            "hbm_operator_partitions",
            "Partitions by condition and its status.",
            ["condition", "status"],
            registry=self.registry,
        )
        self.degraded = Gauge(
            "hbm_operator_partitions_degraded",
            "Partitions whose Degraded is True, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.not_injected = Gauge(
            "hbm_operator_not_injected_pods",
            "Pods that ask for the sidecar and run without it, by reason; `webhook-missed`: the "
            "webhook did not answer for them.",
            ["reason"],
            registry=self.registry,
        )
        self.events = Counter(
            "hbm_operator_events",
            "Kubernetes events by result: written, repeated, failed or dropped.",
            ["result"],
            registry=self.registry,
        )
        self.redis_up = Gauge(
            "hbm_operator_redis_up",
            "1 while Redis answers the controller; no series where there is none.",
            ["mode"],
            registry=self.registry,
        )
        self.tenants = Gauge(
            "hbm_operator_redis_tenants",
            "Namespaces with a Redis user of their own.",
            registry=self.registry,
        )
        self.started = Gauge(
            "hbm_operator_start_time_seconds",
            "When the controller began to work, after its first look at everything.",
            registry=self.registry,
        )

    def heard(self, resource: str) -> None:
        """A watch of `resource` said something."""
        self.watch_activity.labels(resource).set(time.time())
