"""Pure decisions: a `Reading` of the pod goes in, a `Decision` about α comes out.

`Twin` is loaded when first used: the process that decides needs no numba.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hbm_policy.adapter import RlsAdapter
from hbm_policy.anchor import TwinAnchor
from hbm_policy.config import (
    AdapterConfig,
    AnchorConfig,
    GateConfig,
    MoveConfig,
    PolicyConfig,
    ResidualConfig,
    ShieldConfig,
)
from hbm_policy.costs import CostConstants, CostSource, DeclaredCosts, PriceState
from hbm_policy.decide import Policy, decide, is_hold
from hbm_policy.gate import BurstGate, Phase
from hbm_policy.intake import Intake, read_curve
from hbm_policy.layers import Action, Gate, Residual, SteadyGate
from hbm_policy.reading import (
    Correction,
    Curve,
    Decision,
    Gating,
    PolicyState,
    Reading,
    Reason,
    Traffic,
    describe,
)
from hbm_policy.shield import Shield

if TYPE_CHECKING:
    from hbm_policy.twin import Twin

__all__ = [
    "Action",
    "AdapterConfig",
    "AnchorConfig",
    "BurstGate",
    "Correction",
    "CostConstants",
    "CostSource",
    "Curve",
    "Decision",
    "DeclaredCosts",
    "Gate",
    "GateConfig",
    "Gating",
    "Intake",
    "MoveConfig",
    "Phase",
    "Policy",
    "PolicyConfig",
    "PolicyState",
    "PriceState",
    "Reading",
    "Reason",
    "Residual",
    "ResidualConfig",
    "RlsAdapter",
    "Shield",
    "ShieldConfig",
    "SteadyGate",
    "Traffic",
    "Twin",
    "TwinAnchor",
    "decide",
    "describe",
    "is_hold",
    "read_curve",
]


def __getattr__(name: str) -> Any:
    if name == "Twin":
        from hbm_policy.twin import Twin

        return Twin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
