"""Requests and limits of the sidecar, such that the pod's QoS class stays what it was.

The classes are those of `ComputePodQOS` in Kubernetes (pkg/apis/core/v1/helper/qos): all containers
and init containers count, CPU and memory only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

from hbm_operator.quantity import parse_quantity

_COUNTED: Final = ("cpu", "memory")


class QosClass(StrEnum):
    """What Kubernetes evicts first, and whose CPU is guaranteed."""

    GUARANTEED = "Guaranteed"
    BURSTABLE = "Burstable"
    BEST_EFFORT = "BestEffort"


def qos_class(spec: dict[str, Any]) -> QosClass:
    """QoS class of a pod with this spec."""
    if has_pod_level_resources(spec):
        return _qos_of([spec.get("resources") or {}])
    containers = [*(spec.get("containers") or ()), *(spec.get("initContainers") or ())]
    return _qos_of([container.get("resources") or {} for container in containers])


def has_pod_level_resources(spec: dict[str, Any]) -> bool:
    """Whether the pod as a whole has requests or limits (`spec.resources`)."""
    resources = spec.get("resources") or {}
    return bool(resources.get("requests") or resources.get("limits"))


def _qos_of(all_resources: Iterable[dict[str, Any]]) -> QosClass:
    requests: defaultdict[str, Decimal] = defaultdict(Decimal)
    limits: defaultdict[str, Decimal] = defaultdict(Decimal)
    guaranteed = True
    for resources in all_resources:
        limited = _counted(resources.get("limits"))
        # A limit alone is a request, too: the API server fills it in.
        for name, amount in {**limited, **_counted(resources.get("requests"))}.items():
            if amount > 0:
                requests[name] += amount
        for name, amount in limited.items():
            if amount > 0:
                limits[name] += amount
        guaranteed = guaranteed and all(limited.get(name, 0) > 0 for name in _COUNTED)
    if not requests and not limits:
        return QosClass.BEST_EFFORT
    return QosClass.GUARANTEED if guaranteed and requests == limits else QosClass.BURSTABLE


def _counted(amounts: dict[str, Any] | None) -> dict[str, Decimal]:
    return {
        name: parse_quantity(amount) for name, amount in (amounts or {}).items() if name in _COUNTED
    }


def sidecar_resources(
    spec: dict[str, Any], *, cpu: str, cpu_limit: str, memory: str
) -> dict[str, Any]:
    """Requests and limits of a sidecar in a pod with this spec.

    Burstable pods get requests and a memory limit, and a CPU limit only where one is asked for: a
    throttled sidecar decides late. In Guaranteed pods limits equal requests. BestEffort pods and
    pods with resources of their own level get none: a request would lift the one to another class,
    and in the other the sum of the containers' requests may not exceed the pod's.

    Args:
        spec: the pod without the sidecar.
        cpu: request.
        cpu_limit: limit; empty: none.
        memory: request and limit.
    """
    qos = qos_class(spec)
    if qos is QosClass.BEST_EFFORT or has_pod_level_resources(spec):
        return {}
    if qos is QosClass.GUARANTEED:
        both = {"cpu": cpu_limit or cpu, "memory": memory}
        return {"requests": dict(both), "limits": both}
    limits = {"cpu": cpu_limit, "memory": memory} if cpu_limit else {"memory": memory}
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": limits}
