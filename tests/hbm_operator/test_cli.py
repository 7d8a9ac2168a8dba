"""`hbm operator crds` and wrong settings of the controller."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hbm_operator.models.crd import definitions


def operator(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hbm_cli.main", "operator", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_crds_are_printed_and_written(tmp_path: Path) -> None:
    printed = list(yaml.safe_load_all(operator("crds").stdout))
    assert printed == list(definitions().values())
    assert operator("crds", "--out", str(tmp_path)).returncode == 0
    written = [yaml.safe_load((tmp_path / name).read_text()) for name in definitions()]
    assert written == printed


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--redis-address", "redis"), "--redis-address: 'redis' is no HOST:PORT"),
        (("--redis-secret", "a", "--redis-external-secret", "b"), "not both"),
        (("--sweep-s", "0"), "--sweep-s: Input should be greater than or equal to 0.1"),
        (("--certs", "cert-manager"), "--certs: Input should be 'self-signed' or 'given'"),
        (("--kubeconfig", "/nowhere"), "/nowhere cannot be read"),
        (("--ready-file", "/nowhere/x"), "--ready-file: /nowhere cannot be written"),
        ((), "KUBERNETES_SERVICE_HOST is not set"),
    ],
)
def test_wrong_settings_end_it_with_one_line(flags: tuple[str, ...], why: str) -> None:
    done = operator("controller", "--admin-port", "0", *flags)
    assert done.returncode == 2
    line = done.stderr.strip()
    assert line.startswith("hbm operator controller: ")
    assert "\n" not in line
    assert why in line
