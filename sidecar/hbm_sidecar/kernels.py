"""Compiled kernels of the twin, shipped with an image instead of being compiled in every pod.

`python -m hbm_sidecar.kernels DIRECTORY` compiles them into DIRECTORY when an image is built.
numba refuses a cache that it cannot write, and a pod's root file system is read-only: at start
`unpack` copies what was shipped to a place that can be written.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

SHIPPED: Final = "HBM_KERNELS_DIR"
"""Variable that names the shipped kernels; set by the image."""
CACHE: Final = "NUMBA_CACHE_DIR"


def unpack(environment: Mapping[str, str]) -> str:
    """Fill the cache from what was shipped, where both are named. Returns what went wrong, or "".

    Nothing depends on it: without the cache the twin compiles, and only comes later.
    """
    shipped, cache = environment.get(SHIPPED), environment.get(CACHE)
    if not shipped or not cache:
        return ""
    try:
        shutil.copytree(shipped, cache, dirs_exist_ok=True, copy_function=shutil.copyfile)
    except (OSError, shutil.Error) as error:
        return f"kernels of {shipped} cannot be copied to {cache}: {error}"
    return ""


def compile_kernels(requests: int = 512) -> int:
    """Run a small twin until every kernel is compiled (and cached where NUMBA_CACHE_DIR says).

    Two width classes whose demand changes half-way: the virtual caches divide their room anew,
    and both grow and shrink. Returns the number of requests simulated.
    """
    import numpy as np
    from hbm_policy.costs import CostConstants
    from hbm_policy.twin import Twin
    from hbm_pool.contracts.identity import row_keys
    from hbm_pool.contracts.records import (
        MAX_CLASSES,
        CostModel,
        RequestSample,
        RowClass,
        ServerInfo,
        TableMap,
    )

    rows = 4096
    info = ServerInfo(
        node="kernels",
        model="kernels",
        extents=64,
        extent_bytes=4096,
        page_tokens=4,
        pages_per_extent=4,
        max_sequence_tokens=128,
        drop_block_tokens=32,
        tables=(TableMap("a", rows, 0, False), TableMap("b", rows, 1, True)),
        classes=(RowClass(64, 32, rows, (0,)), RowClass(32, 64, rows, (1,))),
        cost_model=CostModel.SERIAL,
        sample_rate=1.0,
        alpha_min=0.1,
        alpha_max=0.9,
        slo_ms=50.0,
        device="cpu",
    )
    chance = np.random.default_rng(1)
    samples = []
    for request in range(requests):
        table = int(request >= requests // 2)
        keys = row_keys(table, chance.integers(0, rows, 40))
        samples.append(
            RequestSample(
                user=int(chance.integers(1, 64)),
                history_tokens=32,
                candidates=8,
                rows_total=40,
                history_rows_total=32,
                page_fingerprints=np.arange(8, dtype=np.uint32),
                history_keys=keys[:32],
                history_positions=np.arange(32, dtype=np.uint32),
                candidate_keys=keys[32:],
            )
        )
    twin = Twin(info)
    twin.feed(samples, 0, CostConstants(1.0, 0.01, 0.0, (0.001,) * MAX_CLASSES))
    return twin.requests


def main() -> None:
    """Entry of the image build; ends with 1 when nothing was simulated."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m hbm_sidecar.kernels DIRECTORY")
    directory = Path(sys.argv[1]).absolute()
    if os.environ.get(CACHE) != str(directory):
        # numba reads the variable when it is imported.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "hbm_sidecar.kernels", str(directory)],
            {**os.environ, CACHE: str(directory)},
        )
    if compile_kernels() == 0 or not any(directory.rglob("*.nbi")):
        sys.exit(f"no kernel was cached in {directory}")


if __name__ == "__main__":
    main()
