"""Metrics `hbm_webhook_*` (docs/metrics-operator.md). Label sets are bounded."""

from __future__ import annotations

from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)

MAX_NAMESPACES: Final = 200
OTHER_NAMESPACES: Final = "other"
"""Stands for all namespaces beyond the first `MAX_NAMESPACES`."""

_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class WebhookMetrics:
    """The webhook's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "hbm_webhook_requests",
            "Admission requests by HTTP status.",
            ["code"],
            registry=self.registry,
        )
        self.injections = Counter(
            "hbm_webhook_injections",
            "Pods by what became of them.",
            ["namespace", "result", "reason"],
            registry=self.registry,
        )
        self.duration = Histogram(
            "hbm_webhook_request_duration_seconds",
            "From the complete request to the answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.certificate_expiry = Gauge(
            "hbm_webhook_certificate_expiry_timestamp_seconds",
            "When the certificate that is served expires.",
            registry=self.registry,
        )
        self.certificate_loads = Counter(
            "hbm_webhook_certificate_loads",
            "Certificate files taken over, or refused while the old ones serve on.",
            ["result"],
            registry=self.registry,
        )
        self._namespaces: set[str] = set()

    def count_pod(self, namespace: str, result: str, reason: str) -> None:
        """Counts one pod. The first `MAX_NAMESPACES` namespaces have a series of their own."""
        if namespace not in self._namespaces:
            if len(self._namespaces) < MAX_NAMESPACES:
                self._namespaces.add(namespace)
            else:
                namespace = OTHER_NAMESPACES
        self.injections.labels(namespace, result, reason).inc()
