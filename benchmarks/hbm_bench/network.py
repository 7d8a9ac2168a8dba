"""A residual of the size that is trained, with random weights: what a decision with it costs."""

from __future__ import annotations

import numpy as np
from hbm_policy.layers import ACTION_NAMES
from hbm_policy.observation import OBSERVATION_NAMES, OBSERVATION_VERSION

HIDDEN = 64


def network(seed: int) -> bytes:
    """ONNX file: normaliser, clip, two layers of 64 tanh neurons, an output layer, clip."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(seed)
    width, actions = len(OBSERVATION_NAMES), len(ACTION_NAMES)
    sizes = (width, HIDDEN, HIDDEN, actions)
    constants = {
        "mean": random.normal(0.0, 0.1, (1, width)),
        "scale": random.uniform(0.5, 2.0, (1, width)),
        **{f"w{i}": random.normal(0.0, 0.1, sizes[i : i + 2]) for i in range(3)},
        **{f"b{i}": random.normal(0.0, 0.1, sizes[i + 1]) for i in range(3)},
        **{"far": np.array(10.0), "one": np.array(1.0)},
        **{"-far": np.array(-10.0), "-one": np.array(-1.0)},
    }
    steps = [
        ("Sub", "observation", "mean"),
        ("Mul", "", "scale"),
        ("Clip", "", "-far", "far"),
        ("Gemm", "", "w0", "b0"),
        ("Tanh", ""),
        ("Gemm", "", "w1", "b1"),
        ("Tanh", ""),
        ("Gemm", "", "w2", "b2"),
        ("Clip", "", "-one", "one"),
    ]
    nodes, before = [], "observation"
    for at, (kind, _, *more) in enumerate(steps):
        after = "action" if at == len(steps) - 1 else f"h{at}"
        nodes.append(helper.make_node(kind, [before, *more], [after]))
        before = after
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, [1, width])],
        [helper.make_tensor_value_info("action", TensorProto.FLOAT, [1, actions])],
        [
            numpy_helper.from_array(value.astype(np.float32), name)
            for name, value in constants.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    about = {
        "observation_version": str(OBSERVATION_VERSION),
        "observation": ",".join(OBSERVATION_NAMES),
        "action": ",".join(ACTION_NAMES),
        "gain": "1.0",
        "commit": "none",
    }
    helper.set_model_props(model, {f"hbm.{key}": value for key, value in about.items()})
    return bytes(model.SerializeToString())
