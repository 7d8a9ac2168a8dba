"""Numbers of the data path's own: plain integers of one thread, turned into metrics when scraped.

A counter of prometheus-client takes a lock and costs about half a microsecond; a request counts a
dozen times. Only the event loop of the data path writes these; any thread may read them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Tally(Collector):
    """A counter by label values: `counts[values] += 1`."""

    def __init__(self, name: str, text: str, *labels: str) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self.counts: defaultdict[tuple[str, ...], int] = defaultdict(int)

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, count in list(self.counts.items()):
            family.add_metric(values, count)
        yield family


class Distribution(Collector):
    """A histogram without labels."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name = name
        self._text = text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one value; a bound belongs to the bucket below it."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[Metric]:
        buckets: list[tuple[str, float]] = []
        below = 0
        bounds = (*self._bounds, float("inf"))
        for bound, count in zip(bounds, list(self._counts), strict=True):
            below += count
            buckets.append((floatToGoString(bound), below))  # type: ignore[no-untyped-call]
        family = HistogramMetricFamily(self._name, self._text)
        family.add_metric([], buckets, self._sum)
        if self._bounds[0] < 0.0:  # the sum may fall, so the library writes neither it nor this
            family.add_sample(f"{self._name}_count", {}, below)
        yield family
