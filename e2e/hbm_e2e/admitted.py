"""Pods that are asked for all the time, to see whether each of them is injected."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hbm_e2e.errors import HarnessError
from hbm_e2e.kubectl import Kubectl
from hbm_e2e.objects import name
from hbm_e2e.waiting import wait_for

NOWHERE = {"hbm-partition.io/no-such-node": "true"}
KEPT = 20
"""Pods that are left in the namespace; older ones are deleted."""


@dataclass
class Admitted:
    """What became of the pods so far."""

    injected: int = 0
    bare: list[str] = field(default_factory=list)
    """Pods that were let through without the sidecar, with what they say of it."""
    refused: list[str] = field(default_factory=list)
    """Requests that failed, in the API server's words."""


@contextmanager
def pods_all_the_time(kubectl: Kubectl, image: str, every_s: float = 1.0) -> Iterator[Admitted]:
    """About one pod per `every_s` meanwhile; no node takes them, so they cost an admission and an
    object each. The count is complete when the block has ended."""
    found = Admitted()
    over = threading.Event()

    def run() -> None:
        number = 0
        while not over.wait(every_s):
            number += 1
            try:
                _create(kubectl, image, number, found)
                if number % KEPT == 0:
                    kubectl("delete", "pods", "--all", "--wait=false", "--grace-period=0")
            except HarnessError as error:
                found.refused.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: found.injected or found.bare or found.refused, 60, "the first pod")
        yield found
    finally:
        over.set()
        thread.join()


def _create(kubectl: Kubectl, image: str, number: int, found: Admitted) -> None:
    pod = f"asked-{number}"
    kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": pod, "labels": {"hbm-partition.io/inject": "true"}},
            "spec": {
                "nodeSelector": NOWHERE,
                "containers": [{"name": "server", "image": image}],
            },
        }
    )
    made = kubectl.get("pod", pod)
    if any(one["name"] == "hbm-sidecar" for one in made["spec"].get("initContainers", ())):
        found.injected += 1
    else:
        found.bare.append(f"{name(made)} {made['metadata'].get('annotations', {})}")
