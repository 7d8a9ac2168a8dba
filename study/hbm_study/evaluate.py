"""One job: some arms on one scene, each finished cell saved at once."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from hbm_sim.loop import run_node

from hbm_study.arms import ArmConfig, held_alpha, load_arm, make_arm, model_file
from hbm_study.arms.config import OracleArm, StaticArm
from hbm_study.cells import Cell, Scene, Store, cell_key
from hbm_study.fleet_cells import SPLIT, evaluate_fleet, fleet_arm
from hbm_study.scene import TICK_S, SceneData
from hbm_study.summary import (
    Track,
    no_moves,
    outcome_of,
    static_track,
    stitched,
    summarise,
    totals,
)

BEGIN_ALPHA = 0.5
"""Where every arm but a static one begins, before the warm-up."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Arms of one scene that have not been finished."""

    scene: Scene
    arms: tuple[tuple[str, str], ...]
    """(name, key) of each."""
    folder: Path
    cache: Path
    stop_at: float
    """`time.time` after which no further cell is begun."""


@dataclasses.dataclass(frozen=True)
class Done:
    """What became of a job."""

    scene: Scene
    finished: tuple[str, ...]
    left: tuple[str, ...]
    """Not begun for want of time."""
    seconds: float


def key_of(cell: Cell, workload_digest: str) -> str:
    """Under which a cell is kept. Raises `ArmError`."""
    config = config_of(cell.arm)
    parameters = config.model_dump(mode="json")
    model = model_file(config)
    if model is not None:
        # Trained anew under the same name it is another arm.
        parameters["model_bytes"] = hashlib.sha256(model.read_bytes()).hexdigest()
    return cell_key(cell, workload_digest, parameters)


def config_of(name: str) -> ArmConfig:
    """Of an arm, on one node or behind a router. Raises `ArmError`."""
    return fleet_arm(name)[2] if SPLIT in name else load_arm(name)


@lru_cache(maxsize=1)
def _scene(scene: Scene, cache: Path) -> SceneData:
    """The newest scene of this worker: its next job is often of the same."""
    return SceneData(scene, cache)


def run_job(job: Job) -> Done:
    """Runs what is left of a job until its time is over."""
    began = time.monotonic()
    store = Store(job.folder)
    data = _scene(job.scene, job.cache)
    finished, left = [], []
    for name, key in job.arms:
        if store.has(key):
            finished.append(name)
        elif time.time() >= job.stop_at:
            left.append(name)
        else:
            begun = time.process_time()
            result, track = evaluate(data, name, config_of(name))
            # Of the processor; the first arm of a scene pays for the sweep.
            result["seconds"] = round(time.process_time() - begun, 3)
            store.save(key, result, track)
            finished.append(name)
    return Done(job.scene, tuple(finished), tuple(left), time.monotonic() - began)


def evaluate(
    data: SceneData, name: str, config: ArmConfig
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """One cell: figures, and per-tick columns of an arm that moves."""
    if data.scene.nodes > 1:
        return evaluate_fleet(data, name), None
    head = {"scene": data.scene._asdict(), "arm": name}
    # A fault may change what a static split is worth: then it runs in the loop like everybody.
    held = held_alpha(config, lambda: data.known) if isinstance(config, StaticArm) else None
    if held is not None and not data.faults:
        static = data.static(held)
        outcome = outcome_of(static)
        figures = summarise(data, outcome, static_track(data, static.alpha))
        return {**head, **figures, **no_moves(data, outcome)}, None
    if isinstance(config, OracleArm) and config.free:
        outcome, track = stitched(data, config)
        return {**head, **summarise(data, outcome, track), **no_moves(data, outcome)}, None
    arm = make_arm(name, config, lambda: data.track, lambda: data.known)
    run = run_node(
        data.stream,
        data.spec,
        arm,
        data.scene.seed,
        tick_s=TICK_S,
        curves=data.track,
        alpha=BEGIN_ALPHA if held is None else held,
        faults=data.faults,
    )
    track = Track(*(getattr(run, column) for column in Track._fields))
    figures = summarise(data, outcome_of(run), track)
    return {**head, **figures, **totals(run)}, track._asdict()
