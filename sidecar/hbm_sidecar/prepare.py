"""Makes sidecar.cb: a process that the supervisor starts until it succeeds."""

from __future__ import annotations

import sys

from hbm_pool.contracts.control_block import ControlBlockError, SidecarBlock

from hbm_sidecar.config import SidecarConfig
from hbm_sidecar.log import configure


def main() -> None:
    """Create the file, or end with 1 and say why not."""
    log = configure("prepare")
    config = SidecarConfig()
    try:
        SidecarBlock.create(config.run_dir)
    except (ControlBlockError, OSError) as error:
        log.error("no control block: decisions are switched off until there is", why=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
