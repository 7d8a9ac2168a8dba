"""Compiled kernels that an image ships."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hbm_sidecar.kernels import unpack

OTHER_LOAD = """
import hbm_sidecar.kernels as kernels

assert kernels.compile_kernels(requests=2048) == 2048
"""


def test_shipped_kernels_are_loaded_and_no_other_is_compiled(tmp_path: Path) -> None:
    shipped, cache = tmp_path / "shipped", tmp_path / "cache"
    plain = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    subprocess.run([sys.executable, "-m", "hbm_sidecar.kernels", shipped], check=True, env=plain)
    for path in [shipped, *shipped.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    environment = plain | {"HBM_KERNELS_DIR": str(shipped), "NUMBA_CACHE_DIR": str(cache)}

    assert unpack(environment) == ""

    subprocess.run([sys.executable, "-c", OTHER_LOAD], check=True, env=environment)
    assert _compiled(cache) == _compiled(shipped)
    assert any("simulate" in name for name in _compiled(shipped))
    assert any("plan_shrink" in name for name in _compiled(shipped))


def _compiled(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.nbc")}


def test_without_shipped_kernels_nothing_is_copied(tmp_path: Path) -> None:
    assert unpack({"NUMBA_CACHE_DIR": str(tmp_path / "cache")}) == ""
    assert not (tmp_path / "cache").exists()


def test_a_missing_directory_is_named_and_is_no_failure(tmp_path: Path) -> None:
    problem = unpack(
        {"HBM_KERNELS_DIR": str(tmp_path / "absent"), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    )
    assert str(tmp_path / "absent") in problem
