"""Every way of choosing α, behind the one interface of the closed loop (`hbm_sim.loop.Arm`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hbm_sim.curve_track import CurveTrack
from hbm_sim.loop import Arm

from hbm_study.arms.config import (
    ArmConfig,
    ArmError,
    BayesArm,
    ClimbArm,
    LearnedArm,
    OracleArm,
    PaperArm,
    PidArm,
    PolicyArm,
    StaticArm,
    load_arm,
)
from hbm_study.arms.fixed import Known, PaidOracle, Static, held_alpha

__all__ = [
    "ArmConfig",
    "ArmError",
    "Known",
    "held_alpha",
    "load_arm",
    "make_arm",
    "model_file",
]


def model_file(config: ArmConfig) -> Path | None:
    """The model or residual that an arm runs; None: it has none. Raises `ArmError` for one that is
    not there."""
    if isinstance(config, LearnedArm | PaperArm):
        from hbm_study.arms.networks import model_path

        return model_path(config.model)
    if isinstance(config, PolicyArm) and config.residual is not None:
        from hbm_study.arms.residual_file import residual_path

        return residual_path(config.residual_file)
    return None


def make_arm(
    name: str,
    config: ArmConfig,
    track: Callable[[], CurveTrack],
    known: Callable[[], Known],
) -> Arm:
    """A fresh arm for one run. `track` and `known` are asked only by arms that use them.

    Raises `ArmError` for an arm that needs a model that has not been trained, and for the free
    oracle, which is no controller but a stitching of static runs.
    """
    match config:
        case StaticArm():
            return Static(name, config, held_alpha(config, known))
        case OracleArm(free=False):
            return PaidOracle(name, config, known())
        case PolicyArm():
            from hbm_study.arms.policy_stack import PolicyStack

            return PolicyStack(name, config, track())
        case LearnedArm():
            from hbm_study.arms.predictors import Predictor

            return Predictor(name, config)
        case PaperArm():
            from hbm_study.arms.paper import PaperScheme

            return PaperScheme(name, config)
        case PidArm() | ClimbArm() | BayesArm():
            from hbm_study.arms import feedback

            if isinstance(config, PidArm):
                return feedback.Pid(name, config)
            if isinstance(config, ClimbArm):
                return feedback.Climb(name, config)
            return feedback.Bayes(name, config)
        case _:
            raise ArmError(f"{name} is not run in a loop")
