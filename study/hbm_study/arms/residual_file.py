"""Where the learned residual of the evaluation comes from."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

from hbm_policy.layers import Residual

_SHIPPED = ("residual.onnx", "policies/residual.onnx", "policy/residual.onnx")


def residual_path(source: str | None) -> Path:
    """A file by path, or the one that ships with `hbm_learn`. Raises FileNotFoundError."""
    if source is not None:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{source}: no such file")
        return path
    folder = Path(str(files("hbm_learn")))
    for name in _SHIPPED:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError("no trained residual ships with this version; train one: hbm train")


def load_residual(source: str | None) -> Residual:
    """The residual of an ONNX file, its hash checked against the bytes read here."""
    from hbm_policy.onnx_residual import OnnxResidual

    path = residual_path(source)
    residual: Residual = OnnxResidual(path, hashlib.sha256(path.read_bytes()).hexdigest())
    return residual
