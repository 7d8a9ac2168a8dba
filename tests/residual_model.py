"""A residual so small that it can be read: action = clip(observation @ weights + bias)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from hbm_policy.layers import ACTION_NAMES
from hbm_policy.observation import OBSERVATION_NAMES, OBSERVATION_VERSION
from onnx import TensorProto, helper, numpy_helper

WIDTH = len(OBSERVATION_NAMES)


def residual_model(
    bias: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    weights: npt.NDArray[np.float32] | None = None,
    *,
    inputs: int = WIDTH,
    clip: bool = True,
    **about: str,
) -> bytes:
    """The bytes of an ONNX file; `about` replaces metadata by key without its `hbm.`."""
    weights = np.zeros((inputs, 4), np.float32) if weights is None else weights
    nodes = [
        helper.make_node("MatMul", ["observation", "weights"], ["hidden"]),
        helper.make_node("Add", ["hidden", "bias"], ["sum" if clip else "action"]),
    ]
    if clip:
        nodes.append(helper.make_node("Clip", ["sum", "low", "high"], ["action"]))
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, [1, inputs])],
        [helper.make_tensor_value_info("action", TensorProto.FLOAT, [1, 4])],
        [
            numpy_helper.from_array(weights.astype(np.float32), "weights"),
            numpy_helper.from_array(np.array([bias], np.float32), "bias"),
            numpy_helper.from_array(np.array(-1.0, np.float32), "low"),
            numpy_helper.from_array(np.array(1.0, np.float32), "high"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    metadata = {
        "observation_version": str(OBSERVATION_VERSION),
        "observation": ",".join(OBSERVATION_NAMES),
        "action": ",".join(ACTION_NAMES),
        "gain": "1.0",
        "commit": "0123abcd",
    } | about
    helper.set_model_props(model, {f"hbm.{key}": value for key, value in metadata.items()})
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def write_residual(path: Path, content: bytes) -> str:
    """Puts a file there; its sha256."""
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
