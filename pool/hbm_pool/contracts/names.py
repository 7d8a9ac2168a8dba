"""What a node or a namespace may be called: part of Redis keys, headers and file names."""

from __future__ import annotations

import re
from typing import Final

MAX_NAME: Final = 253
"""As a DNS subdomain: host names and Kubernetes uids fit."""
_NAME: Final = re.compile(rf"[A-Za-z0-9](?:[A-Za-z0-9._-]{{0,{MAX_NAME - 2}}}[A-Za-z0-9])?")


def check_name(name: str) -> str:
    """The name itself; ValueError, with what is allowed, for any other text."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name[:60]!r} is no name; use letters, digits, '.', '_', '-', at most {MAX_NAME}, "
            "a letter or digit at both ends"
        )
    return name
