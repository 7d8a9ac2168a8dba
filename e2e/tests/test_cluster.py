"""The cluster itself: what every later test takes for granted."""

import base64
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hbm_e2e.cluster import AnyCluster, Cluster
from hbm_e2e.kubectl import CommandFailed, Kubectl
from hbm_e2e.overlay import with_environment
from hbm_e2e.pki import Pki
from hbm_e2e.prometheus import Job, Prometheus
from hbm_e2e.waiting import wait_for

DATA = Path(__file__).parent / "data"
FETCH = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).read().decode())"
RESOLVE = "import sys, socket; print(socket.getaddrinfo(sys.argv[1], 80)[0][4][0])"


def pod(name: str, image: str, **metadata: Any) -> dict[str, Any]:
    container = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sleep", "infinity"],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, **metadata},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 0},
    }


@pytest.fixture
def kubectl(cluster: AnyCluster, cluster_namespace: str) -> Kubectl:
    return cluster.kubectl.within(cluster_namespace)


@pytest.fixture
def web(kubectl: Kubectl, python_image: str) -> Kubectl:
    kubectl(
        "apply", "-f", "-", given=(DATA / "web.yaml").read_text().replace("IMAGE", python_image)
    )
    kubectl.wait_ready("deployment/web")
    return kubectl


def ready_pods(kubectl: Kubectl, selector: str) -> list[Any]:
    return [
        found
        for found in kubectl.items("pods", "-l", selector)
        if "deletionTimestamp" not in found["metadata"]
        for condition in found["status"].get("conditions", ())
        if condition["type"] == "Ready" and condition["status"] == "True"
    ]


def test_nodes_are_ready_and_of_one_version(cluster: AnyCluster) -> None:
    nodes = cluster.kubectl.items("nodes")
    assert len(nodes) >= 3
    assert len({node["status"]["nodeInfo"]["kubeletVersion"] for node in nodes}) == 1


def test_pods_on_all_nodes_reach_each_other_and_the_service(web: Kubectl) -> None:
    pods = ready_pods(web, "app=web")
    assert len({found["spec"]["nodeName"] for found in pods}) == 3
    places = [f"{found['status']['podIP']}:8080" for found in pods] + ["web"]
    for found in pods:
        for place in places:
            said = web.exec(
                *(found["metadata"]["name"], "python3", "-c", FETCH, f"http://{place}/hello"),
                container="server",
            )
            assert said.strip() == "from the sidecar"


def test_logs_and_names(web: Kubectl, cluster_namespace: str) -> None:
    name = ready_pods(web, "app=web")[0]["metadata"]["name"]
    assert web("logs", name, "-c", "writer").strip() == "written"
    address = web.get("service", "web")["spec"]["clusterIP"]
    for asked in ("web", f"web.{cluster_namespace}.svc.cluster.local"):
        said = web.exec(name, "python3", "-c", RESOLVE, asked, container="server")
        assert said.strip() == address
    with pytest.raises(CommandFailed, match="Name or service not known"):
        web.exec(name, "python3", "-c", RESOLVE, "nobody.invalid", container="server")


@pytest.fixture
def hook(
    kubectl: Kubectl, cluster_namespace: str, python_image: str, tmp_path: Path
) -> Iterator[Kubectl]:
    """The annotating webhook, for pods of this namespace that are labelled `hook`."""
    pki = Pki(tmp_path / "pki")
    pair = pki.issue("hook", "/CN=hook", [f"DNS:hook.{cluster_namespace}.svc"])
    kubectl("create", "secret", "tls", "hook", f"--cert={pair.certificate}", f"--key={pair.key}")
    kubectl("create", "configmap", "hook", f"--from-file={DATA / 'hook.py'}")
    manifest = (DATA / "hook.yaml").read_text().replace("IMAGE", python_image)
    kubectl("apply", "-f", "-", given=manifest)
    kubectl.wait_ready("deployment/hook")
    client = {
        "service": {"name": "hook", "namespace": cluster_namespace, "path": "/"},
        "caBundle": base64.b64encode(pki.ca.certificate.read_bytes()).decode(),
    }
    rule = {
        "operations": ["CREATE"],
        "apiGroups": [""],
        "apiVersions": ["v1"],
        "resources": ["pods"],
    }
    kubectl.apply(
        {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingWebhookConfiguration",
            "metadata": {"name": cluster_namespace},
            "webhooks": [
                {
                    "name": f"{policy.lower()}.hook.example.com",
                    "admissionReviewVersions": ["v1"],
                    "sideEffects": "None",
                    "failurePolicy": policy,
                    "timeoutSeconds": 3,
                    "objectSelector": {"matchLabels": {"hook": policy}},
                    "namespaceSelector": {
                        "matchLabels": {"kubernetes.io/metadata.name": cluster_namespace}
                    },
                    "clientConfig": client,
                    "rules": [rule],
                }
                for policy in ("Fail", "Ignore")
            ],
        }
    )
    yield kubectl
    kubectl("delete", "mutatingwebhookconfiguration", cluster_namespace)


def test_webhook_in_a_pod_is_asked_and_its_absence_obeys_the_policy(
    hook: Kubectl, python_image: str
) -> None:
    def hooked(name: str) -> bool:
        hook.apply(pod(name, python_image, labels={"hook": "Fail"}))
        annotations: dict[str, str] = hook.get("pod", name)["metadata"]["annotations"]
        hook("delete", "pod", name, "--wait=false")
        return annotations.get("hooked") == "yes"

    tries = iter(range(100))
    # The API server takes a moment to notice a new webhook.
    wait_for(lambda: hooked(f"asked-{next(tries)}"), 30, "the webhook to be asked")
    hook("scale", "deployment/hook", "--replicas=0")
    hook.wait_gone("pods", "-l", "app=hook")
    with pytest.raises(CommandFailed, match="failed calling webhook"):
        hook.apply(pod("refused", python_image, labels={"hook": "Fail"}))
    hook.apply(pod("let-through", python_image, labels={"hook": "Ignore"}))
    assert "hooked" not in hook.get("pod", "let-through")["metadata"].get("annotations", {})


def test_helm_sees_the_cluster(cluster: AnyCluster, cluster_namespace: str) -> None:
    assert json.loads(cluster.helm("list", "--namespace", cluster_namespace, "-o", "json")) == []


def test_nothing_leads_out(own_cluster: Cluster) -> None:
    for node in own_cluster.nodes:
        assert "via 172.31.0.1" in node.run("ip", "route", "get", "192.0.2.1")
    with pytest.raises(CommandFailed, match="Network is unreachable"):
        own_cluster.run("ip", "route", "get", "192.0.2.1")


def test_gpus_spread_one_per_node(
    own_cluster: Cluster, kubectl: Kubectl, python_image: str
) -> None:
    own_cluster.offer_gpus(1)
    for number in range(4):
        wanting = pod(f"gpu-{number}", python_image)
        wanting["spec"]["containers"][0]["resources"] = {"limits": {"nvidia.com/gpu": 1}}
        kubectl.apply(wanting)

    def places() -> list[str]:
        """Node of each running pod, and the phase of each other."""
        return sorted(
            found["spec"]["nodeName"]
            if found["status"]["phase"] == "Running"
            else found["status"]["phase"]
            for found in kubectl.items("pods")
        )

    wait_for(lambda: places() == ["Pending", "n1", "n2", "n3"], 60, "one pod per node")


def test_a_pod_can_run_the_server_from_the_development_environment(
    own_cluster: Cluster, kubectl: Kubectl, python_image: str
) -> None:
    server = pod("server", python_image)
    server["spec"]["restartPolicy"] = "Never"
    server["spec"]["containers"][0]["command"] = [
        *("python3", "-c", "import torch, hbm_serving.server; print(torch.arange(3).sum().item())")
    ]
    server["spec"] = with_environment(server["spec"], "main")
    kubectl.apply(server)
    kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/server", "--timeout=110s")
    assert kubectl("logs", "server").strip() == "3"


def test_prometheus_scrapes_nodes_and_pods(own_cluster: Cluster) -> None:
    prometheus = Prometheus(own_cluster)

    def answering(job: str, targets: int) -> bool:
        return prometheus.up_targets(job) == targets

    prometheus.start()
    try:
        prometheus.follow(Job("coredns", "metrics", "k8s-app=kube-dns", ("kube-system",)))
        for job, targets in (("cadvisor", 3), ("kube-proxy", 3), ("coredns", 2)):
            wait_for(partial(answering, job, targets), 60, f"{targets} targets of {job}")
        versions = prometheus.query('coredns_build_info{namespace="kube-system"}')
        assert len(versions) == 2
    finally:
        prometheus.stop()


@pytest.mark.e2e_full
def test_a_killed_kubelet_comes_back_and_pods_do_not_notice(
    own_cluster: Cluster, web: Kubectl
) -> None:
    before = {found["metadata"]["uid"] for found in ready_pods(web, "app=web")}
    node = own_cluster.node("n2")
    node.kubelet.kill()
    wait_for(lambda: "n2" not in own_cluster.ready_nodes(), 60, "n2 to be missed")
    node.start_kubelet()
    own_cluster.wait_nodes_ready()
    wait_for(
        lambda: {found["metadata"]["uid"] for found in ready_pods(web, "app=web")} == before,
        60,
        "the same pods to be ready again",
    )
    for found in ready_pods(web, "app=web"):
        assert [one["restartCount"] for one in found["status"]["containerStatuses"]] == [0]


@pytest.mark.e2e_full
def test_a_killed_containerd_leaves_its_containers_running(
    own_cluster: Cluster, web: Kubectl
) -> None:
    node = own_cluster.node("n1")
    (name,) = (
        found["metadata"]["name"]
        for found in ready_pods(web, "app=web")
        if found["spec"]["nodeName"] == "n1"
    )
    start_time = ("cut", "-d", " ", "-f22", "/proc/1/stat")
    started = web.exec(name, *start_time, container="server")
    node.containerd.kill()
    node.start_containerd()
    own_cluster.wait_nodes_ready()
    assert web.exec(name, *start_time, container="server") == started


@pytest.mark.e2e_full
def test_killed_api_server_and_etcd_keep_the_objects(own_cluster: Cluster, web: Kubectl) -> None:
    plane = own_cluster.control_plane
    plane.api_server.kill()
    plane.etcd.kill()
    assert not web.ready()
    own_cluster.repair()
    web("scale", "deployment/web", "--replicas=4")
    web.wait_ready("deployment/web")
    assert len(ready_pods(web, "app=web")) == 4


@pytest.mark.e2e_full
def test_power_off_moves_the_pods_and_power_on_brings_the_node_back(
    own_cluster: Cluster, web: Kubectl
) -> None:
    impatient = {
        "effect": "NoExecute",
        "key": "node.kubernetes.io/unreachable",
        "operator": "Exists",
        "tolerationSeconds": 2,
    }
    patch = {"spec": {"template": {"spec": {"tolerations": [impatient]}}}}
    web("patch", "deployment/web", "-p", json.dumps(patch))
    web.wait_ready("deployment/web")
    node = own_cluster.node("n3")
    node.power_off()
    wait_for(lambda: "n3" not in own_cluster.ready_nodes(), 60, "n3 to be missed")
    wait_for(
        lambda: (
            {found["spec"]["nodeName"] for found in ready_pods(web, "app=web")} == {"n1", "n2"}
            and len(ready_pods(web, "app=web")) == 3
        ),
        90,
        "three pods on the two other nodes",
    )
    own_cluster.repair()
    web("rollout", "restart", "deployment/web")
    web.wait_ready("deployment/web")
    wait_for(
        lambda: any(found["spec"]["nodeName"] == "n3" for found in ready_pods(web, "app=web")),
        60,
        "a pod on the node that returned",
    )
