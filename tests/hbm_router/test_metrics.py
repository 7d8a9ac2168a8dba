"""What a scrape shows of the data path's own numbers."""

from __future__ import annotations

from hbm_router.tallies import Distribution, Tally
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

BOUNDS = (-1.0, 1e-06, 0.5, 2.0)


def shown(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All samples of a scrape but the times at which prometheus-client made its instruments."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1e-06, 0.3, 0.5, 2.0, 7.0])), st.booleans())
def test_a_distribution_is_scraped_like_a_histogram(values: list[float], negative: bool) -> None:
    bounds = BOUNDS if negative else BOUNDS[1:]
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    distribution = Distribution("d", "text", bounds)
    ours.register(distribution)
    histogram = Histogram("d", "text", buckets=bounds, registry=theirs)
    for value in values:
        distribution.observe(value)
        histogram.observe(value)
    assert shown(ours) == shown(theirs)


@given(st.lists(st.tuples(st.sampled_from(["a", 'b"\n']), st.sampled_from(["200", "503"]))))
def test_a_tally_is_scraped_like_a_counter(events: list[tuple[str, str]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = Tally("t", "text", "node", "code")
    ours.register(tally)
    counter = Counter("t", "text", ["node", "code"], registry=theirs)
    for event in events:
        tally.counts[event] += 1
        counter.labels(*event).inc()
    assert shown(ours) == shown(theirs)
