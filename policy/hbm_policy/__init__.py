"""Pure decisions: a `Reading` of the pod goes in, a `Decision` about α comes out."""

from __future__ import annotations

from hbm_policy.anchor import TwinAnchor
from hbm_policy.config import AnchorConfig, PolicyConfig, ShieldConfig
from hbm_policy.costs import CostConstants, CostSource, DeclaredCosts
from hbm_policy.decide import Policy, decide, is_hold
from hbm_policy.intake import Intake, read_curve
from hbm_policy.layers import Correction, Gate, Gating, NoResidual, Residual, SteadyGate
from hbm_policy.reading import Curve, Decision, PolicyState, Reading, Reason, describe
from hbm_policy.shield import Shield

__all__ = [
    "AnchorConfig",
    "Correction",
    "CostConstants",
    "CostSource",
    "Curve",
    "Decision",
    "DeclaredCosts",
    "Gate",
    "Gating",
    "Intake",
    "NoResidual",
    "Policy",
    "PolicyConfig",
    "PolicyState",
    "Reading",
    "Reason",
    "Residual",
    "Shield",
    "ShieldConfig",
    "SteadyGate",
    "TwinAnchor",
    "decide",
    "describe",
    "is_hold",
    "read_curve",
]
