"""PromQL of the panels, and what its results are measured in."""

from __future__ import annotations

from typing import Final, NamedTuple

RATIO: Final = "percentunit"
SECONDS: Final = "s"
PER_SECOND: Final = "reqps"
EVENTS: Final = "cps"
BYTES: Final = "bytes"
BYTES_PER_SECOND: Final = "Bps"
COUNT: Final = "short"


class Query(NamedTuple):
    """A PromQL expression and what its series are called."""

    expression: str
    legend: str


def quantile(share: float, histogram: str, selector: str, by: str = "") -> str:
    """Quantile of a histogram's increase over the rate interval."""
    labels = f"le, {by}" if by else "le"
    rate = f"rate({histogram}_bucket{{{selector}}}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by ({labels}) ({rate}))"


def ratio(part: str, whole: str, selector: str, by: str = "") -> str:
    """Share of one counter's increase in another's; 0 while there is none."""
    over = f" by ({by})" if by else ""
    upper = f"sum{over} (rate({part}{{{selector}}}[$__rate_interval]))"
    lower = f"sum{over} (rate({whole}{{{selector}}}[$__rate_interval]))"
    return f"{upper} / clamp_min({lower}, 1e-9)"


def rates(counter: str, selector: str, by: str = "") -> str:
    """Increase of a counter per second, summed."""
    over = f" by ({by})" if by else ""
    return f"sum{over} (rate({counter}{{{selector}}}[$__rate_interval]))"


def rates_or_none(counter: str, selector: str, by: str) -> str:
    """As `rates`; while nothing of it has ever happened one series called none, at 0."""
    return f'{rates(counter, selector, by)} or label_replace(vector(0), "{by}", "none", "", "")'
