"""The tables that kubectl prints, and the numbers that programs show at `/metrics`."""

import re

_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?P<labels>\{.*\})? (?P<value>\S+)")


def rows(table: str) -> list[dict[str, str]]:
    """One dict per line below the heading; a cell that is blank is the empty string."""
    heading, *lines = table.rstrip("\n").splitlines()
    starts = [(word.group(), word.start()) for word in re.finditer(r"\S+", heading)]
    ends = [start for _, start in starts[1:]] + [None]
    return [
        {name: line[start:end].strip() for (name, start), end in zip(starts, ends, strict=True)}
        for line in lines
    ]


def samples(text: str) -> dict[str, float]:
    """Prometheus text as `name{labels}` to value."""
    found = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample:
            found[sample["name"] + (sample["labels"] or "")] = float(sample["value"])
    return found
