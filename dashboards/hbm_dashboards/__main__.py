"""`python -m hbm_dashboards DIR`: write every dashboard there."""

from __future__ import annotations

import sys
from pathlib import Path

from hbm_dashboards.render import write

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m hbm_dashboards DIR")
    for path in write(Path(sys.argv[1])):
        print(path)
