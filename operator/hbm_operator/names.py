"""Every name that operator, chart, sidecar and users share. Nothing else spells one out."""

from __future__ import annotations

from typing import Final

GROUP: Final = "hbm-partition.io"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
PROTOCOL_VERSION: Final = 1
"""Version of what sidecar and controller say to each other in an HBMPartition's status. An older
sidecar keeps working and is reported as `Degraded/SidecarOutdated`."""

# -- labels and annotations that users write ------------------------------------------------------
INJECT_LABEL: Final = f"{GROUP}/inject"
"""On a pod (template): "true" asks for the sidecar, "false" opts out of the namespace's wish."""
NAMESPACE_LABEL: Final = f"{GROUP}/injection"
"""On a namespace: "enabled" asks for the sidecar in all its GPU pods, "disabled" refuses it."""

CONTAINER: Final = f"{GROUP}/container"
"""Name of the container that serves the model."""
PORT: Final = f"{GROUP}/port"
"""Port of the sidecar's health and metrics endpoint instead of the default."""
IMAGE: Final = f"{GROUP}/sidecar-image"
CPU: Final = f"{GROUP}/sidecar-cpu"
"""CPU request of the sidecar."""
CPU_LIMIT: Final = f"{GROUP}/sidecar-cpu-limit"
MEMORY: Final = f"{GROUP}/sidecar-memory"
"""Memory request and limit of the sidecar."""
NATIVE_SIDECAR: Final = f"{GROUP}/native-sidecar"
""""false": an ordinary container instead of an init container that is always restarted."""
TRANSPORT: Final = f"{GROUP}/transport"
"""How sidecar and server meet: "shm" (files in a memory volume) is the only one today."""
RANKS: Final = f"{GROUP}/ranks"
"""Number of control-block pairs of a server with several GPUs, one per rank."""
RUN_DIR_SIZE: Final = f"{GROUP}/run-dir-size"
"""Size limit of the memory volume that both sides share, as a quantity."""

INPUT_ANNOTATIONS: Final = frozenset(
    {
        CONTAINER,
        PORT,
        IMAGE,
        CPU,
        CPU_LIMIT,
        MEMORY,
        NATIVE_SIDECAR,
        TRANSPORT,
        RANKS,
        RUN_DIR_SIZE,
    }
)

# -- what the webhook writes ----------------------------------------------------------------------
INJECTED: Final = f"{GROUP}/injected"
"""Label of an injected pod, "true": what the controller, PodMonitor and NetworkPolicy select."""
STATUS: Final = f"{GROUP}/status"
"""Annotation: JSON record of what was done (`injector.Stamp`)."""
SKIP_REASON: Final = f"{GROUP}/skip-reason"
"""Annotation: why a pod that asked for the sidecar did not get it."""
SKIP_MESSAGE: Final = f"{GROUP}/skip-message"
"""Annotation: the same for people, with what to do. Whoever makes the pod for them (a ReplicaSet, a
Job) sees no admission warnings."""
OUTPUT_LABELS: Final = frozenset({INJECTED})
OUTPUT_ANNOTATIONS: Final = frozenset({STATUS, SKIP_REASON, SKIP_MESSAGE})

ROUTE_LABEL: Final = f"{GROUP}/route"
"""Label of a router's pods: the name of its route."""

# -- inside an injected pod -----------------------------------------------------------------------
SIDECAR_CONTAINER: Final = "hbm-sidecar"
RUN_VOLUME: Final = "hbm-run"
RUN_DIR: Final = "/run/hbm"
POLICIES_VOLUME: Final = "hbm-policies"
POLICIES_DIR: Final = "/etc/hbm/policies"
REDIS_VOLUME: Final = "hbm-redis"
REDIS_DIR: Final = "/etc/hbm/redis"
TOKEN_VOLUME: Final = "hbm-token"
TOKEN_DIR: Final = "/var/run/secrets/hbm-partition.io/serviceaccount"
"""The sidecar's own bound token, CA and namespace, whatever the pod does with its own."""
TMP_VOLUME: Final = "hbm-tmp"
SIDECAR_PORT: Final = 9400
SIDECAR_PORT_NAME: Final = "hbm-metrics"

# -- objects in users' namespaces -----------------------------------------------------------------
POLICIES_CONFIGMAP: Final = "hbm-policies"
"""Optional ConfigMap of artefacts (ONNX files); made by users."""
REDIS_SECRET: Final = "hbm-redis"
"""Made by the controller; keys `url` and, for TLS, `ca.crt`."""
SIDECAR_ROLE_BINDING: Final = "hbm-partition-sidecar"

# -- writers of status ----------------------------------------------------------------------------
CONTROLLER_MANAGER: Final = "hbm-controller"
SIDECAR_MANAGER: Final = "hbm-sidecar"
"""Field managers of server-side apply: each owns its own conditions and fields."""

COMPONENT_LABELS: Final = {
    "app.kubernetes.io/name": "hbm-partition",
    "app.kubernetes.io/part-of": "hbm-partition",
    "app.kubernetes.io/managed-by": "hbm-operator",
}
