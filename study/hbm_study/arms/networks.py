"""Small networks for arms, in numpy: no run of an arm needs torch.

Weights lie in `.npz` files, float32, as torch lays them out: a linear layer is `[out, in]`, an
LSTM's gates are stacked in the order input, forget, cell, output.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hbm_study.arms.config import ArmError

Floats = npt.NDArray[np.float64]


def model_path(name: str) -> Path:
    """Where a trained model lies: a file of `arm_models/`, or a path. Raises `ArmError`."""
    shipped = Path(str(files("hbm_study"))) / "arm_models" / name
    for candidate in (shipped, Path(name)):
        if candidate.is_file():
            return candidate
    raise ArmError(f"model {name} has not been trained yet; run: hbm eval train")


def load_weights(name: str) -> dict[str, Floats]:
    """All arrays of a model file. Raises `ArmError`."""
    path = model_path(name)
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key].astype(np.float64) for key in stored.files}
    except (OSError, ValueError) as error:
        raise ArmError(f"{path}: not a model file ({error})") from error


def mlp(weights: dict[str, Floats], inputs: Floats) -> Floats:
    """tanh layers `weight_0, bias_0, …`; the last one is linear. `[in] -> [out]`."""
    layers = sum(key.startswith("weight_") for key in weights)
    values = inputs
    for layer in range(layers):
        values = weights[f"weight_{layer}"] @ values + weights[f"bias_{layer}"]
        if layer < layers - 1:
            values = np.tanh(values)
    return values


def lstm(weights: dict[str, Floats], window: Floats) -> Floats:
    """One LSTM layer over `[t, in]`, then a linear one on its last state, `[out]`."""
    inner, outer = weights["weight_ih_l0"], weights["weight_hh_l0"]
    bias = weights["bias_ih_l0"] + weights["bias_hh_l0"]
    size = outer.shape[1]
    hidden, cell = np.zeros(size), np.zeros(size)
    for row in window:
        gates = inner @ row + outer @ hidden + bias
        entering, kept, leaving = (
            1.0 / (1.0 + np.exp(-gates[at * size : (at + 1) * size])) for at in (0, 1, 3)
        )
        cell = kept * cell + entering * np.tanh(gates[2 * size : 3 * size])
        hidden = leaving * np.tanh(cell)
    return weights["head_weight"] @ hidden + weights["head_bias"]
