"""What goes wrong beside a serving pod, and whether it touches the pod's readiness.

Only a sidecar whose first process ends again and again does, and one that cannot be started at
all, which new pods alone meet (docs/operations.md).
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from hbm_e2e.client import Client
from hbm_e2e.cluster import Cluster
from hbm_e2e.installation import Models, in_order
from hbm_e2e.objects import condition, containers, is_ready, ready_since, restarts
from hbm_e2e.processes import kill
from hbm_e2e.waiting import wait_for

pytestmark = pytest.mark.e2e_full

REGULARS = Path(__file__).parent / "data" / "load" / "regulars.yaml"
CONFIG_MAP_S = 180
"""A kubelet shows a changed ConfigMap to its pods within a minute and a half."""


@contextmanager
def untouched(models: Models, client: Client) -> Iterator[None]:
    """All pods stay Ready as they are meanwhile, no container restarts, and no request fails."""
    before = {pod: ready_since(found) for pod, found in models.servers().items()}
    with models.under_load(client, REGULARS) as sent:
        yield
    assert sent.failures == []
    after = models.servers()
    assert {pod: ready_since(found) for pod, found in after.items()} == before
    assert all(one["restartCount"] == 0 for pod in after.values() for one in containers(pod))


def ask_for_artefact(models: Models, content: str | None) -> None:
    """Of the policy: the key `policy.onnx` with the hash of this content; None: no artefact."""
    digest = hashlib.sha256(content.encode()).hexdigest() if content is not None else ""
    artefact = {"key": "policy.onnx", "sha256": digest} if content is not None else None
    patch = json.dumps({"spec": {"artefact": artefact}})
    models.kubectl("patch", "hbmpol", "rank", "--type", "merge", "-p", patch)


def wait_applied(models: Models, status: str, reason: str, timeout_s: float = 60) -> None:
    wait_for(
        lambda: all(
            condition(found, "Applied") == (status, reason)
            for found in models.partitions().values()
        ),
        timeout_s,
        f"all partitions to be Applied={status}, {reason}",
        every_s=1,
        because=lambda: models.kubectl("describe", "hbmp"),
    )


def test_a_missing_and_a_corrupt_artefact_of_the_whole_fleet(
    own_cluster: Cluster, calm: Models, client_beside: Callable[..., Client]
) -> None:
    kubectl = calm.kubectl
    kubectl("delete", "configmap", "hbm-policies", "--ignore-not-found")
    with untouched(calm, client_beside()):
        ask_for_artefact(calm, "what nobody has put there")
        wait_applied(calm, "False", "ArtefactPending")
        kubectl("create", "configmap", "hbm-policies", "--from-literal=policy.onnx=cut off")
        wait_applied(calm, "False", "ArtefactInvalid", CONFIG_MAP_S)
        wait_for(lambda: calm.policy()["status"]["failed"] == 2, 60, "the policy to count both")
        # All else of the spec is followed on.
        calm.edit_policy()
        wait_for(
            lambda: all(
                found["status"]["observedGeneration"] == found["metadata"]["generation"]
                for found in calm.partitions().values()
            ),
            60,
            "the edited spec to be seen",
        )
        ask_for_artefact(calm, None)
        in_order(own_cluster, calm)


def test_a_sidecar_image_that_cannot_be_pulled(
    own_cluster: Cluster, calm: Models, client_beside: Callable[..., Client]
) -> None:
    def image(of: str | None) -> None:
        annotations = {"hbm-partition.io/sidecar-image": of}
        patch = {"spec": {"template": {"metadata": {"annotations": annotations}}}}
        calm.kubectl("patch", "deployment", "rank", "-p", json.dumps(patch))

    def refused() -> bool:
        return any(
            one.get("state", {}).get("waiting", {}).get("reason") == "ImagePullBackOff"
            for pod in calm.kubectl.items("pods", "-l", "app=rank")
            for one in pod["status"].get("initContainerStatuses", ())
        )

    before = set(calm.servers())
    with untouched(calm, client_beside()):
        image(own_cluster.image("sidecar") + "-that-is-nowhere")
        wait_for(refused, 120, "the new pod to wait for its image", every_s=1)
        assert set(calm.servers()) == before
        image(None)
        in_order(own_cluster, calm)
    assert set(calm.servers()) == before


def test_the_first_process_of_a_sidecar_killed_five_times(
    own_cluster: Cluster, calm: Models, client_beside: Callable[..., Client]
) -> None:
    victim, other = sorted(calm.servers())
    untouched_since = ready_since(calm.servers()[other])

    def started_again(times: int) -> bool:
        pod = calm.kubectl.get("pod", victim)
        return restarts(pod, "hbm-sidecar") == times and is_ready(pod)

    with calm.under_load(client_beside(), REGULARS) as sent:
        for times in range(1, 6):
            kill(own_cluster, calm.servers()[victim], "hbm-sidecar")
            wait_for(lambda: victim not in calm.servers(), 60, "the pod not to be Ready")
            wait_for(partial(started_again, times), 300, f"start {times} after an end", every_s=1)
        in_order(own_cluster, calm)
    assert sent.failures == []
    pods = calm.servers()
    assert restarts(pods[victim], "server") == 0
    assert ready_since(pods[other]) == untouched_since
