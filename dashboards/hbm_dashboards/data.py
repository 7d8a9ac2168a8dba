"""The queries of a dashboard as Grafana would send them, and what came back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

RATE_INTERVAL = "1m"
"""In the place of Grafana's own, which follows the resolution of a panel."""


class Asked(NamedTuple):
    """One query of one panel."""

    panel: str
    legend: str
    """With `{{label}}` where a label's value goes."""
    expression: str
    instant: bool
    """One value of now, not a line over time."""


class Series(NamedTuple):
    """One line, or its last point."""

    labels: Mapping[str, str]
    points: list[tuple[float, float]]
    """Seconds since the epoch and values; none of them NaN."""

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Series:
        """From an element of a result of Prometheus's API."""
        pairs = answer.get("values") or [answer["value"]]
        points = [(float(at), float(value)) for at, value in pairs]
        return cls(answer["metric"], [point for point in points if point[1] == point[1]])


def panels(dashboard: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Panels with queries, in reading order."""
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            yield panel


def asked(panel: Mapping[str, Any], chosen: Mapping[str, str]) -> list[Asked]:
    """The queries of a panel. `chosen`: value of each variable of the dashboard."""
    return [
        Asked(
            panel["title"],
            target.get("legendFormat", ""),
            filled(target["expr"], chosen),
            bool(target.get("instant")),
        )
        for target in panel["targets"]
    ]


def filled(expression: str, chosen: Mapping[str, str]) -> str:
    """An expression with the values of its variables; raises `ValueError` for one that is left."""
    values = {"__rate_interval": RATE_INTERVAL, "__interval": RATE_INTERVAL, **chosen}
    for name in sorted(values, key=len, reverse=True):
        expression = expression.replace(f"${name}", values[name])
    if "$" in expression:
        raise ValueError(f"no value for a variable in {expression}")
    return expression


def named(legend: str, labels: Mapping[str, str]) -> str:
    """What Grafana writes beside a line."""
    for name, value in labels.items():
        legend = legend.replace(f"{{{{{name}}}}}", value)
    return legend
