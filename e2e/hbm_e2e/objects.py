"""What tests read out of Kubernetes objects."""

from collections.abc import Mapping
from typing import Any

Object = Mapping[str, Any]


def name(of: Object) -> str:
    """`metadata.name`."""
    found: str = of["metadata"]["name"]
    return found


def condition(of: Object, kind: str) -> tuple[str, str]:
    """Status and reason of a condition; empty while there is none."""
    for found in of.get("status", {}).get("conditions", ()):
        if found["type"] == kind:
            return found["status"], found.get("reason", "")
    return "", ""


def is_ready(pod: Object) -> bool:
    """Ready and not on its way out."""
    return "deletionTimestamp" not in pod["metadata"] and condition(pod, "Ready")[0] == "True"


def containers(pod: Object) -> list[Any]:
    """Status of every container that stays: init containers that are sidecars among them."""
    staying = {
        one["name"]
        for one in pod["spec"].get("initContainers", ())
        if one.get("restartPolicy") == "Always"
    }
    status = pod["status"]
    return [
        *(one for one in status.get("initContainerStatuses", ()) if one["name"] in staying),
        *status.get("containerStatuses", ()),
    ]


def restarts(pod: Object, container: str) -> int:
    """How often a container of a pod was started again."""
    (count,) = (one["restartCount"] for one in containers(pod) if one["name"] == container)
    return int(count)


def ready_since(pod: Object) -> str:
    """When the pod's readiness last changed; raises `AssertionError` for one that is not Ready."""
    (ready,) = (one for one in pod["status"]["conditions"] if one["type"] == "Ready")
    assert ready["status"] == "True", pod["status"]
    return str(ready["lastTransitionTime"])
