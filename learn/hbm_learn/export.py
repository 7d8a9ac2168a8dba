"""From a run's selected checkpoint to the file that ships, and its card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final, NamedTuple

from hbm_learn.card import card
from hbm_learn.checkpoint import Checkpoint
from hbm_learn.config import TrainConfig
from hbm_learn.network import Network, largest_difference
from hbm_learn.training import TrainingError, read_curve, read_run

MAX_BYTES: Final = 100_000
"""A policy that ships is smaller."""
MAX_DIFFERENCE: Final = 1e-6
"""Between what was trained and what the file answers."""


class Exported(NamedTuple):
    """What was written."""

    path: Path
    sha256: str
    size_bytes: int
    card: Path


def export(folder: Path, out: Path, *, gain: float = 1.0, note: str = "") -> Exported:
    """The run's selected checkpoint as ONNX, with its card (`.md`) beside it.

    `gain`: share of the network's wish that a policy at `residual_gain` 1 takes; `note`: a sentence
    for the card's limits. Raises TrainingError, CheckpointError.
    """
    if not 0.0 <= gain <= 1.0:
        raise TrainingError(f"the gain is {gain:g}; it must be 0 to 1")
    run, result = read_run(folder), read_result(folder)
    checkpoint = Checkpoint.load(folder / result["checkpoint"])
    arguments = json.dumps(run["arguments"], sort_keys=True)
    network = Network.of(checkpoint)
    content = network.onnx(
        {
            "hbm.gain": f"{gain:g}",
            "hbm.commit": run["commit"],
            "hbm.seed": str(result["seed"]),
            "hbm.steps": str(checkpoint.steps),
            "hbm.arguments_sha256": hashlib.sha256(arguments.encode()).hexdigest(),
        }
    )
    if len(content) > MAX_BYTES:
        raise TrainingError(
            f"the file would have {len(content)} bytes, the most is {MAX_BYTES}; train with a "
            "smaller `hidden`"
        )
    difference = largest_difference(network, content)
    if not difference <= MAX_DIFFERENCE:
        raise TrainingError(
            f"ONNX Runtime and torch differ by {difference:.2g} in an action, more than "
            f"{MAX_DIFFERENCE:g}: the weights are too large; train with a smaller learning_rate"
        )
    digest = hashlib.sha256(content).hexdigest()
    config = TrainConfig.model_validate(run["arguments"])
    curves = {seed: read_curve(folder, seed) for seed in config.seeds}
    described = out.with_suffix(".md")
    text = card(
        config,
        run["commit"],
        result,
        curves,
        gain,
        out.name,
        digest,
        len(content),
        difference,
        note,
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, data in ((out, content), (described, text.encode())):
            partial = path.with_suffix(".partial")
            partial.write_bytes(data)
            partial.replace(path)
    except OSError as error:
        raise TrainingError(f"{out} cannot be written ({error.strerror})") from error
    return Exported(out, digest, len(content), described)


def read_result(folder: Path) -> dict[str, Any]:
    """`result.json`. Raises TrainingError."""
    try:
        found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{folder} has no result yet; repeat its hbm train until it ends"
        ) from error
    return found
