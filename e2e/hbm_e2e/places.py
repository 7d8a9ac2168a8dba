"""Where the harness keeps what it makes: never inside the source tree."""

import os
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent / "tools"
"""The Go modules that pin every program of the cluster."""


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/hbm-partition/e2e`, absolute; made when something is first put there."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().absolute() / "hbm-partition" / "e2e"
