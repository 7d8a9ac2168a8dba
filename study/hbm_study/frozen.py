"""Which scenarios and seeds are for testing: their hashes, frozen before anything was tuned.

A workload whose content differs from `frozen.json` is no test scenario, whatever it is called.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from typing import Final, NamedTuple

from hbm_sim.workload import load_workload

TRAINING_SEEDS: Final = range(1000, 2000)
VALIDATION_SEEDS: Final = range(2000, 2100)


class Frozen(NamedTuple):
    """The test set."""

    workloads: dict[str, str]
    """SHA-256 of each workload's content, by name."""
    seeds: tuple[int, ...]


class NotFrozen(ValueError):
    """Something is called a test that is not the frozen one; one line."""


def frozen() -> Frozen:
    """`frozen.json`."""
    raw = json.loads((files("hbm_study") / "frozen.json").read_text(encoding="utf-8"))
    return Frozen(raw["workloads"], tuple(raw["seeds"]))


def check_frozen(workloads: Iterable[str], seeds: Iterable[int]) -> None:
    """Raises `NotFrozen` when these are not test scenarios and test seeds."""
    test = frozen()
    changed = [name for name in workloads if test.workloads.get(name) != digest_of(name)]
    foreign = sorted(set(seeds) - set(test.seeds))
    if changed:
        raise NotFrozen(
            f"not the frozen test scenarios: {', '.join(changed)}; their content differs from "
            "study/hbm_study/frozen.json. Results of them are no test results (--development)"
        )
    if foreign:
        raise NotFrozen(f"not test seeds: {foreign[:5]}; test seeds are {test.seeds}")


def digest_of(name: str) -> str:
    """SHA-256 of a workload's content. Raises WorkloadError."""
    return load_workload(name).digest()
