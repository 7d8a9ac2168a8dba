"""`HBMPolicy`: what users apply. Which pods, and how their pools are governed."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from hbm_operator.models.base import Condition, Metadata, Received, Strict

Alpha = Annotated[float, Field(ge=0.0, le=1.0)]


def _as_text(value: object) -> object:
    """`0` and `"0"` are the same quantity; a bool is none."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Quantity = Annotated[
    str,
    Field(
        pattern=r"^[0-9]+(\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?$",
        max_length=32,
        json_schema_extra={"x-kubernetes-int-or-string": True},
    ),
    BeforeValidator(_as_text),
]


class Mode(StrEnum):
    """Who moves α."""

    AUTO = "Auto"
    RECOMMEND = "Recommend"
    FIXED = "Fixed"


class SelectorOperator(StrEnum):
    """Operators of a label selector."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class SelectorRequirement(Strict):
    """One line of `matchExpressions`."""

    key: Annotated[str, Field(max_length=317, description="The label.")]
    operator: SelectorOperator = Field(description="How its value is compared.")
    values: Annotated[
        tuple[Annotated[str, Field(max_length=63)], ...],
        Field(max_length=32, description="Values for In and NotIn; none for the others."),
    ] = ()


class LabelSelector(Strict):
    """Pods by their labels. Empty selects every injected pod of the namespace."""

    match_labels: Annotated[
        dict[str, Annotated[str, Field(max_length=63)]],
        Field(max_length=32, description="Labels a pod must have, with these values."),
    ] = Field(default_factory=dict)
    match_expressions: Annotated[
        tuple[SelectorRequirement, ...],
        Field(max_length=16, description="Further requirements; all must hold."),
    ] = ()

    def matches(self, labels: dict[str, str]) -> bool:
        """Whether a pod with these labels is selected; the rules are those of Kubernetes."""
        if any(labels.get(key) != value for key, value in self.match_labels.items()):
            return False
        return all(_holds(requirement, labels) for requirement in self.match_expressions)


def _holds(requirement: SelectorRequirement, labels: dict[str, str]) -> bool:
    value = labels.get(requirement.key)
    match requirement.operator:
        case SelectorOperator.IN:
            return value in requirement.values
        case SelectorOperator.NOT_IN:
            return value not in requirement.values
        case SelectorOperator.EXISTS:
            return value is not None
        case SelectorOperator.DOES_NOT_EXIST:
            return value is None


class AlphaSpec(Strict):
    """α is the share of the pool that holds embedding rows: its bounds, and its value in Fixed."""

    min: Alpha = Field(0.1, description="Lower bound of α.")
    max: Alpha = Field(0.9, description="Upper bound of α.")
    initial: Alpha | None = Field(
        None,
        description="α asked for when a server starts and nothing has been decided yet. "
        "Left out: the server's own.",
    )
    fixed: Alpha | None = Field(None, description="α of mode Fixed; within the bounds.")


class SloSpec(Strict):
    """The latency goal."""

    latency_ms: Annotated[
        float, Field(gt=0.0, le=3_600_000.0, description="Latency that counts as met, ms.")
    ]


class RefillSpec(Strict):
    """Background copies of hot rows into newly won extents."""

    max_bytes_per_second: Quantity = Field(
        "256Mi", description="Budget of the copies as a quantity per second; 0 turns them off."
    )


class MovesSpec(Strict):
    """What a move of α may cost."""

    slew_per_second: Annotated[
        float, Field(gt=0.0, le=10.0, description="Speed of a move in α per second.")
    ] = 0.05
    fraction: Annotated[
        float,
        Field(gt=0.0, le=1.0, description="Part of the way to the optimum that one move goes."),
    ] = 0.75
    min_change: Annotated[
        float, Field(ge=0.0, le=1.0, description="No move starts for less than this change of α.")
    ] = 0.02
    dwell_seconds: Annotated[
        float, Field(ge=0.0, le=86_400.0, description="Least time between two moves.")
    ] = 1.0


class ArtefactSpec(Strict):
    """A learned policy out of the ConfigMap `hbm-policies` of the pod's namespace."""

    key: Annotated[
        str,
        Field(
            min_length=1,
            max_length=253,
            pattern=r"^[-._a-zA-Z0-9]+$",
            description="Key in the ConfigMap.",
        ),
    ]
    sha256: Annotated[
        str,
        Field(
            pattern=r"^[0-9a-f]{64}$",
            max_length=64,
            description="Hash of the content, checked before use.",
        ),
    ]


class GovernSpec(Strict):
    """How a pool is governed: the part of a policy that ends up in each partition."""

    mode: Mode = Field(
        Mode.AUTO,
        description="Auto: decide and apply. Recommend: decide and publish, apply nothing. "
        "Fixed: keep alpha.fixed.",
    )
    alpha: AlphaSpec = Field(default_factory=AlphaSpec, description="Bounds and fixed value of α.")
    slo: SloSpec | None = Field(None, description="Latency goal. Left out: the server's own.")
    refill: RefillSpec = Field(default_factory=RefillSpec, description="Throttle of the refill.")
    moves: MovesSpec = Field(default_factory=MovesSpec, description="Price of moves.")
    tick_milliseconds: Annotated[
        int, Field(ge=20, le=60_000, description="Time between two decisions, ms.")
    ] = 250
    artefact: ArtefactSpec | None = Field(
        None, description="Learned policy. Left out: the built-in layers decide."
    )


class HBMPolicySpec(GovernSpec):
    """The wish for a set of pods."""

    selector: LabelSelector = Field(
        default_factory=LabelSelector,
        description="Injected pods of this namespace that the policy governs. Empty: all.",
    )
    container: Annotated[
        str | None,
        Field(
            max_length=63,
            description="Governs only pods whose served container has this name.",
        ),
    ] = None
    priority: Annotated[
        int,
        Field(
            ge=0,
            le=1000,
            description="Of several policies that match a pod the highest wins; then the oldest, "
            "then the first by name.",
        ),
    ] = 0


class HBMPolicyStatus(Received):
    """What became of the policy, as the controller counts it."""

    observed_generation: int = Field(0, description="Generation that the counts are about.")
    selected: int = Field(0, description="Injected pods that the policy governs.")
    applied: int = Field(0, description="Of these, how many sidecars have taken this spec over.")
    failed: int = Field(0, description="Of these, how many say that they cannot.")
    not_injected: int = Field(
        0, description="Pods that match and ask for the sidecar but run without it."
    )
    conditions: tuple[Condition, ...] = Field(
        (), max_length=16, description="Ready, Progressing and Degraded."
    )


class HBMPolicy(Received):
    """The whole object, as it is read."""

    api_version: Literal["hbm-partition.io/v1alpha1"] = "hbm-partition.io/v1alpha1"
    kind: Literal["HBMPolicy"] = "HBMPolicy"
    metadata: Metadata
    spec: HBMPolicySpec = Field(default_factory=HBMPolicySpec)
    status: HBMPolicyStatus = Field(default_factory=HBMPolicyStatus)
