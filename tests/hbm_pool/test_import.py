"""`import hbm_pool` is light: no torch, no numba, names on first use."""

import subprocess
import sys

import hbm_pool
import pytest


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_numba() -> None:
    loaded = _python(
        "import sys, hbm_pool, hbm_pool.cli; print([m for m in ('torch', 'numba') "
        "if m in sys.modules])"
    )
    assert loaded == "[]"


def test_the_torch_free_half_stays_torch_free() -> None:
    loaded = _python(
        "import sys; from hbm_pool import ExtentLedger, KVSpec, PoolConfig, TableSpec, KVHandle; "
        "import hbm_pool.host.split, hbm_pool.host.plan; print('torch' in sys.modules)"
    )
    assert loaded == "False"


@pytest.mark.parametrize("name", hbm_pool.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(hbm_pool, name).__name__ == name
    assert name in dir(hbm_pool)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Arean'"):
        _ = hbm_pool.Arean
