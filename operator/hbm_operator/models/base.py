"""What all custom resources have in common: strict camelCase models, metadata, conditions."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class Strict(BaseModel):
    """A part of a custom resource: unknown fields are refused, names are camelCase in YAML."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    def to_object(self) -> dict[str, Any]:
        """As it stands in YAML: camelCase, without what is not set."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Received(BaseModel):
    """A part of an object that others write too: unknown fields are left alone."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True
    )


class OwnerReference(Received):
    """`metadata.ownerReferences[]`."""

    api_version: str
    kind: str
    name: str
    uid: str
    controller: bool = False


class Metadata(Received):
    """The parts of `metadata` that are read."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    owner_references: tuple[OwnerReference, ...] = ()


class ConditionStatus(StrEnum):
    """True, False or Unknown, as Kubernetes spells them."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(Strict):
    """One entry of `status.conditions` (metav1.Condition)."""

    type: Annotated[
        str, Field(max_length=64, description="What is stated: Ready, Applied, Admitted, ...")
    ]
    status: ConditionStatus = Field(description="True, False or Unknown.")
    reason: Annotated[
        str,
        Field(
            min_length=1,
            max_length=128,
            pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
            description="One word for programs: why the condition is as it is.",
        ),
    ]
    message: Annotated[
        str, Field(max_length=1024, description="The same for people, and what to do.")
    ] = ""
    observed_generation: Annotated[
        int, Field(ge=0, description="The generation of the spec that this was said of.")
    ] = 0
    last_transition_time: datetime = Field(description="When `status` last changed.")

    @classmethod
    def new(
        cls,
        type_: str,
        status: ConditionStatus,
        reason: str,
        message: str,
        *,
        generation: int,
        now: datetime,
        before: Self | None = None,
    ) -> Self:
        """A condition whose `lastTransitionTime` moves only when its status does.

        Args:
            type_: what is stated.
            status: True, False or Unknown.
            reason: one CamelCase word.
            message: a sentence for people; cut at 1,024 characters.
            generation: of the spec that was looked at.
            now: aware time; seconds are kept.
            before: the same condition as it stands in the object.
        """
        same = before is not None and before.status == status
        since = before.last_transition_time if same and before is not None else now
        return cls(
            type=type_,
            status=status,
            reason=reason,
            message=message[:1024],
            observed_generation=generation,
            last_transition_time=since.astimezone(UTC).replace(microsecond=0),
        )


def find_condition(conditions: tuple[Condition, ...], type_: str) -> Condition | None:
    """The condition of that type."""
    return next((found for found in conditions if found.type == type_), None)
