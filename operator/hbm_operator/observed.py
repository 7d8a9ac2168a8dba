"""What was read from the API, cut down to what decisions are made of.

Thousands of these are kept in memory; the objects themselves are several times as large.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from hbm_operator import names
from hbm_operator.injector import Stamp
from hbm_operator.models.base import Metadata
from hbm_operator.models.partition import HBMPartitionSpec, HBMPartitionStatus

Object = Mapping[str, Any]
M = TypeVar("M", bound=BaseModel)

_FINISHED = ("Succeeded", "Failed")
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)


class Reference(NamedTuple):
    """An object that events can be about."""

    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str


class Pod(NamedTuple):
    """A pod that was injected, or asks to be."""

    namespace: str
    name: str
    uid: str
    version: int
    """Resource version; grows with each change."""
    labels: Mapping[str, str]
    node: str
    """Empty: not scheduled yet."""
    container: str
    """The container that serves the model; empty where the stamp is not readable."""
    injected: bool
    skip_reason: str
    phase: str
    terminating: bool
    owner: Reference | None
    """The object that controls the pod, such as its ReplicaSet."""
    sidecar_started: datetime | None = None
    """When the sidecar's container last started; None while it does not run."""

    @classmethod
    def of(cls, pod: Object) -> Pod:
        """Raises `ValidationError` or `KeyError` for what is no pod."""
        metadata = Metadata.model_validate(pod["metadata"])
        stamp = Stamp.of(dict(pod))
        controller = next((one for one in metadata.owner_references if one.controller), None)
        return cls(
            namespace=metadata.namespace,
            name=metadata.name,
            uid=metadata.uid,
            version=int(metadata.resource_version or 0),
            labels=metadata.labels,
            node=(pod.get("spec") or {}).get("nodeName") or "",
            container=stamp.container if stamp is not None else "",
            injected=metadata.labels.get(names.INJECTED) == "true",
            skip_reason=metadata.annotations.get(names.SKIP_REASON, ""),
            phase=(pod.get("status") or {}).get("phase") or "Pending",
            terminating=metadata.deletion_timestamp is not None,
            owner=None
            if controller is None
            else Reference(
                controller.api_version,
                controller.kind,
                metadata.namespace,
                controller.name,
                controller.uid,
            ),
            sidecar_started=_started(pod.get("status") or {}),
        )

    @property
    def finished(self) -> bool:
        """It ran to its end: nothing is in its GPU memory any more."""
        return self.phase in _FINISHED

    @property
    def reference(self) -> Reference:
        return Reference("v1", "Pod", self.namespace, self.name, self.uid)


@lru_cache(maxsize=4096)
def _shared(part: Any) -> Any:
    """The same object for equal parts: thousands of partitions say mostly the same."""
    return part


def _with_shared_parts(whole: M) -> M:
    shared: dict[str, Any] = {}
    for name, value in whole:
        if isinstance(value, BaseModel):
            shared[name] = _shared(value)
        elif isinstance(value, tuple):
            shared[name] = tuple(_shared(one) for one in value)
    return whole.model_copy(update=shared)


def _started(status: Object) -> datetime | None:
    for list_ in ("initContainerStatuses", "containerStatuses"):
        for container in status.get(list_) or ():
            if container.get("name") == names.SIDECAR_CONTAINER:
                running = (container.get("state") or {}).get("running") or {}
                at = running.get("startedAt")
                return datetime.fromisoformat(at) if at else None
    return None


class Partition(NamedTuple):
    """An HBMPartition."""

    namespace: str
    name: str
    uid: str
    version: int
    generation: int
    created: datetime
    pod_uid: str
    spec: HBMPartitionSpec | None
    """None where a part of it is of another version: it is written anew."""
    status: HBMPartitionStatus

    @classmethod
    def of(cls, partition: Object) -> Partition:
        """Raises `ValidationError` or `KeyError` for what is no partition."""
        metadata = Metadata.model_validate(partition["metadata"])
        raw = partition.get("spec") or {}
        try:
            spec = _with_shared_parts(HBMPartitionSpec.model_validate(raw))
        except ValidationError:
            spec = None
        try:
            status = _with_shared_parts(
                HBMPartitionStatus.model_validate(partition.get("status") or {})
            )
        except ValidationError:
            status = HBMPartitionStatus()
        return cls(
            namespace=metadata.namespace,
            name=metadata.name,
            uid=metadata.uid,
            version=int(metadata.resource_version or 0),
            generation=metadata.generation,
            created=metadata.creation_timestamp or _NEVER,
            pod_uid=(raw.get("podRef") or {}).get("uid") or "",
            spec=spec,
            status=status,
        )

    @property
    def reference(self) -> Reference:
        return Reference(names.API_VERSION, "HBMPartition", self.namespace, self.name, self.uid)
