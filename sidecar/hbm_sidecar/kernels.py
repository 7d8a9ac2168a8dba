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


def compile_kernels() -> int:
    """Run the twin once on one made-up request, so that every kernel is compiled (and cached where
    NUMBA_CACHE_DIR says). Returns the number of requests simulated."""
    import numpy as np
    from hbm_policy.costs import CostConstants
    from hbm_policy.twin import Twin
    from hbm_pool.contracts.records import (
        MAX_CLASSES,
        CostModel,
        RequestSample,
        RowClass,
        ServerInfo,
        TableMap,
    )

    info = ServerInfo(
        node="kernels",
        model="kernels",
        extents=64,
        extent_bytes=1 << 20,
        page_tokens=16,
        pages_per_extent=4,
        max_sequence_tokens=256,
        drop_block_tokens=64,
        tables=(TableMap("items", 1 << 20, 0, hashed=False),),
        classes=(
            RowClass(row_bytes=128, rows_per_extent=8192, catalogue_rows=1 << 20, tables=(0,)),
        ),
        cost_model=CostModel.SERIAL,
        sample_rate=0.01,
        alpha_min=0.1,
        alpha_max=0.9,
        slo_ms=50.0,
        device="cpu",
    )
    keys = np.arange(2, dtype=np.uint64)
    sample = RequestSample(
        user=1,
        history_tokens=32,
        candidates=2,
        rows_total=34,
        history_rows_total=32,
        page_fingerprints=np.arange(2, dtype=np.uint32),
        history_keys=keys,
        history_positions=np.arange(2, dtype=np.uint32),
        candidate_keys=keys[:1],
    )
    twin = Twin(info)
    twin.feed([sample], 0, CostConstants(1.0, 0.01, 0.0, (0.001,) * MAX_CLASSES))
    return twin.requests


def main() -> None:
    """Entry of the image build; ends with 1 when the request was not simulated."""
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
    if compile_kernels() != 1 or not any(directory.rglob("*.nbi")):
        sys.exit(f"no kernel was cached in {directory}")


if __name__ == "__main__":
    main()
