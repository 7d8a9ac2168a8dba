"""Compiled kernels that an image ships."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hbm_sidecar.kernels import unpack

COUNT_LOADS = """
import os
from hbm_policy import twin_kernel
from hbm_sidecar.kernels import compile_kernels

assert compile_kernels() == 1
stats = twin_kernel.simulate.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_shipped_kernels_are_loaded_not_compiled_again(tmp_path: Path) -> None:
    shipped, cache = tmp_path / "shipped", tmp_path / "cache"
    plain = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    subprocess.run([sys.executable, "-m", "hbm_sidecar.kernels", shipped], check=True, env=plain)
    for path in [shipped, *shipped.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    environment = plain | {"HBM_KERNELS_DIR": str(shipped), "NUMBA_CACHE_DIR": str(cache)}

    assert unpack(environment) == ""

    ran = subprocess.run(
        [sys.executable, "-c", COUNT_LOADS],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.stdout.split() == ["1", "0"]


def test_without_shipped_kernels_nothing_is_copied(tmp_path: Path) -> None:
    assert unpack({"NUMBA_CACHE_DIR": str(tmp_path / "cache")}) == ""
    assert not (tmp_path / "cache").exists()


def test_a_missing_directory_is_named_and_is_no_failure(tmp_path: Path) -> None:
    problem = unpack(
        {"HBM_KERNELS_DIR": str(tmp_path / "absent"), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    )
    assert str(tmp_path / "absent") in problem
