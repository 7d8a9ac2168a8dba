"""Runs a suite: what is finished stays, what is left is run until the budget is over."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from hbm_study.arms import ArmError, model_file
from hbm_study.backends import Backend
from hbm_study.cells import Cell, Scene, Store
from hbm_study.evaluate import Done, Job, config_of, key_of, run_job
from hbm_study.frozen import digest_of
from hbm_study.suite import Suite


@dataclasses.dataclass(frozen=True)
class Plan:
    """All cells of a suite with their keys, in order."""

    cells: dict[Cell, str]
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    """Arms that cannot run here, and why."""

    @classmethod
    def of(cls, suite: Suite) -> Plan:
        """Raises ArmError and WorkloadError."""
        digests: dict[str, str] = {}
        cells = {}
        wanted = suite.cells()
        left_out = {}
        for arm in dict.fromkeys(cell.arm for cell in wanted):
            config = config_of(arm)
            try:
                model_file(config)
            except ArmError as error:
                left_out[arm] = str(error)
        for cell in wanted:
            if cell.arm in left_out:
                continue
            workload = cell.scene.workload
            if workload not in digests:
                digests[workload] = digest_of(workload)
            cells[cell] = key_of(cell, digests[workload])
        return cls(cells, left_out)

    @property
    def workloads(self) -> list[str]:
        return list(dict.fromkeys(cell.scene.workload for cell in self.cells))

    @property
    def seeds(self) -> list[int]:
        return sorted({cell.scene.seed for cell in self.cells})

    def missing(self, store: Store) -> dict[Cell, str]:
        """Cells that have not been finished."""
        return {cell: key for cell, key in self.cells.items() if not store.has(key)}


def run_suite(
    plan: Plan,
    store: Store,
    cache: Path,
    backend: Backend,
    budget_s: float,
    progress: Callable[[Done], None],
) -> dict[Cell, str]:
    """Runs what is missing; -> what is still missing when the budget is over.

    No cell is begun after the budget's end; one that has begun is finished.
    """
    stop_at = time.time() + budget_s
    jobs = _Jobs(plan.missing(store), store.folder, cache, stop_at)
    for done in backend.run(run_job, jobs):
        jobs.finished(done.scene)
        progress(done)
    return plan.missing(store)


class _Jobs:
    """A whole scene each, in order: two workers on one would both draw its stream and sweep it.

    For the same reason a scene whose sweep another worker is at waits while there is anything else.
    """

    def __init__(self, missing: dict[Cell, str], folder: Path, cache: Path, stop_at: float) -> None:
        by_scene: dict[Scene, list[tuple[str, str]]] = {}
        for cell, key in missing.items():
            by_scene.setdefault(cell.scene, []).append((cell.arm, key))
        self._waiting = [
            Job(scene, tuple(arms), folder, cache, stop_at) for scene, arms in by_scene.items()
        ]
        self._stop_at = stop_at
        self._swept: Counter[Scene] = Counter()

    def __iter__(self) -> Iterator[Job]:
        while self._waiting and time.time() < self._stop_at:
            free = (i for i, job in enumerate(self._waiting) if not self._swept[job.scene.sweep])
            job = self._waiting.pop(next(free, 0))
            self._swept[job.scene.sweep] += 1
            yield job

    def finished(self, scene: Scene) -> None:
        """Its worker is done."""
        self._swept[scene.sweep] -= 1
