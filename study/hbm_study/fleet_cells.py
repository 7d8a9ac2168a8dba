"""Cells of several nodes: the router's policies side by side, with α fixed or chosen on each node.

An arm's name there is `ROUTING+ARM`, for example `cost_ms+twin` or `round_robin+static-0.50`. Only
arms that need nothing but readings run on fleets: statics and the product's own without adapter.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from hbm_router.config import Policy
from hbm_sim.curve_track import CurveTrack
from hbm_sim.fleet import ORACLE, FleetRun, run_fleet
from hbm_sim.loop import Arm
from hbm_sim.stream import Stream

from hbm_study.arms import ArmError, Known, load_arm, make_arm
from hbm_study.arms.config import ArmConfig, PolicyArm, StaticArm
from hbm_study.scene import TICK_S, SceneData
from hbm_study.summary import figures_of

SPLIT: Final = "+"
ROUTINGS: Final[dict[str, tuple[str, dict[str, float]]]] = {
    **{each.value: (each.value, {}) for each in Policy},
    # The score of `weighted` with one of its two kinds of residency only, load as there.
    "kv_aware": ("weighted", {"weight_kv": 0.7, "weight_emb": 0.0}),
    "emb_aware": ("weighted", {"weight_kv": 0.0, "weight_emb": 0.7}),
    ORACLE: (ORACLE, {}),
}
"""Name -> the router's policy and settings that differ from its defaults."""


def fleet_arm(name: str) -> tuple[str, str, ArmConfig]:
    """(routing, arm, its configuration) of a cell's name. Raises `ArmError`."""
    routing, _, arm = name.partition(SPLIT)
    if routing not in ROUTINGS:
        raise ArmError(f"{name}: no routing is called {routing!r}; known: {', '.join(ROUTINGS)}")
    config = load_arm(arm)
    match config:
        case StaticArm():
            fits = config.chosen != "profiled"
        case PolicyArm():
            fits = config.adapter is None and config.residual is None
        case _:
            fits = False
    if not fits:
        raise ArmError(
            f"{name}: on fleets run static splits that need no profile, and the twin without "
            "adapter or residual"
        )
    return routing, arm, config


def evaluate_fleet(data: SceneData, name: str) -> dict[str, Any]:
    """One cell on several nodes."""
    routing, arm, config = fleet_arm(name)

    def unknown() -> Known:
        raise ArmError(f"{name}: fleets have no oracle")

    def no_track() -> CurveTrack:
        return CurveTrack(TICK_S, np.zeros(0), data.spec.costs, data.spec.info.cost_model)

    def node_arm(index: int) -> Arm:
        return make_arm(arm, config, no_track, unknown)

    static = isinstance(config, StaticArm)
    alpha = 0.5
    if isinstance(config, StaticArm):
        alpha = data.spec.info.alpha_min if config.chosen == "all-kv" else config.alpha
    policy, settings = ROUTINGS[routing]
    run = run_fleet(
        data.stream,
        data.spec,
        data.scene.nodes,
        data.scene.seed,
        policy=policy,
        settings=settings,
        arms=None if static else node_arm,
        twins=not static,
        alpha=alpha,
        tick_s=TICK_S,
    )
    return {"scene": data.scene._asdict(), "arm": name, **_summary(data, data.stream, run)}


def _summary(data: SceneData, stream: Stream, run: FleetRun) -> dict[str, Any]:
    counted = stream.counted
    slo_ms = data.spec.info.slo_ms
    known = run.predicted
    hits = known["tp"] + known["fn"]
    busiest = run.requests.max(initial=0) / max(float(run.requests.mean()), 1.0)
    return {
        "pooled": figures_of(run, counted, slo_ms),
        "regimes": {
            name: figures_of(run, mask, slo_ms)
            for name in stream.regimes
            if (mask := stream.of_regime(name, settled=False)).any()
        },
        "moved_bytes": int(run.moved_bytes.sum()),
        "busiest_node": float(busiest),
        "kv_predicted": known["tp"] / hits if hits else None,
        "alpha_mean": float(run.alpha.mean()),
    }
