"""Dense weights and embedding tables, drawn from a seed or read from a safetensors file.

Names in a file: dense weights as listed by `dense_shapes`, tables as `tables.<name>`.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hbm_serving.config import ModelConfig
from hbm_serving.errors import ConfigError

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def dense_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every dense weight."""
    width, merged = model.embedding_dim, model.heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for table in model.tables:
        shapes[f"projection.{table.name}"] = (width, table.width)
    if model.actions:
        shapes["actions"] = (model.actions + 1, width)
    for layer in range(model.layers):
        shapes |= {
            f"layers.{layer}.norm.weight": (width,),
            f"layers.{layer}.norm.bias": (width,),
            f"layers.{layer}.uvqk.weight": (4 * merged, width),
            f"layers.{layer}.uvqk.bias": (4 * merged,),
            f"layers.{layer}.position_bias": (model.attention.position_buckets,),
            f"layers.{layer}.time_bias": (model.attention.time_buckets,),
            f"layers.{layer}.output_norm.weight": (merged,),
            f"layers.{layer}.output_norm.bias": (merged,),
            f"layers.{layer}.output.weight": (width, merged),
            f"layers.{layer}.output.bias": (width,),
        }
    shapes |= {
        "head.norm.weight": (width,),
        "head.norm.bias": (width,),
        "head.weight": (1, width),
        "head.bias": (1,),
    }
    return shapes


def draw_dense(model: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Random dense weights, float32, scaled so that scores are O(1). A pure function of `seed`."""
    generator = np.random.default_rng([seed, 0xD])
    weights = {}
    for name, shape in dense_shapes(model).items():
        drawn = generator.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            drawn = 1.0 + 0.1 * drawn
        elif name.endswith("_bias"):
            drawn *= 0.5
        elif name.endswith(".bias"):
            drawn *= 0.1
        elif name == "actions":
            drawn *= 0.5
        elif name.startswith("projection."):
            drawn /= math.sqrt(shape[1] * len(model.tables))
        else:
            drawn /= math.sqrt(shape[-1])
        weights[name] = torch.from_numpy(np.ascontiguousarray(drawn, dtype=np.float32))
    return weights


def draw_table(model: ModelConfig, index: int, seed: int) -> npt.NDArray[np.float32]:
    """Random rows of a table, `[rows, width] float32`, a pure function of `seed`."""
    table = model.tables[index]
    generator = np.random.default_rng([seed, 0x7, index])
    return generator.standard_normal((table.rows, table.width), dtype=np.float32)


def load_dense(model: ModelConfig, path: Path) -> dict[str, torch.Tensor]:
    """Dense weights of a safetensors file. Raises `ConfigError` naming the first bad tensor."""
    from safetensors import safe_open

    weights = {}
    try:
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            for name, shape in dense_shapes(model).items():
                if name not in held:
                    raise ConfigError(f"{path}: tensor {name} is missing")
                tensor = file.get_tensor(name)
                if tuple(tensor.shape) != shape:
                    raise ConfigError(
                        f"{path}: tensor {name} has shape {tuple(tensor.shape)}, "
                        f"the model needs {shape}"
                    )
                if not bool(torch.isfinite(tensor).all()):
                    raise ConfigError(f"{path}: tensor {name} holds NaN or infinite values")
                weights[name] = tensor.to(torch.float32)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: not a readable safetensors file ({error})") from error
    return weights


def load_table(model: ModelConfig, index: int, path: Path) -> torch.Tensor | None:
    """Rows of a table out of a safetensors file, in the table's dtype; None if it has none."""
    from safetensors import safe_open

    table = model.tables[index]
    name = f"tables.{table.name}"
    with safe_open(path, framework="pt") as file:
        if name not in set(file.keys()):
            return None
        tensor: torch.Tensor = file.get_tensor(name)
    if tuple(tensor.shape) != (table.rows, table.width):
        raise ConfigError(
            f"{path}: tensor {name} has shape {tuple(tensor.shape)}, "
            f"the model needs {(table.rows, table.width)}"
        )
    return tensor.to(DTYPES[table.dtype])


def save(path: Path, dense: dict[str, torch.Tensor], tables: dict[str, torch.Tensor]) -> None:
    """Writes weights in the layout that `load_dense` and `load_table` read."""
    from safetensors.torch import save_file

    save_file(dense | {f"tables.{name}": rows for name, rows in tables.items()}, path)
