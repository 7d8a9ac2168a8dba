"""Prints the byte code files of the standard library that modules import, relative to the root.

    python images/stdlib.py asyncio http.client

Debian makes them when it installs Python, so they belong to no package, and an image put together
of packages' files lacks them.
"""

import importlib
import sys
import sysconfig
from pathlib import Path


def cached(modules: list[str]) -> list[str]:
    """Files such as `usr/lib/python3.11/__pycache__/ssl.cpython-311.pyc`, sorted."""
    for module in modules:
        importlib.import_module(module)
    home = Path(sysconfig.get_path("stdlib"))
    files = {
        Path(str(path))
        for module in list(sys.modules.values())
        if (path := getattr(module, "__cached__", None))
    }
    return sorted(
        str(path.relative_to("/")) for path in files if path.is_relative_to(home) and path.exists()
    )


if __name__ == "__main__":
    print("\n".join(cached(sys.argv[1:])))
