"""What an arm is configured by: one file of `arm_configs/` each, by the arm's name.

A name may end in a number, which is the family's own parameter: `static-0.30` is `static.yaml` at
α = 0.3, `oracle-paid-0.75` goes three quarters of the way.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from hbm_policy.config import (
    AdapterConfig,
    AnchorConfig,
    GateConfig,
    PolicyConfig,
    ResidualConfig,
    ShieldConfig,
)
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class ArmError(ValueError):
    """An arm that is not known or whose file cannot be used; one line."""


class _Arm(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    description: str
    """One sentence for tables."""
    tuned: str = ""
    """How its parameters were found; empty: by hand."""
    drop_only: bool = False
    """Extents that EMB gives up are handed over at once and their rows dropped, instead of
    relocating referenced rows slice by slice."""
    moves: ShieldConfig = ShieldConfig()
    """What a move of this arm may cost. Tuned per arm, on training and validation seeds only."""


class StaticArm(_Arm):
    """α never moves."""

    kind: Literal["static"]
    alpha: Share = 0.5
    """Held from the start."""
    chosen: Literal["given", "all-kv", "profiled"] = "given"
    """`given`: by `alpha`. `all-kv`: the node's lowest. `profiled`: best by mean service time for
    the regime that the stream begins with, as a profile at deployment would find it."""


class OracleArm(_Arm):
    """Knows each regime's best α, and when a regime begins."""

    kind: Literal["oracle"]
    free: bool
    """Moves cost nothing: caches are warm at the new α at once. Otherwise as for everybody."""
    fraction: Share = 1.0
    """Part of the way from the best static α to the regime's own."""
    criterion: Literal["mean", "tail"] = "mean"
    """Best by mean service time or by P99 of the regime."""


class PolicyArm(_Arm):
    """The product's own layers; None: without that layer."""

    kind: Literal["policy"]
    anchor: AnchorConfig = AnchorConfig()
    adapter: AdapterConfig | None = None
    gate: GateConfig | None = None
    residual: ResidualConfig | None = None
    residual_file: str | None = None
    """ONNX file of the learned residual; None: the one that ships with `hbm_learn`."""
    shield: bool = True
    """False: the ablation without shield; α goes where the anchor is, at once."""
    refill: bool = True
    """False: the ablation without background refill."""
    throttle: bool = True
    """False: the ablation without refill throttle; the budget is used whatever the link does."""

    def policy_config(self) -> PolicyConfig:
        """The layers as the policy takes them."""
        return PolicyConfig(
            anchor=self.anchor,
            shield=self.moves,
            gate=self.gate,
            adapter=self.adapter,
            residual=self.residual or ResidualConfig(),
        )


class PidArm(_Arm):
    """Holds the time of missed rows to that of recomputed tokens at a tuned ratio."""

    kind: Literal["pid"]
    period_s: Positive = 2.0
    """Time between two corrections."""
    log_ratio: float = 0.0
    """Set point of ln(gather time ÷ recompute time). 0: both take equally long."""
    proportional: float = 0.02
    """α per unit of change of the error."""
    integral: float = 0.005
    """α per unit of error and correction."""
    derivative: float = 0.0
    """α per unit of second difference of the error."""


class ClimbArm(_Arm):
    """Goes on while mean service time falls, turns round when it rises."""

    kind: Literal["climb"]
    period_s: Positive = 5.0
    step: Annotated[Share, Field(gt=0.0)] = 0.04
    """First step in α; halved at each turn down to a quarter, back to whole on a jump of cost."""
    restart: Positive = 0.1
    """A change of cost by more than this share starts the search anew."""


class BayesArm(_Arm):
    """Bayesian optimisation of mean service time over α, on a sliding window of trials."""

    kind: Literal["bayes"]
    period_s: Positive = 5.0
    """Length of one trial."""
    settle_s: NonNegative = 2.0
    """Leading part of a trial, while caches follow, that is not counted."""
    trials: int = Field(24, ge=4, le=500)
    """Older trials are forgotten: traffic is not stationary."""
    startup: int = Field(5, ge=1)
    """Random trials before the first model."""
    sampler: Literal["tpe", "gp"] = "tpe"
    """optuna's sampler."""


class LearnedArm(_Arm):
    """A regression from a window of signals to α*, trained by `hbm eval train`."""

    kind: Literal["xgboost", "lstm"]
    model: str
    """File in `arm_models/`."""
    period_s: Positive = 2.0
    """Time between two looks at the signals; as in training."""
    window: int = Field(8, ge=1, le=256)
    """Looks that a prediction is made from; as in training."""


class PaperArm(_Arm):
    """The paper's scheme as far as it is known; without adapter and override: its PPO alone."""

    kind: Literal["paper"]
    model: str
    """File in `arm_models/`: the frozen PPO policy."""
    period_s: Positive = 5.0
    steps: tuple[float, ...] = (-0.06, -0.04, -0.02, 0.0, 0.02, 0.04, 0.06)
    """Δα of each action."""
    adapter: bool = True
    """Layer 2: a small MLP trained online, its rate growing with the deviation of P99."""
    adapter_limit: Share = 0.02
    """Largest |Δα| of the adapter (assumed)."""
    adapter_rate: NonNegative = 0.01
    """Learning rate at no deviation (assumed)."""
    override: bool = True
    """Layer 3: P99 above EMA + 3 σ overrides the step."""
    override_memory: Annotated[Share, Field(gt=0.0)] = 0.1
    """Weight of the newest P99 in the EMA (assumed)."""
    override_step: Share = 0.06
    """|Δα| of an override (assumed: the largest action)."""
    override_hot_users: Share = 0.3
    """Above this hot-user fraction an override leans to KV, else to EMB (assumed)."""


ArmConfig = Annotated[
    StaticArm | OracleArm | PolicyArm | PidArm | ClimbArm | BayesArm | LearnedArm | PaperArm,
    Field(discriminator="kind"),
]
_ADAPTER: Final[TypeAdapter[ArmConfig]] = TypeAdapter(ArmConfig)
_NUMBERED: Final = re.compile(r"^(?P<family>[a-z0-9-]*[a-z])-(?P<number>[01]\.\d+)$")
_PARAMETER: Final = {"static": "alpha", "oracle": "fraction"}


def families() -> list[str]:
    """Names of all files of `arm_configs/`."""
    folder = files("hbm_study") / "arm_configs"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_arm(source: str) -> ArmConfig:
    """The configuration of an arm by name, or of a YAML file by its path. Raises `ArmError`."""
    numbered = _NUMBERED.match(source)
    family = numbered["family"] if numbered else source
    if family in families():
        text = (files("hbm_study") / "arm_configs" / f"{family}.yaml").read_text(encoding="utf-8")
    elif source.endswith((".yaml", ".yml")):
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArmError(f"{source}: cannot be read ({error})") from error
    else:
        raise ArmError(f"no arm is called {source!r}; known: {', '.join(families())}")
    try:
        raw: Any = yaml.safe_load(text)
        if numbered and isinstance(raw, dict):
            parameter = _PARAMETER.get(raw.get("kind", ""))
            if parameter is None:
                raise ArmError(f"{source}: {family} takes no number")
            raw = {**raw, parameter: float(numbered["number"])}
    except yaml.YAMLError as error:
        raise ArmError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    return parse_arm(source, raw)


def parse_arm(source: str, raw: Any) -> ArmConfig:
    """A configuration from plain data; `source` is its name in errors. Raises `ArmError`."""
    try:
        return _ADAPTER.validate_python(raw)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ArmError(f"{source}: {where}: {problem['msg']}") from error
