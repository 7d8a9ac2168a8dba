"""`hbm_serving_*` and `hbm_pool_*` for Prometheus: every name has a row in docs/metrics.md.

What the pool counts is read when scraped; only answers and latencies are recorded per request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram
from prometheus_client import generate_latest as _latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.35, 0.6, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip


class Sample(NamedTuple):
    """One value of a metric that is read when scraped."""

    name: str
    help: str
    kind: str  # "counter" | "gauge"
    value: float
    labels: tuple[tuple[str, str], ...] = ()


class _Scraped(Collector):
    def __init__(self, read: Callable[[], Iterable[Sample]]) -> None:
        self._read = read

    def describe(self) -> list[Metric]:
        return []  # keeps registration from reading values before the server is up

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for sample in self._read():
            family = families.get(sample.name)
            if family is None:
                kind = CounterMetricFamily if sample.kind == "counter" else GaugeMetricFamily
                labels = [label for label, _ in sample.labels]
                family = families[sample.name] = kind(sample.name, sample.help, labels=labels)
            assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
            family.add_metric([value for _, value in sample.labels], sample.value)
        return families.values()


class Metrics:
    """The registry of one server (no global one, so that several can live in a process)."""

    def __init__(self, read: Callable[[], Iterable[Sample]]) -> None:
        self.registry = CollectorRegistry()
        self._answers = Counter(
            "hbm_serving_requests",
            "Answered HTTP requests.",
            ["endpoint", "code"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "hbm_serving_request_seconds",
            "Time from the request line to the answer, scored requests only.",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._counters: dict[tuple[str, int], Counter] = {}
        self.registry.register(_Scraped(read))

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Counts one answer; both labels come from small fixed sets."""
        key = endpoint, status
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = self._answers.labels(endpoint, str(status))
        counter.inc()
        if status == 200 and endpoint in ("rank", "oip_infer"):
            self._seconds.observe(seconds)

    def render(self) -> tuple[bytes, str]:
        """Body and content type of `/metrics`."""
        return _latest(self.registry), CONTENT_TYPE_LATEST
