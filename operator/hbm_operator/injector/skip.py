"""Why a pod that asked for the sidecar does not get it."""

from __future__ import annotations

from enum import StrEnum


class SkipReason(StrEnum):
    """Values of the annotation `hbm-partition.io/skip-reason`, all of them."""

    ALREADY_INJECTED = "already-injected"
    """A container has the sidecar's name already."""
    CONTAINER_NOT_FOUND = "container-not-found"
    CONTAINER_AMBIGUOUS = "container-ambiguous"
    HOST_NETWORK = "host-network"
    """All pods of a node would share the sidecar's port."""
    INVALID_ANNOTATION = "invalid-annotation"
    INVALID_LABEL = "invalid-label"
    """The pod's wish is neither "true" nor "false"."""
    JOB_NEEDS_NATIVE = "job-needs-native-sidecar"
    """An ordinary sidecar container never ends, so the Job would never complete."""
    MOUNT_COLLISION = "mount-collision"
    NOT_LINUX = "not-linux"
    PORT_COLLISION = "port-collision"
    RANKS_UNSUPPORTED = "ranks-unsupported"
    """More than one pair of control-block files in a pod; not supported by this version."""
    SEVERAL_GPUS = "several-gpus"
    VOLUME_COLLISION = "volume-collision"
    INTERNAL_ERROR = "internal-error"
    """The injector itself failed; its log says how."""


class Skip(Exception):
    """Raised inside the injector: the pod goes on without the sidecar."""

    def __init__(self, reason: SkipReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
