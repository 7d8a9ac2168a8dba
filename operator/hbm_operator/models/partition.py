"""`HBMPartition`: one injected GPU pod, what is asked of it and what it says of itself."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from hbm_operator.models.base import Condition, Metadata, Received, Strict
from hbm_operator.models.policy import GovernSpec, Mode


class PartitionMode(StrEnum):
    """The modes of a policy, and Hold where no policy governs the pod."""

    AUTO = Mode.AUTO
    RECOMMEND = Mode.RECOMMEND
    FIXED = Mode.FIXED
    HOLD = "Hold"


class ConditionType(StrEnum):
    """Conditions of a partition and who writes them."""

    READY = "Ready"
    """Controller: the sum of the others."""
    ADMITTED = "Admitted"
    """Controller: the pod is injected and a policy governs it."""
    APPLIED = "Applied"
    """Sidecar: it has taken this generation over."""
    DEGRADED = "Degraded"
    """Controller: something works less well than it should; the reason says what."""


class Reason(StrEnum):
    """Reasons of the conditions, all of them."""

    # Admitted
    POLICY_SELECTED = "PolicySelected"
    NO_POLICY = "NoPolicy"
    # Applied
    APPLIED = "Applied"
    PENDING = "Pending"
    ARTEFACT_PENDING = "ArtefactPending"
    ARTEFACT_INVALID = "ArtefactInvalid"
    SPEC_REFUSED = "SpecRefused"
    SERVER_ABSENT = "ServerAbsent"
    # Degraded
    AS_EXPECTED = "AsExpected"
    SIDECAR_SILENT = "SidecarSilent"
    SIDECAR_OUTDATED = "SidecarOutdated"
    SERVER_STALE = "ServerStale"
    TWIN_STALE = "TwinStale"
    # Ready
    READY = "Ready"
    NOT_APPLIED = "NotApplied"


class PodReference(Strict):
    """The pod, with the uid: a pod that comes back under the same name is another one."""

    name: Annotated[str, Field(min_length=1, max_length=253, description="Name of the pod.")]
    uid: Annotated[str, Field(min_length=1, max_length=64, description="Uid of the pod.")]


class PolicyReference(Strict):
    """The policy that this partition was made from."""

    name: Annotated[str, Field(min_length=1, max_length=253, description="Name of the policy.")]
    uid: Annotated[str, Field(min_length=1, max_length=64, description="Uid of the policy.")]
    generation: Annotated[int, Field(ge=1, description="Generation of the policy's spec.")]


class HBMPartitionSpec(GovernSpec):
    """What is asked of one pod. Written by the controller; people edit the policy."""

    mode: PartitionMode = Field(  # type: ignore[assignment]
        PartitionMode.HOLD,
        description="As in the policy; Hold where no policy governs the pod: α stays where it is.",
    )
    pod_ref: PodReference = Field(description="The pod; immutable.")
    node_name: Annotated[str, Field(max_length=253, description="Node that the pod runs on.")] = ""
    container: Annotated[
        str, Field(max_length=63, description="Container that serves the model.")
    ] = ""
    policy_ref: PolicyReference | None = Field(
        None, description="Where the rest of the spec comes from. Left out: no policy governs it."
    )


class LastDecision(Strict):
    """The newest decision that changed something, in words."""

    time: datetime = Field(description="When it was taken.")
    reasons: Annotated[
        tuple[Annotated[str, Field(max_length=64)], ...],
        Field(max_length=16, description="Codes, as `hbm explain` explains them."),
    ] = ()
    message: Annotated[str, Field(max_length=1024, description="The same in a sentence.")] = ""


class SidecarStatus(Strict):
    """Who writes the measured values."""

    version: Annotated[str, Field(max_length=64, description="Version of the sidecar.")]
    protocol: Annotated[int, Field(ge=1, description="Version of what it says in this status.")]
    restarts: Annotated[int, Field(ge=0, description="Restarts of its processes so far.")] = 0


class HBMPartitionStatus(Received):
    """Measured values and `Applied` are the sidecar's, the other conditions the controller's."""

    observed_generation: int = Field(0, description="Generation that the sidecar has taken over.")
    alpha: float | None = Field(None, description="α as the server has it.")
    target: float | None = Field(None, description="α that the sidecar asks for, or recommends.")
    anchor: float | None = Field(None, description="The twin's estimate of the best α.")
    kv_hit_ratio: float | None = Field(
        None, description="Share of history tokens whose KV was reused, over the last window."
    )
    emb_hit_ratio: float | None = Field(
        None, description="Share of row lookups that hit, over the last window."
    )
    p99_ms: float | None = Field(
        None, description="P99 of the server's own latency over its last window, ms."
    )
    moves: int | None = Field(None, description="Moves of α since the server's start.")
    last_decision: LastDecision | None = Field(None, description="The newest decision.")
    last_report_time: datetime | None = Field(
        None,
        description="When the sidecar last wrote: at once for a new generation or condition, every "
        "30 s at most for measured values, about once a minute if nothing has changed.",
    )
    sidecar: SidecarStatus | None = Field(None, description="The sidecar itself.")
    conditions: tuple[Condition, ...] = Field(
        (),
        max_length=16,
        description="Applied is the sidecar's; Admitted, Degraded and Ready are the controller's.",
    )


class HBMPartition(Received):
    """The whole object, as it is read."""

    api_version: Literal["hbm-partition.io/v1alpha1"] = "hbm-partition.io/v1alpha1"
    kind: Literal["HBMPartition"] = "HBMPartition"
    metadata: Metadata
    spec: HBMPartitionSpec
    status: HBMPartitionStatus = Field(default_factory=HBMPartitionStatus)
