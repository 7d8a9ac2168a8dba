"""What a suite runs: lists of scenes and arms as a file, in the order in which they matter."""

from __future__ import annotations

from importlib.resources import files
from typing import Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hbm_study.cells import Cell, Scene

SUITES: Final = ("smoke", "paper", "full")


class SuiteError(ValueError):
    """A suite file that cannot be used; one line."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Block(_Section):
    """Every combination of these."""

    workloads: tuple[str, ...] = Field(min_length=1)
    loads: tuple[str, ...] = ("1.0",)
    gathers: tuple[Literal["serial", "overlap"], ...] = ("serial",)
    faults: tuple[str, ...] = ("",)
    seeds: int = Field(ge=1, le=20)
    """Seeds 1 to this."""
    arms: tuple[str, ...] = Field(min_length=1)
    """Names of arms, or of lists of `arm_lists`."""
    requests: int | None = Field(None, ge=1)
    """The walk is cut after so many, per node."""
    nodes: tuple[int, ...] = (1,)
    """Above 1: arms are `ROUTING+ARM`."""
    hot: tuple[float | None, ...] = (None,)
    """Shares of requests of hot users; null: as the workload says."""


class Suite(_Section):
    """A whole file."""

    schema_version: Literal[1]
    description: str
    arm_lists: dict[str, tuple[str, ...]] = {}
    blocks: tuple[Block, ...] = Field(min_length=1)

    def cells(self) -> list[Cell]:
        """Seed by seed, so that a run that stops early has fewer seeds of everything."""
        found: dict[Cell, None] = {}
        most = max(block.seeds for block in self.blocks)
        for seed in range(1, most + 1):
            for block in self.blocks:
                if seed <= block.seeds:
                    for scene in self._scenes(block, seed):
                        for arm in self.arms(block):
                            found.setdefault(Cell(scene, arm))
        return list(found)

    def arms(self, block: Block) -> list[str]:
        """Names, lists taken apart, each once."""
        names: dict[str, None] = {}
        for name in block.arms:
            for each in self.arm_lists.get(name, (name,)):
                names.setdefault(each)
        return list(names)

    def _scenes(self, block: Block, seed: int) -> list[Scene]:
        return [
            Scene(workload, load, gather, seed, fault, block.requests, nodes, hot)
            for workload in block.workloads
            for load in block.loads
            for gather in block.gathers
            for fault in block.faults
            for nodes in block.nodes
            for hot in block.hot
        ]


def load_suite(name: str) -> Suite:
    """A shipped suite. Raises `SuiteError`."""
    if name not in SUITES:
        raise SuiteError(f"no suite is called {name!r}; known: {', '.join(SUITES)}")
    text = (files("hbm_study") / "suites" / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        return Suite.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise SuiteError(f"suite {name}: {where}: {problem['msg']}") from error
