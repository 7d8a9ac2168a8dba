"""Where the learned residual of the evaluation comes from."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

from hbm_policy.layers import Residual

from hbm_study.arms.config import ArmError

NAME = "residual.onnx"


def residual_path(source: str | None) -> Path:
    """A file by path, or the one that ships. Raises `ArmError`."""
    package = Path(str(files("hbm_learn")))
    shipped = [package / "policies", package.parents[1] / "policies"]
    for path in [Path(source)] if source is not None else [folder / NAME for folder in shipped]:
        if path.is_file():
            return path
    wanted = source or "a trained residual"
    raise ArmError(f"{wanted} is not there; train one (hbm train, hbm export)")


def load_residual(source: str | None) -> Residual:
    """The residual of an ONNX file, its hash checked against the bytes read here."""
    from hbm_policy.onnx_residual import OnnxResidual

    path = residual_path(source)
    residual: Residual = OnnxResidual(path, hashlib.sha256(path.read_bytes()).hexdigest())
    return residual
