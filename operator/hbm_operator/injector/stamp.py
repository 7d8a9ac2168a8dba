"""What an injected pod says of itself: the status annotation and the label beside it."""

from __future__ import annotations

import json
from typing import Any, Final

from pydantic import Field, ValidationError

from hbm_operator import names
from hbm_operator.injector.skip import SkipReason
from hbm_operator.models.base import Received

TRANSPORT_SHM: Final = "shm"


class Stamp(Received):
    """The record in the annotation `hbm-partition.io/status`: what was done, never an outcome."""

    version: str
    """Version of the operator that injected."""
    protocol: int = names.PROTOCOL_VERSION
    container: str
    """The container that serves the model."""
    port: int
    """Port of the sidecar's health and metrics endpoint."""
    native: bool
    """An init container that is always restarted; else an ordinary container."""
    transport: str = TRANSPORT_SHM
    init_containers: tuple[str, ...] = ()
    """Init containers that were added."""
    containers: tuple[str, ...] = ()
    """Containers that were added."""
    volumes: tuple[str, ...] = Field(())
    """Volumes that were added."""

    def to_annotation(self) -> str:
        """The annotation's value: JSON on one line, keys in order."""
        return json.dumps(
            self.model_dump(mode="json", by_alias=True), separators=(",", ":"), sort_keys=True
        )

    @classmethod
    def of(cls, pod: dict[str, Any]) -> Stamp | None:
        """The stamp of a pod; None if it has none or one that cannot be read."""
        written = (pod.get("metadata", {}).get("annotations") or {}).get(names.STATUS)
        if written is None:
            return None
        try:
            return cls.model_validate_json(written)
        except ValidationError:
            return None

    def holds_for(self, pod: dict[str, Any]) -> bool:
        """Whether the pod has everything that the stamp says was added to it."""
        metadata, spec = pod.get("metadata", {}), pod.get("spec", {})
        added = {*self.init_containers, *self.containers}
        return (
            (metadata.get("labels") or {}).get(names.INJECTED) == "true"
            and names.SIDECAR_CONTAINER in added
            and names.RUN_VOLUME in self.volumes
            and set(self.init_containers) <= _names(spec.get("initContainers"))
            and {self.container, *self.containers} <= _names(spec.get("containers"))
            and set(self.volumes) <= _names(spec.get("volumes"))
        )


def forged_keys(pod: dict[str, Any]) -> tuple[str, ...]:
    """Keys that only the webhook writes and that are not its own writing in this pod.

    A webhook may be called a second time for a pod that it has already edited, and such a pod may
    be copied with all that it has: then its stamp holds, and a reason is one of the known ones.
    """
    metadata = pod.get("metadata", {})
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    forged = []
    stamp = Stamp.of(pod)
    if stamp is None or not stamp.holds_for(pod):
        forged += [names.INJECTED] * (names.INJECTED in labels)
        forged += [names.STATUS] * (names.STATUS in annotations)
    if annotations.get(names.SKIP_REASON) not in set(SkipReason):
        forged += [key for key in (names.SKIP_REASON, names.SKIP_MESSAGE) if key in annotations]
    return tuple(forged)


def _names(entries: list[dict[str, Any]] | None) -> set[str]:
    return {str(entry.get("name")) for entry in entries or ()}
