"""Which container serves the model, and how many GPUs it has."""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from hbm_operator import names
from hbm_operator.injector.skip import Skip, SkipReason
from hbm_operator.quantity import parse_quantity

Container = dict[str, Any]


def model_container(
    spec: dict[str, Any], wanted: str | None, gpu_resources: tuple[str, ...]
) -> Container:
    """The container that serves the model: the named one, else the only one, else the one with a
    GPU.

    Args:
        spec: of the pod.
        wanted: name from the annotation.
        gpu_resources: names of resources (with `*`) that stand for a GPU.

    Raises:
        Skip: no container has that name, or it is not clear which one is meant.
    """
    containers: list[Container] = spec.get("containers") or []
    called = [str(container.get("name")) for container in containers]
    if wanted is not None:
        if wanted in called:
            return containers[called.index(wanted)]
        near = get_close_matches(wanted, called, n=1) or called
        raise Skip(
            SkipReason.CONTAINER_NOT_FOUND,
            f"{names.CONTAINER}: the pod has no container {wanted[:63]!r}; write {_listed(near)}",
        )
    if len(containers) == 1:
        return containers[0]
    with_gpu = [one for one in containers if gpu_count(one, gpu_resources) > 0]
    if len(with_gpu) == 1:
        return with_gpu[0]
    found = "none" if not with_gpu else f"{len(with_gpu)}"
    raise Skip(
        SkipReason.CONTAINER_AMBIGUOUS,
        f"of {len(containers)} containers {found} asks for a GPU; name the one that serves the "
        f"model in the annotation {names.CONTAINER}: {_listed(called)}",
    )


def has_gpu(spec: dict[str, Any], gpu_resources: tuple[str, ...]) -> bool:
    """Whether any container of the pod asks for a GPU."""
    return any(gpu_count(one, gpu_resources) > 0 for one in spec.get("containers") or ())


def gpu_count(container: Container, gpu_resources: tuple[str, ...]) -> int:
    """GPUs that a container asks for: of the extended resources, and one per DRA claim.

    What a claim stands for is said elsewhere; each counts as one GPU.
    """
    resources = container.get("resources") or {}
    amounts = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    counted = sum(
        int(parse_quantity(amount))
        for name, amount in amounts.items()
        if any(fnmatchcase(name, pattern) for pattern in gpu_resources)
    )
    return counted + len(resources.get("claims") or ())


def _listed(called: list[str]) -> str:
    return " or ".join(called[:6]) + (" or ..." if len(called) > 6 else "")
