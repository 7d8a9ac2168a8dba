"""Which metrics exist, by their documents, and which ones a query asks for."""

from __future__ import annotations

import re

from tests.chart.rendered import ROOT

_NAME = re.compile(r"\bhbm_[a-z0-9_]+")
_SUFFIXES = ("_bucket", "_sum", "_count")


def documented() -> dict[str, str]:
    """Name and type of every metric that has a row in docs/metrics*.md."""
    rows: dict[str, str] = {}
    for path in sorted((ROOT / "docs").glob("metrics*.md")):
        for name, kind in re.findall(
            r"^\| `(hbm_\w+)` \| (\w+) \|", path.read_text(), flags=re.MULTILINE
        ):
            rows[name] = kind
    return rows


def asked_for(query: str) -> set[str]:
    """Names of our metrics in a PromQL expression, those of histograms without their suffix."""
    names = set()
    for name in _NAME.findall(query):
        for suffix in _SUFFIXES:
            if documented().get(name.removesuffix(suffix)) == "histogram":
                name = name.removesuffix(suffix)
        names.add(name)
    return names
