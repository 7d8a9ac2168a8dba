"""What training leaves on disk: parameters, optimiser, normaliser, and how far it came.

Written under another name and then renamed: whatever kills a run, the last file is whole.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

FORMAT = 1
NORMALISER_EPSILON = 1e-4
"""Added to a variance: a feature that never varied in training does not run wild when it does."""
NORMALISED_LIMIT = 10.0
"""Normalised observations are cut to this."""


class CheckpointError(ValueError):
    """A file that is no checkpoint of a run; the text says what to do."""


class Moments(NamedTuple):
    """Running mean and variance, as stable-baselines3 keeps them."""

    mean: npt.NDArray[np.float64]
    var: npt.NDArray[np.float64]
    weight: float
    """Samples behind them."""


class Checkpoint(NamedTuple):
    """State of one seed's training after a chunk."""

    chunk: int
    """Chunks done."""
    steps: int
    parameters: dict[str, Any]
    """`policy` and `policy.optimizer`: state dictionaries."""
    observed: Moments
    returned: Moments

    def save(self, path: Path) -> None:
        """Replaces the file at once."""
        content = self._asdict() | {"format": FORMAT}
        for name in ("observed", "returned"):
            mean, var, weight = content[name]
            content[name] = (torch.from_numpy(mean), torch.from_numpy(var), weight)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(content, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Raises CheckpointError."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such checkpoint; train one: hbm train") from None
        except Exception as error:  # whatever torch raises for bytes that are none of its own
            reason = " ".join(str(error).split())[:120]
            raise CheckpointError(f"{path}: no checkpoint that can be read ({reason})") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise CheckpointError(f"{path}: no checkpoint of format {FORMAT}; train it anew")
        for name in ("observed", "returned"):
            mean, var, weight = content[name]
            content[name] = Moments(mean.numpy(), var.numpy(), float(weight))
        return cls(**content)
