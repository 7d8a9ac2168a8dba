"""The development environment inside a pod of our own cluster, mounted instead of imported.

torch makes an image of gigabytes that every node would have to unpack. On our own nodes a pod
sees the machine's disk, so the server runs from the environment that the tests run in: a thing of
these tests alone, never of the chart.
"""

import hashlib
import os
import sysconfig
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

from hbm_e2e.images import PROJECT
from hbm_e2e.places import cache_dir

PACKAGES = "/environment/site-packages"
SOURCES = "/environment/sources"
KERNELS = "/environment/kernels"


def with_environment(pod_spec: dict[str, Any], container: str) -> dict[str, Any]:
    """A copy of a pod's spec in which one container imports what this interpreter imports.

    Its image needs the same Python (3.11) and nothing else.
    """
    spec = deepcopy(pod_spec)
    mounts = {
        PACKAGES: sysconfig.get_path("platlib"),
        SOURCES: os.fspath(PROJECT),
        KERNELS: os.fspath(_kernels(spec.get("securityContext", {}).get("runAsUser", 0))),
    }
    volumes = spec.setdefault("volumes", [])
    for number, source in enumerate(mounts.values()):
        shown = {"path": source, "type": "Directory"}
        volumes.append({"name": f"environment-{number}", "hostPath": shown})
    for changed in spec["containers"]:
        if changed["name"] == container:
            changed.setdefault("volumeMounts", []).extend(
                {
                    "name": f"environment-{number}",
                    "mountPath": place,
                    "readOnly": place != KERNELS,
                }
                for number, place in enumerate(mounts)
            )
            path = ":".join([*(f"{SOURCES}/{room}" for room in _rooms()), PACKAGES])
            changed.setdefault("env", []).extend(
                [
                    {"name": "PYTHONPATH", "value": path},
                    {"name": "PYTHONDONTWRITEBYTECODE", "value": "1"},
                    {"name": "NUMBA_CACHE_DIR", "value": KERNELS},
                ]
            )
            return spec
    raise KeyError(f"the pod has no container {container!r}")


def _rooms() -> list[str]:
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    rooms: list[str] = settings["tool"]["hatch"]["build"]["dev-mode-dirs"]
    return rooms


def _kernels(user: int) -> Path:
    """What the first pod compiles for all others: one folder per state of the sources, as numba
    does not notice a changed kernel that another file has compiled in, and per user, as numba
    refuses folders that it cannot write."""
    state = hashlib.sha256()
    for source in sorted((PROJECT / "pool" / "hbm_pool").rglob("*.py")):
        state.update(source.read_bytes())
    folder = cache_dir() / "kernels" / state.hexdigest()[:16] / str(user)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o1777)  # pods run as users of their own
    return folder
