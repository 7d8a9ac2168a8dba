"""The parts that are added to a pod: the sidecar's container, its volumes, the server's mount."""

from __future__ import annotations

from typing import Any, Final

from hbm_operator import names
from hbm_operator.injector.annotations import Overrides
from hbm_operator.injector.resources import sidecar_resources
from hbm_operator.injector.settings import InjectionSettings

VOLUMES: Final = (
    names.RUN_VOLUME,
    names.TOKEN_VOLUME,
    names.POLICIES_VOLUME,
    names.REDIS_VOLUME,
    names.TMP_VOLUME,
)
_UID: Final = 65_532
_TOKEN_LIFE_S: Final = 3600
_TMP_SIZE: Final = "16Mi"
_STARTUP_PROBES: Final = 120
"""One per second. The sidecar starts within 30 s at 100m CPU; a slow disk may take longer."""


def sidecar_container(
    spec: dict[str, Any], overrides: Overrides, settings: InjectionSettings
) -> dict[str, Any]:
    """The sidecar of a pod with this spec, as an init container or as an ordinary one."""
    container: dict[str, Any] = {
        "name": names.SIDECAR_CONTAINER,
        "image": overrides.image,
        "args": ["sidecar"],
        "env": _environment(overrides.port),
        "ports": [
            {
                "name": names.SIDECAR_PORT_NAME,
                "containerPort": overrides.port,
                "protocol": "TCP",
            }
        ],
        # The supervisor is alive; nothing else may hold up the model server. No readinessProbe:
        # what the sidecar waits for must never take the pod out of its Service.
        "startupProbe": {
            "httpGet": {"path": "/healthz", "port": names.SIDECAR_PORT_NAME},
            "periodSeconds": 1,
            "timeoutSeconds": 5,
            "failureThreshold": _STARTUP_PROBES,
        },
        "securityContext": {
            "runAsUser": _UID,
            "runAsGroup": _UID,
            "runAsNonRoot": True,
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            run_mount(),
            _mount(names.TOKEN_VOLUME, names.TOKEN_DIR),
            _mount(names.POLICIES_VOLUME, names.POLICIES_DIR),
            _mount(names.REDIS_VOLUME, names.REDIS_DIR),
            {"name": names.TMP_VOLUME, "mountPath": "/tmp"},
        ],
    }
    if settings.image_pull_policy:
        container["imagePullPolicy"] = settings.image_pull_policy
    if overrides.native:
        container["restartPolicy"] = "Always"
    resources = sidecar_resources(
        spec, cpu=overrides.cpu, cpu_limit=overrides.cpu_limit, memory=overrides.memory
    )
    if resources:
        container["resources"] = resources
    return container


def run_mount() -> dict[str, Any]:
    """Where both sides find the control block."""
    return {"name": names.RUN_VOLUME, "mountPath": names.RUN_DIR}


def server_environment() -> list[dict[str, Any]]:
    """What tells the model server where the sidecar is and who the pod is."""
    return [
        {"name": "HBM_RUN_DIR", "value": names.RUN_DIR},
        _from_field("HBM_NODE", "metadata.uid"),
    ]


def volumes(overrides: Overrides) -> list[dict[str, Any]]:
    """The volumes in the order of `VOLUMES`.

    Both directories are of memory: a full one answers ENOSPC instead of having the pod evicted, and
    the cluster autoscaler does not take them for local data that keeps a node from being removed.
    """
    return [
        _memory(names.RUN_VOLUME, overrides.run_dir_size),
        {
            "name": names.TOKEN_VOLUME,
            "projected": {
                "sources": [
                    {"serviceAccountToken": {"path": "token", "expirationSeconds": _TOKEN_LIFE_S}},
                    {
                        "configMap": {
                            "name": "kube-root-ca.crt",
                            "items": [{"key": "ca.crt", "path": "ca.crt"}],
                        }
                    },
                    {
                        "downwardAPI": {
                            "items": [
                                {
                                    "path": "namespace",
                                    "fieldRef": {"fieldPath": "metadata.namespace"},
                                }
                            ]
                        }
                    },
                ]
            },
        },
        {
            "name": names.POLICIES_VOLUME,
            "configMap": {"name": names.POLICIES_CONFIGMAP, "optional": True},
        },
        {
            "name": names.REDIS_VOLUME,
            "secret": {"secretName": names.REDIS_SECRET, "optional": True},
        },
        _memory(names.TMP_VOLUME, _TMP_SIZE),
    ]


def _environment(port: int) -> list[dict[str, Any]]:
    return [
        *server_environment(),
        _from_field("HBM_NAMESPACE", "metadata.namespace"),
        _from_field("HBM_POD_NAME", "metadata.name"),
        _from_field("HBM_POD_UID", "metadata.uid"),
        _from_field("HBM_HOST", "status.podIP"),
        {"name": "HBM_PORT", "value": str(port)},
        {"name": "HBM_KUBE_TOKEN_DIR", "value": names.TOKEN_DIR},
        {"name": "HBM_POLICIES_DIR", "value": names.POLICIES_DIR},
        {"name": "HBM_REDIS_URL_FILE", "value": f"{names.REDIS_DIR}/url"},
    ]


def _from_field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _mount(volume: str, path: str) -> dict[str, Any]:
    return {"name": volume, "mountPath": path, "readOnly": True}


def _memory(name: str, size: str) -> dict[str, Any]:
    return {"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": size}}
