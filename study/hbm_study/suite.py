"""What a suite runs: lists of scenes and arms as a file, in the order in which they matter."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Final, Literal

from hbm_load.model_text import parse_model
from pydantic import BaseModel, ConfigDict, Field

from hbm_study.cells import Cell, Scene

SUITES: Final = ("smoke", "core", "paper", "full")


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
    rate: float | None = Field(None, gt=0.0, le=1.0)
    """Share of rows followed; null: that of the suite."""


class Suite(_Section):
    """A whole file."""

    schema_version: Literal[1]
    description: str
    rate: float | None = Field(None, gt=0.0, le=1.0)
    """Share of rows followed; null: as each workload says."""
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
            Scene(
                workload,
                load,
                gather,
                seed,
                fault,
                block.requests,
                nodes,
                hot,
                # Fleets have a rate of their own: their streams are long.
                block.rate or (self.rate if nodes == 1 else None),
            )
            for workload in block.workloads
            for load in block.loads
            for gather in block.gathers
            for fault in block.faults
            for nodes in block.nodes
            for hot in block.hot
        ]


def load_suite(source: str) -> Suite:
    """A shipped suite by name, or a YAML file. Raises `SuiteError`."""
    if source in SUITES:
        text = (files("hbm_study") / "suites" / f"{source}.yaml").read_text(encoding="utf-8")
    elif source.endswith((".yaml", ".yml")):
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SuiteError(f"{source}: cannot be read ({error})") from error
    else:
        raise SuiteError(
            f"no suite is called {source!r}; give a YAML file or one of: {', '.join(SUITES)}"
        )
    return parse_model(
        text, source, Suite, SuiteError, "blocks", "docs/evaluation.md has an example"
    )
