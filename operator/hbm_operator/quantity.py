"""Kubernetes quantities ("100m", "400Mi", "1.5G", "2e3") as exact numbers."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

_GRAMMAR: Final = re.compile(
    r"(?P<number>[+-]?(\d+(\.\d*)?|\.\d+))(?P<suffix>[numkMGTPE]|[KMGTPE]i|[eE][+-]?\d{1,2})?",
    re.ASCII,
)
_SUFFIXES: Final[dict[str, Decimal]] = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    **{letter: Decimal(1000) ** power for power, letter in enumerate("kMGTPE", start=1)},
    **{f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", start=1)},
}
_LONGEST: Final = 64


def parse_quantity(text: str | int | float) -> Decimal:
    """The number that a quantity stands for, in its base unit (cores, bytes, pieces).

    The grammar is that of `resource.Quantity` in apimachinery; YAML may hold a plain number.

    Raises:
        ValueError: it is no quantity; the message has the value and examples.
    """
    written = str(text)
    match = _GRAMMAR.fullmatch(written) if len(written) <= _LONGEST else None
    if match is None:
        raise ValueError(f"{written[:_LONGEST]!r} is no quantity; write for example 100m or 400Mi")
    number, suffix = Decimal(match["number"]), match["suffix"] or ""
    if suffix in _SUFFIXES:
        return number * _SUFFIXES[suffix]
    return number * Decimal(10) ** int(suffix[1:]) if suffix else number
