"""The injection itself: a pure function from pod to pod."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from hbm_operator import names
from hbm_operator.injector.annotations import Overrides, key_warnings
from hbm_operator.injector.resources import has_pod_level_resources
from hbm_operator.injector.settings import InjectionSettings
from hbm_operator.injector.sidecar import (
    VOLUMES,
    run_mount,
    server_environment,
    sidecar_container,
    volumes,
)
from hbm_operator.injector.skip import Skip, SkipReason
from hbm_operator.injector.stamp import Stamp, forged_keys
from hbm_operator.injector.target import gpu_count, has_gpu, model_container

Pod = dict[str, Any]

_DEFAULT_CONTAINER: Final = "kubectl.kubernetes.io/default-container"
_MIRROR: Final = "kubernetes.io/config.mirror"


@dataclass(frozen=True)
class NamespaceFacts:
    """What the injector must know of the pod's namespace."""

    name: str
    opted_in: bool
    """The namespace asks for the sidecar in its GPU pods; else the pod itself did, by its label."""


class Outcome(StrEnum):
    """What was done with a pod."""

    INJECTED = "injected"
    SKIPPED = "skipped"
    """It asked for the sidecar and goes on without; see the reason."""
    IGNORED = "ignored"
    """It did not ask for the sidecar."""
    DENIED = "denied"


@dataclass(frozen=True)
class Injection:
    """A pod after the injector: what became of it, and what to tell its author."""

    pod: Pod
    outcome: Outcome
    skip_reason: SkipReason | None = None
    warnings: tuple[str, ...] = ()
    denied: str = ""
    """Why the pod is refused."""


def inject(pod: Pod, namespace: NamespaceFacts, settings: InjectionSettings) -> Injection:
    """Puts the sidecar into a pod that asks for it.

    `pod` is left as it is; what cannot be injected comes back without a sidecar and with the reason
    in an annotation. A pod that has been injected before comes back unchanged.

    Args:
        pod: a Pod as it stands in an AdmissionReview; its name may be missing.
        namespace: where it is to run.
        settings: what the operator was installed with.
    """
    metadata = pod.get("metadata") or {}
    warnings = key_warnings(metadata)
    forged = forged_keys(pod)
    if forged:
        message = f"{' and '.join(forged)}: only the webhook writes this; remove it from the pod"
        return Injection(pod, Outcome.DENIED, None, warnings, denied=message)
    if not _asks(pod, namespace, settings):
        return Injection(pod, Outcome.IGNORED, None, warnings)
    if Stamp.of(pod) is not None:
        return Injection(pod, Outcome.SKIPPED, SkipReason.ALREADY_INJECTED, warnings)
    try:
        after, further = _injected(pod, settings)
    except Skip as skip:
        warning = f"no HBM sidecar ({skip.reason}): {skip.message}"
        marked = _marked(pod, skip)
        return Injection(marked, Outcome.SKIPPED, skip.reason, (*warnings, warning))
    return Injection(after, Outcome.INJECTED, None, (*warnings, *further))


def failed(pod: Pod) -> Injection:
    """What becomes of a pod on an error of our own: it goes on without the sidecar, and says so."""
    skip = Skip(SkipReason.INTERNAL_ERROR, "see the log of the webhook")
    metadata = pod.get("metadata")
    sound = isinstance(metadata, dict) and isinstance(metadata.get("annotations") or {}, dict)
    return Injection(
        _marked(pod, skip) if sound else pod,
        Outcome.SKIPPED,
        skip.reason,
        (f"no HBM sidecar ({skip.reason}): {skip.message}",),
    )


def _asks(pod: Pod, namespace: NamespaceFacts, settings: InjectionSettings) -> bool:
    metadata = pod.get("metadata") or {}
    # The kubelet's mirror of a static pod: what runs has been decided on the node.
    if _MIRROR in (metadata.get("annotations") or {}):
        return False
    wish = (metadata.get("labels") or {}).get(names.INJECT_LABEL)
    if wish is not None:
        return bool(wish != "false")  # what is neither word is told so below
    return namespace.opted_in and has_gpu(pod.get("spec") or {}, settings.gpu_resources)


def _injected(pod: Pod, settings: InjectionSettings) -> tuple[Pod, tuple[str, ...]]:
    """The pod with the sidecar, and warnings.

    Raises:
        Skip: it cannot be done, or would harm the pod.
    """
    metadata, spec = pod.get("metadata") or {}, pod.get("spec") or {}
    wish = (metadata.get("labels") or {}).get(names.INJECT_LABEL, "true")
    if wish != "true":
        raise Skip(
            SkipReason.INVALID_LABEL,
            f'label {names.INJECT_LABEL}: {wish!r} is neither "true" nor "false"',
        )
    overrides = Overrides.of(metadata.get("annotations") or {}, settings)
    _check_pod(spec, overrides)
    model = model_container(spec, overrides.container, settings.gpu_resources)
    _check_gpus(model, overrides, settings)
    _check_collisions(spec, model, overrides)

    after = copy.deepcopy(pod)
    spec = after["spec"]
    sidecar = sidecar_container(spec, overrides, settings)
    # First, so that the model server starts when its peer is there; an ordinary container goes
    # last, because tools take the first one for the pod's own.
    if overrides.native:
        spec["initContainers"] = [sidecar, *(spec.get("initContainers") or ())]
    else:
        spec["containers"].append(sidecar)
    spec["volumes"] = [*(spec.get("volumes") or ()), *volumes(overrides)]
    _join(next(one for one in spec["containers"] if one["name"] == model["name"]))
    stamp = Stamp(
        version=settings.version,
        container=model["name"],
        port=overrides.port,
        native=overrides.native,
        init_containers=(names.SIDECAR_CONTAINER,) * overrides.native,
        containers=(names.SIDECAR_CONTAINER,) * (not overrides.native),
        volumes=VOLUMES,
    )
    _write_stamp(after, stamp)
    return after, _remarks(pod.get("spec") or {}, model)


def _join(model: dict[str, Any]) -> None:
    """Gives the model server the shared directory, and its environment where it sets none."""
    given = {variable.get("name") for variable in model.get("env") or ()}
    missing = [one for one in server_environment() if one["name"] not in given]
    if missing:
        model["env"] = [*(model.get("env") or ()), *missing]
    model["volumeMounts"] = [*(model.get("volumeMounts") or ()), run_mount()]


def _write_stamp(pod: Pod, stamp: Stamp) -> None:
    metadata = pod.setdefault("metadata", {})
    metadata["labels"] = {**(metadata.get("labels") or {}), names.INJECTED: "true"}
    annotations = {**(metadata.get("annotations") or {}), names.STATUS: stamp.to_annotation()}
    for key in (names.SKIP_REASON, names.SKIP_MESSAGE):
        annotations.pop(key, None)  # of an earlier call for the same pod
    annotations.setdefault(_DEFAULT_CONTAINER, stamp.container)
    metadata["annotations"] = annotations


def _marked(pod: Pod, skip: Skip) -> Pod:
    metadata = pod.get("metadata") or {}
    annotations = {
        **(metadata.get("annotations") or {}),
        names.SKIP_REASON: str(skip.reason),
        names.SKIP_MESSAGE: skip.message,
    }
    return {**pod, "metadata": {**metadata, "annotations": annotations}}


def _all_containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]


def _check_pod(spec: dict[str, Any], overrides: Overrides) -> None:
    if any(one.get("name") == names.SIDECAR_CONTAINER for one in _all_containers(spec)):
        raise Skip(
            SkipReason.ALREADY_INJECTED,
            f"the pod has a container {names.SIDECAR_CONTAINER} of its own; rename it",
        )
    if spec.get("hostNetwork"):
        raise Skip(
            SkipReason.HOST_NETWORK,
            "pods in the host's network would share the sidecar's port; remove hostNetwork",
        )
    if ((spec.get("os") or {}).get("name") or "linux") != "linux":
        raise Skip(SkipReason.NOT_LINUX, "the sidecar runs on Linux only")
    if not overrides.native and spec.get("restartPolicy", "Always") != "Always":
        raise Skip(
            SkipReason.JOB_NEEDS_NATIVE,
            "an ordinary sidecar container would keep the pod from completing; use native "
            f"sidecars (Kubernetes 1.29, no {names.NATIVE_SIDECAR}: false)",
        )


def _check_gpus(model: dict[str, Any], overrides: Overrides, settings: InjectionSettings) -> None:
    if overrides.ranks is not None and overrides.ranks > 1:
        raise Skip(
            SkipReason.RANKS_UNSUPPORTED,
            f'{names.RANKS}: {overrides.ranks} ranks are not supported yet; "1" is',
        )
    gpus = gpu_count(model, settings.gpu_resources)
    if gpus > 1 and overrides.ranks is None:
        raise Skip(
            SkipReason.SEVERAL_GPUS,
            f"container {model['name']} asks for {gpus} GPUs; if its server keeps one pool, "
            f'write {names.RANKS}: "1"',
        )


def _check_collisions(spec: dict[str, Any], model: dict[str, Any], overrides: Overrides) -> None:
    for container in _all_containers(spec):
        if any(
            port.get("containerPort") == overrides.port and port.get("protocol", "TCP") == "TCP"
            for port in container.get("ports") or ()
        ):
            raise Skip(
                SkipReason.PORT_COLLISION,
                f"container {container.get('name')} has port {overrides.port}; write another one "
                f"in the annotation {names.PORT}",
            )
    taken = {volume.get("name") for volume in spec.get("volumes") or ()}
    for volume in VOLUMES:
        if volume in taken:
            raise Skip(
                SkipReason.VOLUME_COLLISION,
                f"the pod has a volume {volume} of its own; rename it",
            )
    for mount in model.get("volumeMounts") or ():
        if _real_path(str(mount.get("mountPath"))) == names.RUN_DIR:
            raise Skip(
                SkipReason.MOUNT_COLLISION,
                f"container {model['name']} mounts {mount.get('name')} at {names.RUN_DIR}; "
                "mount it elsewhere",
            )


def _real_path(path: str) -> str:
    """A path in images of today, where /var/run is a link to /run."""
    return path.rstrip("/").removeprefix("/var" if path.startswith("/var/run/") else "")


def _remarks(spec: dict[str, Any], model: dict[str, Any]) -> tuple[str, ...]:
    """What the author should know of a pod that was injected."""
    remarks = []
    for variable in model.get("env") or ():
        if variable.get("name") == "HBM_RUN_DIR" and variable.get("value") != names.RUN_DIR:
            remarks.append(
                f"container {model['name']} sets HBM_RUN_DIR to "
                f"{str(variable.get('value'))[:60]!r}; the sidecar waits in {names.RUN_DIR}"
            )
    if has_pod_level_resources(spec):
        remarks.append(
            "the pod has resources of its own level; the sidecar lives on them and needs about "
            "100m CPU and 400Mi of memory"
        )
    return tuple(remarks)
