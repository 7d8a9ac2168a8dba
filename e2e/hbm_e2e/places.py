"""Where the harness lies, and where it keeps what it makes: never inside the source tree."""

import os
from pathlib import Path

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
"""On `sys.path` of every process that imports the harness."""

TOOLS = PACKAGE_ROOT / "tools"
"""The Go modules that pin every program of the cluster."""


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/hbm-partition/e2e`, absolute; made when something is first put there."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().absolute() / "hbm-partition" / "e2e"
