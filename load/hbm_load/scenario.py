"""A workload as a file: regimes, the walk through them, and the catalogue they draw from.

The vocabulary is that of the standard scenarios (README, "Scenarios"): users come back, are hot or
are seen once; items follow Zipf-Mandelbrot with churn; some lookups go to a shelf of new items.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hbm_load.errors import ScenarioError
from hbm_load.model_text import parse_model

Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Arrivals(_Section):
    """When requests arrive: a Poisson process whose rate may wander, swing and flash."""

    rate_per_s: float = Field(gt=0.0, le=1e6, allow_inf_nan=False)
    """Mean arrivals per second, over all nodes. Modulation and swing keep this mean; flashes are
    on top of it."""
    modulation_sd: float = Field(0.0, ge=0.0, le=2.0, allow_inf_nan=False)
    """Standard deviation of the log of the rate (an AR(1) process). 0: constant rate."""
    modulation_correlation_s: float = Field(5.0, gt=0.0, allow_inf_nan=False)
    """Time after which that process has forgotten 63 % of its value, s."""
    swing: float = Field(0.0, ge=0.0, le=1.0, allow_inf_nan=False)
    """Amplitude of a sinus (and half of it of its second harmonic) around the mean. 0: none."""
    swing_period_s: float = Field(86_400.0, gt=0.0, allow_inf_nan=False)
    """Period of that sinus, s."""
    flashes_per_s: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """Flash crowds per second. Each adds `flash_requests`, decaying as a power law
    (Dezso et al., physics/0505087). 0: none."""
    flash_requests: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """Mean number of extra requests of one flash crowd."""
    flash_decay: float = Field(1.5, gt=1.0, le=5.0, allow_inf_nan=False)
    """Exponent of the decay of a flash crowd; the rate halves after about one second."""


class Users(_Section):
    """Who asks. First `revisit` is tried, then `hot`; what is left are one-off users."""

    revisit: Share = 0.0
    """Probability that the user of an earlier request comes back (*prev*)."""
    revisit_distance: float = Field(400.0, ge=0.0, allow_inf_nan=False)
    """How many requests back that was: floor(D * lognormal(0, revisit_sigma)) + 1 (*D*)."""
    revisit_sigma: float = Field(1.0, ge=0.0, le=5.0, allow_inf_nan=False)
    hot: Share = 0.0
    """Probability, when nobody came back, that the user is one of the hot ones (*h*)."""
    hot_users: int = Field(300, ge=1)
    """How many hot users there are."""
    hot_zipf_s: float = Field(0.0, ge=0.0, le=4.0, allow_inf_nan=False)
    """Exponent of their activity: user r comes with probability proportional to (r + 1)^-s.
    0: all are equally likely."""
    one_off_users: int = Field(2_000_000, ge=1)
    """Size of the population that is left, uniformly drawn."""
    cohort: str = Field("", max_length=32)
    """Regimes with the same cohort share their hot and one-off users."""


class Items(_Section):
    """What is looked up: rank r has probability proportional to (r + zipf_q)^-zipf_s."""

    zipf_s: float = Field(0.8, ge=0.0, le=4.0, allow_inf_nan=False)
    """Popularity exponent (*s*). 0: uniform."""
    zipf_q: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """Mandelbrot's shift; flattens the head. 0: plain Zipf."""
    churn: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """Ranks that change their item per request: rows lose their popularity to others."""
    new_share: Share = 0.0
    """Share of candidates and of newly added history that goes to the shelf (*fnew*)."""
    new_items: int = Field(0, ge=0)
    """Size of the shelf of new items: the last ids of the catalogue (*Mnew*)."""
    new_zipf_s: float = Field(0.6, ge=0.0, le=4.0, allow_inf_nan=False)
    """Popularity exponent on the shelf."""

    @model_validator(mode="after")
    def _shelf(self) -> Items:
        if self.new_share > 0.0 and self.new_items == 0:
            raise ValueError(
                f"new_share is {self.new_share} but new_items is 0; give the shelf rows"
            )
        return self


class History(_Section):
    """How long the history of a user is when first seen, and how it grows with each visit."""

    median: float = Field(gt=0.0, allow_inf_nan=False)
    """Median of the lognormal length, items."""
    sigma: float = Field(0.5, ge=0.0, le=3.0, allow_inf_nan=False)
    minimum: int = Field(1, ge=1)
    maximum: int = Field(16_384, ge=1, le=1 << 22)
    """Lengths are clipped to [minimum, maximum]; growth may go beyond `maximum`."""
    growth: float = Field(2.0, ge=0.0, le=1e4, allow_inf_nan=False)
    """Mean number of items (Poisson) that a request adds to its user's history afterwards."""

    @model_validator(mode="after")
    def _order(self) -> History:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum} is above maximum {self.maximum}")
        return self


class Regime(_Section):
    """A stationary kind of traffic."""

    arrivals: Arrivals
    users: Users = Users()
    items: Items = Items()
    history: History
    candidates: int = Field(64, ge=1, le=1 << 16)
    """Items to be scored per request."""


class Step(_Section):
    """One stretch of the walk: a regime, and how it is reached."""

    regime: Name
    share: float = Field(1.0, gt=0.0, allow_inf_nan=False)
    """Part of the whole duration, relative to the shares of the other steps."""
    label: Name | None = None
    """Name under which results are pooled; default: the regime's name."""
    drift_from: Name | None = None
    """Regime whose numbers change into those of `regime` during this step. None: a jump."""
    drift_levels: int = Field(6, ge=2, le=10_000)
    """Number of plateaus of the drift, both ends included."""
    drift_share: float = Field(1.0, gt=0.0, le=1.0)
    """Part of the step taken by the drift; afterwards `regime` holds."""

    @property
    def name(self) -> str:
        """The pooled name of this step."""
        return self.label or self.regime


class Scenario(_Section):
    """A whole workload file."""

    schema_version: Literal[1]
    name: Name
    description: str = ""
    catalogue: int = Field(ge=1, lt=1 << 40)
    """Number of items; ids are 0 to catalogue - 1."""
    duration_s: float = Field(gt=0.0, allow_inf_nan=False)
    """Length of one walk when no other is asked for, s."""
    settle_share: float = Field(0.5, ge=0.0, lt=1.0)
    """Leading part of each step in which caches and α are still on their way: optima are
    taken over what follows it."""
    regimes: dict[Name, Regime] = Field(min_length=1)
    walk: tuple[Step, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _references(self) -> Scenario:
        known = ", ".join(self.regimes)
        for index, step in enumerate(self.walk):
            for name in (step.regime, step.drift_from):
                if name is not None and name not in self.regimes:
                    raise ValueError(f"walk.{index}: no regime is called {name!r}; known: {known}")
        for name, regime in self.regimes.items():
            if regime.items.new_items > self.catalogue:
                raise ValueError(
                    f"regimes.{name}.items.new_items is {regime.items.new_items}, more than the "
                    f"catalogue of {self.catalogue} items"
                )
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """Pooled names in order of first appearance."""
        return tuple(dict.fromkeys(step.name for step in self.walk))


def blend(start: Regime, end: Regime, weight: float) -> Regime:
    """The regime `weight` of the way from `start` to `end`: every number is interpolated.

    Text (the cohort) is that of `end`.
    """
    mixed = _blend_values(start.model_dump(), end.model_dump(), weight)
    return Regime.model_validate(mixed)


def _blend_values(start: Any, end: Any, weight: float) -> Any:
    if isinstance(end, dict):
        return {key: _blend_values(start[key], value, weight) for key, value in end.items()}
    if isinstance(end, int):
        return round(start + (end - start) * weight)
    if isinstance(end, float):
        return start + (end - start) * weight
    return end


def scenarios() -> list[str]:
    """Names that `load_scenario` takes besides file paths."""
    folder = files("hbm_load") / "scenarios"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_scenario(source: str | Path) -> Scenario:
    """Reads a shipped scenario by name, or a YAML file.

    Raises `ScenarioError` with one line naming the file, the field and the value.
    """
    label = str(source)
    if label in scenarios():
        text = (files("hbm_load") / "scenarios" / f"{label}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ScenarioError(
                f"{label}: cannot be read ({reason}); give a YAML file or one of: "
                f"{', '.join(scenarios())}"
            ) from error
    return parse_scenario(text, label)


def parse_scenario(text: str, label: str) -> Scenario:
    """Checks the text of a scenario; `label` names it in the error."""
    return parse_model(
        text,
        label,
        Scenario,
        ScenarioError,
        "catalogue, regimes and walk",
        "see the fields in hbm_load/scenario.py",
    )
