"""kill -9 and power cuts of every part, under load: nothing fails that the fault does not explain.

Each test begins with everything in order (`calm`), does its harm while a client sends requests
through the router, and ends when everything is in order again.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hbm_e2e.client import Client, Failure
from hbm_e2e.cluster import AnyCluster, Cluster
from hbm_e2e.installation import SYSTEM, Models, in_order
from hbm_e2e.objects import condition, containers, is_ready, name, ready_since, restarts
from hbm_e2e.processes import kill
from hbm_e2e.waiting import wait_for

pytestmark = pytest.mark.e2e_full

REGULARS = Path(__file__).parent / "data" / "load" / "regulars.yaml"
CUT = {"lost", "refused", "timeout"}
"""How a request ends whose connection, or whose peer, is gone."""


def pods_of(cluster: AnyCluster, component: str) -> list[Any]:
    """Ready pods of a part of the release."""
    selector = f"app.kubernetes.io/component={component}"
    pods = cluster.kubectl.within(SYSTEM).items("pods", "-l", selector)
    return [pod for pod in pods if is_ready(pod)]


def unexplained(found: list[Failure], began: float, lasted_s: float) -> list[str]:
    """Failures that are no cut connections, or were not due while the fault lasted.

    A request may be due up to its timeout of ten seconds before its peer goes away.
    """
    return [
        str(one)
        for one in found
        if one.outcome not in CUT or not began - 10 < one.due_unix_s < began + lasted_s
    ]


def test_controller(
    own_cluster: Cluster, calm: Models, client_beside: Callable[..., Client]
) -> None:
    (controller,) = pods_of(own_cluster, "controller")
    with calm.under_load(client_beside(), REGULARS) as sent:
        kill(own_cluster, controller, "controller")
        gone = min(calm.servers())
        calm.kubectl("delete", "pod", gone)
        calm.edit_policy()
        in_order(own_cluster, calm)
        assert gone not in calm.partitions()
    assert sent.failures == []


def test_webhook(own_cluster: Cluster, calm: Models, client_beside: Callable[..., Client]) -> None:
    (webhook,) = pods_of(own_cluster, "webhook")
    with calm.under_load(client_beside(), REGULARS) as sent:
        kill(own_cluster, webhook, "webhook")
        wait_for(
            lambda: [restarts(pod, "webhook") for pod in pods_of(own_cluster, "webhook")] == [1],
            120,
            "the webhook to run again",
        )
        calm.kubectl("delete", "pod", min(calm.servers()))
        in_order(own_cluster, calm)
    assert sent.failures == []


def test_pods_made_while_there_is_no_webhook_are_reported_and_left_alone(
    own_cluster: Cluster, calm: Models, client_beside: Callable[..., Client]
) -> None:
    system = own_cluster.kubectl.within(SYSTEM)
    with calm.under_load(client_beside(), REGULARS) as sent:
        system("scale", "deployment/hbm-webhook", "--replicas=0")
        system.wait_gone("pods", "-l", "app.kubernetes.io/component=webhook")
        calm.kubectl("delete", "pod", min(calm.servers()))
        wait_for(
            lambda: calm.policy()["status"].get("notInjected") == 1,
            180,
            "the pod without a sidecar to be counted",
            every_s=1,
        )
        assert condition(calm.policy(), "Degraded") == ("True", "PodsNotInjected")
        calm.kubectl.wait_ready("deployment/rank", 300)
        (bare,) = (
            pod for pod in calm.servers().values() if "hbm-sidecar" not in _container_names(pod)
        )
        system("scale", "deployment/hbm-webhook", "--replicas=1")
        system.wait_ready("deployment/hbm-webhook")
        still = calm.kubectl.get("pod", name(bare))
        assert still["metadata"]["uid"] == bare["metadata"]["uid"]
        calm.kubectl("delete", "pod", name(bare))
        in_order(own_cluster, calm)
        assert calm.policy()["status"].get("notInjected", 0) == 0
    assert sent.failures == []


def _container_names(pod: Any) -> set[str]:
    return {one["name"] for one in containers(pod)}


@pytest.mark.parametrize("child", ["admin", "decide", "twin"])
def test_child_of_the_sidecar(
    own_cluster: Cluster, calm: Models, client_beside: Callable[..., Client], child: str
) -> None:
    pods = calm.servers()
    victim = min(pods)

    def restarted() -> int:
        count: int = calm.partitions()[victim]["status"]["sidecar"]["restarts"]
        return count

    before = restarted()
    with calm.under_load(client_beside(), REGULARS) as sent:
        kill(own_cluster, pods[victim], "hbm-sidecar", f"hbm_sidecar.{child}")
        calm.edit_policy()
        wait_for(lambda: restarted() == before + 1, 120, "the restart to be told", every_s=1)
        in_order(own_cluster, calm)
    assert sent.failures == []
    pod = calm.kubectl.get("pod", victim)
    assert [one["restartCount"] for one in containers(pod)] == [0, 0]
    assert ready_since(pod) == ready_since(pods[victim])


def test_first_process_of_the_sidecar(
    own_cluster: Cluster, calm: Models, client_beside: Callable[..., Client]
) -> None:
    pods = calm.servers()
    victim = min(pods)
    with calm.under_load(client_beside(), REGULARS) as sent:
        kill(own_cluster, pods[victim], "hbm-sidecar")
        wait_for(
            lambda: restarts(calm.kubectl.get("pod", victim), "hbm-sidecar") == 1,
            120,
            "the sidecar to be started again",
        )
        calm.edit_policy()
        in_order(own_cluster, calm)
    assert sent.failures == []
    assert restarts(calm.kubectl.get("pod", victim), "server") == 0


def test_router(own_cluster: Cluster, calm: Models, client_beside: Callable[..., Client]) -> None:
    victim = min(calm.routers().items())[1]
    with calm.under_load(client_beside(), REGULARS) as sent:
        began = time.time()
        kill(own_cluster, victim, "router")
        in_order(own_cluster, calm)
    assert unexplained(sent.failures, began, 10) == []


def test_redis(own_cluster: Cluster, calm: Models, client_beside: Callable[..., Client]) -> None:
    (redis,) = pods_of(own_cluster, "redis")
    with calm.under_load(client_beside(), REGULARS) as sent:
        kill(own_cluster, redis, "redis")
        wait_for(
            lambda: [restarts(pod, "redis") for pod in pods_of(own_cluster, "redis")] == [1],
            120,
            "Redis to run again",
        )
        in_order(own_cluster, calm)
    assert sent.failures == []


def test_kubelet(own_cluster: Cluster, calm: Models, client_beside: Callable[..., Client]) -> None:
    node = min(pod["spec"]["nodeName"] for pod in calm.servers().values())
    with calm.under_load(client_beside(node), REGULARS) as sent:
        own_cluster.node(node).kubelet.kill()
        wait_for(lambda: node not in own_cluster.ready_nodes(), 60, f"{node} to be missed")
        own_cluster.node(node).start_kubelet()
        own_cluster.wait_nodes_ready()
        calm.edit_policy()
        in_order(own_cluster, calm)
    assert sent.failures == []


@pytest.mark.parametrize("part", ["kube-apiserver", "etcd"])
def test_control_plane(
    own_cluster: Cluster, calm: Models, client_beside: Callable[..., Client], part: str
) -> None:
    plane = own_cluster.control_plane
    victim = plane.api_server if part == "kube-apiserver" else plane.etcd
    with calm.under_load(client_beside(), REGULARS) as sent:
        victim.kill()
        answered = sum(sent.nodes().values())
        wait_for(
            lambda: sum(sent.nodes().values()) > answered + 100, 60, "a hundred answers meanwhile"
        )
        own_cluster.repair()
        calm.edit_policy()
        in_order(own_cluster, calm)
    assert sent.failures == []


def test_power_of_the_controllers_node(
    own_cluster: Cluster, calm: Models, client_beside: Callable[..., Client]
) -> None:
    (controller,) = pods_of(own_cluster, "controller")
    lost = controller["spec"]["nodeName"]
    with calm.under_load(client_beside(lost), REGULARS) as sent:
        began = time.time()
        own_cluster.node(lost).power_off()
        wait_for(lambda: lost not in own_cluster.ready_nodes(), 60, f"{lost} to be missed")
        missed_s = time.time() - began
        wait_for(
            lambda: any(
                pod["spec"]["nodeName"] != lost for pod in pods_of(own_cluster, "controller")
            ),
            180,
            "a controller on another node",
            every_s=1,
        )
        own_cluster.repair()
        calm.edit_policy()
        in_order(own_cluster, calm)
    assert unexplained(sent.failures, began, missed_s + 10) == []
