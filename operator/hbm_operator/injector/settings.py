"""What the operator was installed with, as the injector needs it."""

from __future__ import annotations

from dataclasses import dataclass

from hbm_operator import names

GPU_RESOURCES = ("nvidia.com/gpu", "nvidia.com/gpu.shared", "nvidia.com/mig-*", "amd.com/gpu")
"""Names (with `*`) of the extended resources that stand for a GPU."""


@dataclass(frozen=True, kw_only=True)
class InjectionSettings:
    """Defaults of every injected sidecar; annotations of a pod override most of them."""

    image: str
    """Image of the sidecar."""
    image_pull_policy: str = ""
    """Always, IfNotPresent or Never; empty: as Kubernetes chooses for the tag."""
    version: str
    """Version of the operator, for the stamp."""
    cpu: str = "100m"
    """CPU request."""
    cpu_limit: str = ""
    """CPU limit; empty: none, but for Guaranteed pods."""
    memory: str = "400Mi"
    """Memory request and limit."""
    run_dir_size: str = "64Mi"
    """Size limit of the memory volume that sidecar and server share."""
    port: int = names.SIDECAR_PORT
    """Port of the sidecar's /healthz, /readyz and /metrics on the pod's address."""
    native: bool = True
    """Whether the cluster runs init containers with `restartPolicy: Always`."""
    gpu_resources: tuple[str, ...] = GPU_RESOURCES
