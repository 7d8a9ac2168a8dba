"""The trained network as plain numbers, and the graph that ships.

observation -> cut to ±`OBSERVED_LIMIT` -> (x - mean) * scale -> cut -> Gemm, tanh, Gemm, tanh, Gemm
-> cut to [-1, 1]. The graph is built node by node from the weights: no exporter's version is in it,
and equal weights give an equal file.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from hbm_policy.layers import ACTION_NAMES
from hbm_policy.observation import OBSERVATION_NAMES, OBSERVATION_VERSION
from hbm_policy.onnx_residual import INPUT, OUTPUT

from hbm_learn.checkpoint import NORMALISED_LIMIT, NORMALISER_EPSILON, Checkpoint, CheckpointError
from hbm_learn.pupil import OBSERVED_LIMIT

OPSET: Final = 17
IR_VERSION: Final = 8

Floats = npt.NDArray[np.float32]


class Network(NamedTuple):
    """Normaliser and layers; `weights[k]` is [out, in]."""

    mean: Floats
    scale: Floats
    weights: tuple[Floats, ...]
    biases: tuple[Floats, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Network:
        """The deterministic policy of a checkpoint. Raises CheckpointError for other widths."""
        state = checkpoint.parameters["policy"]
        names = [f"mlp_extractor.policy_net.{2 * layer}" for layer in range(2)] + ["action_net"]
        weights = tuple(state[f"{name}.weight"].numpy() for name in names)
        biases = tuple(state[f"{name}.bias"].numpy() for name in names)
        widths = weights[0].shape[1], weights[-1].shape[0]
        if widths != (len(OBSERVATION_NAMES), len(ACTION_NAMES)):
            raise CheckpointError(
                f"the checkpoint takes {widths[0]} observations to {widths[1]} actions; this "
                f"version has {len(OBSERVATION_NAMES)} and {len(ACTION_NAMES)}: train it anew"
            )
        observed = checkpoint.observed
        scale = 1.0 / np.sqrt(observed.var + NORMALISER_EPSILON)
        return cls(observed.mean.astype(np.float32), scale.astype(np.float32), weights, biases)

    def act(self, observation: npt.ArrayLike) -> Floats:
        """[n, observations] -> [n, actions], in numpy."""
        x = np.asarray(observation, np.float32)
        x = np.clip(x, -OBSERVED_LIMIT, OBSERVED_LIMIT)
        x = np.clip((x - self.mean) * self.scale, -NORMALISED_LIMIT, NORMALISED_LIMIT)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = np.tanh(x @ weight.T + bias)
        action: Floats = np.clip(x @ self.weights[-1].T + self.biases[-1], -1.0, 1.0)
        return action

    def torch(self) -> torch.nn.Module:
        """The same as a torch module: what the graph is compared with."""
        return _Module(self)

    def onnx(self, about: dict[str, str]) -> bytes:
        """The graph with its metadata, beside what the loader asks for."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        def limits(name: str, limit: float) -> list[Any]:
            return [
                numpy_helper.from_array(np.array(sign * limit, np.float32), f"{name}_{end}")
                for sign, end in ((-1.0, "low"), (1.0, "high"))
            ]

        constants = [
            numpy_helper.from_array(self.mean, "mean"),
            numpy_helper.from_array(self.scale, "scale"),
            *limits("observed", OBSERVED_LIMIT),
            *limits("normalised", NORMALISED_LIMIT),
            *limits("acted", 1.0),
        ]
        nodes = [
            helper.make_node("Clip", [INPUT, "observed_low", "observed_high"], ["cut"]),
            helper.make_node("Sub", ["cut", "mean"], ["centred"]),
            helper.make_node("Mul", ["centred", "scale"], ["scaled"]),
            helper.make_node("Clip", ["scaled", "normalised_low", "normalised_high"], ["hidden0"]),
        ]
        last = len(self.weights) - 1
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            constants += [
                numpy_helper.from_array(weight, f"weight{k}"),
                numpy_helper.from_array(bias, f"bias{k}"),
            ]
            nodes.append(
                helper.make_node(
                    "Gemm", [f"hidden{k}", f"weight{k}", f"bias{k}"], [f"sum{k}"], transB=1
                )
            )
            if k < last:
                nodes.append(helper.make_node("Tanh", [f"sum{k}"], [f"hidden{k + 1}"]))
        nodes.append(helper.make_node("Clip", [f"sum{last}", "acted_low", "acted_high"], [OUTPUT]))

        def tensor(name: str, width: int) -> Any:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])

        graph = helper.make_graph(
            nodes,
            "residual",
            [tensor(INPUT, len(OBSERVATION_NAMES))],
            [tensor(OUTPUT, len(ACTION_NAMES))],
            constants,
        )
        model = helper.make_model(
            graph,
            producer_name="hbm-partition",
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
        )
        helper.set_model_props(
            model,
            {
                "hbm.observation_version": str(OBSERVATION_VERSION),
                "hbm.observation": ",".join(OBSERVATION_NAMES),
                "hbm.action": ",".join(ACTION_NAMES),
                "hbm.opset": str(OPSET),
                **about,
            },
        )
        onnx.checker.check_model(model, full_check=True)
        content: bytes = model.SerializeToString(deterministic=True)
        return content


def check_observations(count: int = 100_000) -> Floats:
    """Observations that a graph is checked on, `[count, observations]`: usual ones, far ones, and
    such as no float32 multiplies well."""
    random = np.random.default_rng(6)
    width = len(OBSERVATION_NAMES)
    usual = random.normal(size=(count * 6 // 10, width))
    far = random.normal(size=(count * 3 // 10, width))
    far *= 10.0 ** random.uniform(-6, 6, (len(far), 1))
    odd = [0.0, -0.0, 1e-38, -1e-38, 1e3, -1e3, 1e30, -1e30, np.inf, -np.inf, 1.0]
    extreme = random.choice(odd, size=(count - len(usual) - len(far), width))
    return np.concatenate([usual, far, extreme]).astype(np.float32)


def largest_difference(network: Network, content: bytes) -> float:
    """Between torch and ONNX Runtime, of any action for any of `check_observations`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    seen = check_observations()
    (answered,) = session.run([OUTPUT], {INPUT: seen})
    with torch.inference_mode():
        expected = network.torch()(torch.from_numpy(seen)).numpy()
    return float(np.abs(answered - expected).max())


class _Module(torch.nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.mean = torch.from_numpy(network.mean)
        self.scale = torch.from_numpy(network.scale)
        self.layers = torch.nn.ModuleList()
        for weight, bias in zip(network.weights, network.biases, strict=True):
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
            self.layers.append(layer)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """[n, observations] -> [n, actions]."""
        x = observation.clamp(-OBSERVED_LIMIT, OBSERVED_LIMIT)
        x = ((x - self.mean) * self.scale).clamp(-NORMALISED_LIMIT, NORMALISED_LIMIT)
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        acted: torch.Tensor = self.layers[-1](x).clamp(-1.0, 1.0)
        return acted
