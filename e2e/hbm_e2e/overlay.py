"""The development environment inside a pod of our own cluster, mounted instead of imported.

torch makes an image of gigabytes that every node would have to unpack. On our own nodes a pod
sees the machine's disk, so the server runs from the environment that the tests run in: a thing of
these tests alone, never of the chart.
"""

import os
import sysconfig
import tomllib
from copy import deepcopy
from typing import Any

from hbm_e2e.images import PROJECT

PACKAGES = "/environment/site-packages"
SOURCES = "/environment/sources"


def with_environment(pod_spec: dict[str, Any], container: str) -> dict[str, Any]:
    """A copy of a pod's spec in which one container imports what this interpreter imports.

    Its image needs the same Python (3.11) and nothing else.
    """
    spec = deepcopy(pod_spec)
    mounts = {PACKAGES: sysconfig.get_path("platlib"), SOURCES: os.fspath(PROJECT)}
    volumes = spec.setdefault("volumes", [])
    for number, source in enumerate(mounts.values()):
        shown = {"path": source, "type": "Directory"}
        volumes.append({"name": f"environment-{number}", "hostPath": shown})
    for changed in spec["containers"]:
        if changed["name"] == container:
            changed.setdefault("volumeMounts", []).extend(
                {"name": f"environment-{number}", "mountPath": place, "readOnly": True}
                for number, place in enumerate(mounts)
            )
            path = ":".join([*(f"{SOURCES}/{room}" for room in _rooms()), PACKAGES])
            changed.setdefault("env", []).extend(
                [
                    {"name": "PYTHONPATH", "value": path},
                    {"name": "PYTHONDONTWRITEBYTECODE", "value": "1"},
                ]
            )
            return spec
    raise KeyError(f"the pod has no container {container!r}")


def _rooms() -> list[str]:
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    rooms: list[str] = settings["tool"]["hatch"]["build"]["dev-mode-dirs"]
    return rooms
