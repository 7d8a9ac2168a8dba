"""A cell is one run of one arm: what it is, by what key it is kept, and what came of it.

The key covers everything that a result depends on: the workload's content, the arm's parameters,
the seed, and the sources of the simulator and the policy. A finished cell is therefore never run
again, and never taken for another.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

Gather = Literal["serial", "overlap"]
EQUAL: Final = "equal"
"""Load key: one rate for all regimes, the lowest of those at load 1."""
SIMULATOR: Final = ("hbm_sim", "hbm_policy", "hbm_pool.host")
"""Packages that decide what a stream, a curve and a static split are."""
EVERYTHING: Final = (
    *SIMULATOR,
    "hbm_study.arms",
    "hbm_study.evaluate",
    "hbm_study.faults",
    "hbm_study.fleet_cells",
    "hbm_study.scene",
    "hbm_study.summary",
)


class Scene(NamedTuple):
    """What all arms are run on: one stream on one node."""

    workload: str
    load: str
    """Factor on each regime's own rate, as text, or `equal`."""
    gather: Gather
    seed: int
    fault: str = ""
    """Name of a fault (`faults.FAULTS`); empty: none."""
    requests: int | None = None
    """The walk is cut after so many, per node; None: all of it."""
    nodes: int = 1
    """Nodes behind the router; 1: none and no router."""
    hot: float | None = None
    """Share of requests of hot users, in all regimes; None: as the workload says."""
    rate: float | None = None
    """Share of rows followed; None: as the workload says, on fleets `scene.FLEET_RATE`."""

    @property
    def label(self) -> str:
        """For progress bars and messages."""
        fault = f" {self.fault}" if self.fault else ""
        fleet = f" {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.workload} load {self.load} {self.gather}{fault}{fleet} seed {self.seed}"

    @property
    def sweep(self) -> Scene:
        """Scenes with an equal one share the sweep of static splits."""
        return self._replace(load="", gather="serial", fault="")

    def without_seed(self) -> Scene:
        """The scene that seeds are repetitions of."""
        return self._replace(seed=0)


class Cell(NamedTuple):
    """One arm on one scene."""

    scene: Scene
    arm: str


class Store:
    """Finished cells in a folder: `cells/KEY.json`, per-tick columns in `ticks/KEY.parquet`.

    Files appear by rename, so that a run that is killed at any moment leaves whole cells only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        (folder / "ticks").mkdir(exist_ok=True)

    def has(self, key: str) -> bool:
        return self._cell(key).is_file()

    def save(self, key: str, result: Mapping[str, Any], ticks: Mapping[str, Any] | None) -> None:
        """`ticks`: columns of equal length; None: not kept."""
        if ticks is not None:
            self._save_ticks(key, ticks)
        text = json.dumps(_plain(result), sort_keys=True, allow_nan=False)
        _replace(self._cell(key), text.encode())

    def load(self, key: str) -> dict[str, Any]:
        """Raises KeyError for a cell that has not been finished."""
        try:
            text = self._cell(key).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise KeyError(key) from error
        result: dict[str, Any] = json.loads(text)
        return result

    def ticks(self, key: str) -> dict[str, Any] | None:
        """Per-tick columns of a cell, None where none were kept."""
        import pyarrow.parquet as parquet

        path = self.folder / "ticks" / f"{key}.parquet"
        if not path.is_file():
            return None
        table = parquet.read_table(path)
        return {name: table[name].to_numpy() for name in table.column_names}

    def results(self, keys: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Finished ones among these, in order."""
        for key in keys:
            if self.has(key):
                yield self.load(key)

    def _cell(self, key: str) -> Path:
        return self.folder / "cells" / f"{key}.json"

    def _save_ticks(self, key: str, ticks: Mapping[str, Any]) -> None:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        path = self.folder / "ticks" / f"{key}.parquet"
        partial = path.with_suffix(f".{os.getpid()}.part")
        parquet.write_table(arrow.table(dict(ticks)), partial, compression="zstd")
        partial.replace(path)


def cell_key(cell: Cell, workload_digest: str, arm: Mapping[str, Any]) -> str:
    """`workload_digest`: of the content; `arm`: all parameters, plain data."""
    content = {
        "scene": cell.scene._asdict(),
        "arm": cell.arm,
        "workload": workload_digest,
        "parameters": arm,
        "sources": sources_digest(EVERYTHING),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


@cache
def sources_digest(packages: tuple[str, ...]) -> str:
    """Hash of the sources of these packages and modules."""
    digest = hashlib.sha256()
    for name in packages:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        origin = Path(spec.origin)
        package = origin.name == "__init__.py"
        for path in sorted(origin.parent.rglob("*.py")) if package else [origin]:
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_bytes(content)
    partial.replace(path)
