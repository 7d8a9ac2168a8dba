"""How a line of a log is refused, and how its cells are quoted."""

from __future__ import annotations

from typing import Any


class Rejected(Exception):
    """Why a line is left out."""


def shortened(value: Any) -> str:
    """A cell as it stands in a message, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
