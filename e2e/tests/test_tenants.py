"""Namespaces side by side: Redis keys, routers, quotas, limits, users of the servers.

Meanwhile pods are created all the time and the webhook's certificates live five minutes: each of
them is injected, through two rotations on real kubelets.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from hbm_e2e.admitted import Admitted, pods_all_the_time
from hbm_e2e.checkout import Checkout
from hbm_e2e.client import NodeClient
from hbm_e2e.cluster import Cluster
from hbm_e2e.installation import SYSTEM, Models, in_order, install, remove_everything
from hbm_e2e.kubectl import CommandFailed
from hbm_e2e.objects import condition, containers, name
from hbm_e2e.pki import Pki
from hbm_e2e.processes import cpu_s
from hbm_e2e.tables import samples
from hbm_e2e.waiting import wait_for

pytestmark = pytest.mark.e2e_full

DATA = Path(__file__).parent / "data"
REGULARS = DATA / "load" / "regulars.yaml"
TENANTS = {"models": "rank", "feeds": "feed"}
"""Namespace to its route."""
CRAMPED, SCALED, USERS, STREAM = "cramped", "scaled", "users", "stream"
LIFETIME_S = 300


class Installed:
    """The chart with a route in each of two namespaces, a policy and a server behind each."""

    def __init__(self, cluster: Cluster, checkout: Checkout) -> None:
        self.cluster = cluster
        self.policy = yaml.safe_load(
            (checkout.folder / "docs" / "examples" / "policy.yaml").read_text()
        )
        self.tenants = {
            namespace: Models(cluster, namespace, f"hbm-router-{route}")
            for namespace, route in TENANTS.items()
        }


@pytest.fixture(scope="module")
def installed_for_two(
    cluster: Cluster, checkout: Checkout, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installed]:
    if not isinstance(cluster, Cluster):
        pytest.skip("looks into Redis by its pod's address: on the harness's own cluster only")
    namespaces = (*TENANTS, CRAMPED, SCALED, USERS, STREAM)
    remove_everything(cluster, *namespaces)
    for namespace in namespaces:
        cluster.kubectl("create", "namespace", namespace)
        cluster.kubectl.within(namespace).wait_for_service_account()
    routes = tmp_path_factory.mktemp("tenants") / "routes.yaml"
    listed = [
        {"name": route, "namespace": namespace, "service": "rank", "port": "http", "replicas": 1}
        for namespace, route in TENANTS.items()
    ]
    routes.write_text(yaml.safe_dump({"routes": listed}))
    install(
        *(cluster, checkout.chart, "-f", str(routes)),
        *("--set", f"webhook.certificates.lifetimeSeconds={LIFETIME_S}"),
    )
    installed = Installed(cluster, checkout)
    for models in installed.tenants.values():
        models.kubectl.apply(installed.policy, *checkout.servers())
    yield installed
    remove_everything(cluster, *namespaces, wait=False)


@pytest.fixture(scope="module", autouse=True)
def admitted(installed_for_two: Installed, cluster: Cluster) -> Iterator[Admitted]:
    """From before the first test of this file to after its last."""
    kubectl = cluster.kubectl.within(STREAM)
    with pods_all_the_time(kubectl, cluster.image("python")) as found:
        yield found


@pytest.fixture(scope="module")
def expiries(cluster: Cluster, admitted: Admitted) -> set[float]:
    """Ends of the certificates that have been served, as far as somebody looked."""
    return {_expiry(cluster)}


def _expiry(cluster: Cluster) -> float:
    selector = "app.kubernetes.io/component=webhook"
    (pod,) = cluster.kubectl.within(SYSTEM).items("pods", "-l", selector)
    path = f"/api/v1/namespaces/{SYSTEM}/pods/{name(pod)}:8080/proxy/metrics"
    metrics = samples(cluster.kubectl("get", "--raw", path))
    return metrics["hbm_webhook_certificate_expiry_timestamp_seconds"]


def test_each_tenant_is_served(installed_for_two: Installed, expiries: set[float]) -> None:
    assert len(expiries) == 1
    in_order(installed_for_two.cluster, *installed_for_two.tenants.values())


def test_tenants_refuse_each_others_keys(installed_for_two: Installed) -> None:
    cluster = installed_for_two.cluster
    selector = "app.kubernetes.io/component=redis"
    (pod,) = cluster.kubectl.within(SYSTEM).items("pods", "-l", selector)
    door = cluster.door(pod["status"]["podIP"], 6379)
    for namespace, models in installed_for_two.tenants.items():
        (other,) = TENANTS.keys() - {namespace}
        (uid,) = (found["metadata"]["uid"] for found in models.servers().values())
        secret = models.kubectl(
            *("get", "secret", "hbm-redis", "--template={{.data.url | base64decode}}")
        )
        account = redis.Redis.from_url(secret.replace(_address(secret), f"127.0.0.1:{door}"))
        held = account.zrangebyscore(f"hbm:{namespace}:nodes", 0, "+inf")
        assert held == [uid.encode()]
        for command in (
            ("HGETALL", f"hbm:{other}:n:x"),
            ("ZADD", f"hbm:{other}:nodes", "1", "intruder"),
            ("DEL", f"hbm:{other}:nodes"),
            ("KEYS", "*"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                account.execute_command(*command)  # type: ignore[no-untyped-call]


def _address(url: str) -> str:
    return url.rsplit("@", 1)[1].split("/", 1)[0]


def test_routers_never_cross(installed_for_two: Installed) -> None:
    cluster, tenants = installed_for_two.cluster, installed_for_two.tenants
    with ExitStack() as stack:
        sent = {
            namespace: stack.enter_context(
                models.under_load(NodeClient(cluster, f"n{number}"), REGULARS)
            )
            for number, (namespace, models) in enumerate(tenants.items(), 1)
        }
        wait_for(
            lambda: all(sum(one.nodes().values()) > 200 for one in sent.values()),
            120,
            "two hundred answers for each",
        )
    for namespace, models in tenants.items():
        own = {pod["metadata"]["uid"] for pod in models.servers().values()}
        assert set(sent[namespace].nodes()) == own
        assert sent[namespace].failures == []


def test_a_namespace_with_limits_and_a_quota(
    installed_for_two: Installed, checkout: Checkout
) -> None:
    """The sidecar counts, and starts and works within a tenth of a core and 400Mi; a full quota
    stops new pods and no running one.

    A tenth of a core is three seconds of CPU in thirty: what the start may take, counted and not
    timed, as the machine has other work.
    """
    models = Models(installed_for_two.cluster, CRAMPED)
    kubectl = models.kubectl
    kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "LimitRange",
            "metadata": {"name": "defaults"},
            "spec": {
                "limits": [
                    {
                        "type": "Container",
                        "default": {"cpu": "1", "memory": "1Gi"},
                        "defaultRequest": {"cpu": "100m", "memory": "256Mi"},
                        "min": {"cpu": "10m", "memory": "16Mi"},
                        "max": {"cpu": "2", "memory": "4Gi"},
                    }
                ]
            },
        },
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "room"},
            "spec": {
                "hard": {
                    "requests.cpu": "1",
                    "requests.memory": "2Gi",
                    "limits.cpu": "4",
                    "limits.memory": "6Gi",
                    "requests.nvidia.com/gpu": "2",
                }
            },
        },
        installed_for_two.policy,
    )
    small = {"hbm-partition.io/sidecar-cpu": "100m", "hbm-partition.io/sidecar-cpu-limit": "100m"}
    kubectl.apply(*checkout.servers(annotations=small))
    pod = wait_for(
        lambda: _sidecar_started(kubectl.items("pods", "-l", "app=rank")),
        120,
        "the sidecar to have started",
    )
    assert cpu_s(installed_for_two.cluster, pod, "hbm-sidecar") < 3.0
    kubectl.wait_ready("deployment/rank", 300)
    models.wait_followed()
    (pod,) = models.servers().values()
    assert all(one["restartCount"] == 0 for one in containers(pod))
    used = kubectl.get("resourcequota", "room")["status"]["used"]
    # Server 500m and sidecar 100m; 1Gi and 400Mi.
    assert (used["requests.cpu"], used["requests.memory"]) == ("600m", "1424Mi")
    assert used["requests.nvidia.com/gpu"] == "1"
    before = set(models.servers())
    kubectl("scale", "deployment/rank", "--replicas=2")
    wait_for(
        lambda: "exceeded quota" in kubectl("get", "events", "-o", "jsonpath={..message}"),
        60,
        "the second pod to be refused",
    )
    assert set(models.servers()) == before
    kubectl("scale", "deployment/rank", "--replicas=0")


def _sidecar_started(pods: list[Any]) -> Any:
    """The pod whose sidecar lets its server start; None while there is none."""
    for pod in pods:
        if any(one["name"] == "hbm-sidecar" and one.get("started") for one in containers(pod)):
            return pod
    return None


@pytest.fixture
def metrics_api(installed_for_two: Installed, python_image: str, tmp_path: Path) -> Iterator[None]:
    """Says of every container that it uses nine tenths of a core."""
    kubectl = installed_for_two.cluster.kubectl.within(SCALED)
    pair = Pki(tmp_path).issue("metrics", "/CN=metrics", [f"DNS:hook.{SCALED}.svc"])
    kubectl("create", "secret", "tls", "hook", f"--cert={pair.certificate}", f"--key={pair.key}")
    kubectl("create", "configmap", "hook", f"--from-file=hook.py={DATA / 'metrics.py'}")
    reader = ("--clusterrole=view", f"--serviceaccount={SCALED}:default")
    kubectl("create", "rolebinding", "reads-pods", *reader)
    manifest = (DATA / "hook.yaml").read_text().replace("IMAGE", python_image)
    kubectl("apply", "-f", "-", given=manifest)
    kubectl.wait_ready("deployment/hook")
    kubectl.apply(
        {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": "v1beta1.metrics.k8s.io"},
            "spec": {
                "group": "metrics.k8s.io",
                "version": "v1beta1",
                "service": {"name": "hook", "namespace": SCALED},
                "insecureSkipTLSVerify": True,
                "groupPriorityMinimum": 100,
                "versionPriority": 100,
            },
        }
    )
    yield
    kubectl("delete", "apiservice", "v1beta1.metrics.k8s.io")
    kubectl("delete", "deployment/hook")


def test_an_autoscaler_counts_the_sidecar_and_its_pods_are_governed(
    installed_for_two: Installed, checkout: Checkout, metrics_api: None
) -> None:
    """It refuses to count pods that have a container without a request."""
    models = Models(installed_for_two.cluster, SCALED)
    kubectl = models.kubectl
    kubectl.apply(installed_for_two.policy, *checkout.servers())
    kubectl("autoscale", "deployment/rank", "--cpu=50%", "--min=1", "--max=2")
    wait_for(
        lambda: kubectl.get("deployment", "rank")["spec"]["replicas"] == 2,
        240,
        "the autoscaler to ask for a second server",
        every_s=1,
        because=lambda: kubectl("describe", "hpa"),
    )
    kubectl.wait_ready("deployment/rank", 300)
    models.wait_followed()
    assert len(models.partitions()) == 2
    kubectl("delete", "hpa/rank", "deployment/rank")


@pytest.mark.parametrize(
    ("route", "user"),
    [("as-1000", {"runAsUser": 1000}), ("as-root", {"runAsUser": 0, "runAsNonRoot": False})],
)
def test_the_server_may_be_any_user(
    installed_for_two: Installed, checkout: Checkout, route: str, user: dict[str, Any]
) -> None:
    """Root has no capabilities: it may not read what is not its own."""
    models = Models(installed_for_two.cluster, USERS)
    policy = json.loads(json.dumps(installed_for_two.policy))
    policy["metadata"]["name"] = route
    policy["spec"]["selector"]["matchLabels"] = {"app": route}
    deployment, service = checkout.servers(name=route, **user)
    models.kubectl.apply(policy, deployment, service)
    models.kubectl.wait_ready(f"deployment/{route}", 300)
    (pod,) = (
        found
        for found in models.kubectl.items("pods", "-l", f"app={route}")
        if "deletionTimestamp" not in found["metadata"]
    )
    models.kubectl("wait", "--for=condition=Ready", f"hbmp/{name(pod)}", "--timeout=120s")
    users = {
        container: models.kubectl.exec(
            *(name(pod), "python3", "-c", "import os; print(os.getuid())"), container=container
        ).strip()
        for container in ("server", "hbm-sidecar")
    }
    assert users == {"server": str(user["runAsUser"]), "hbm-sidecar": "65532"}
    wait_for(lambda: "alpha" in models.partitions()[name(pod)]["status"], 90, "α to be reported")
    assert condition(models.partitions()[name(pod)], "Applied") == ("True", "Applied")
    assert all(one["restartCount"] == 0 for one in containers(pod))
    models.kubectl("delete", f"deployment/{route}")


def test_no_pod_is_uninjected_while_certificates_rotate(
    installed_for_two: Installed, admitted: Admitted, expiries: set[float]
) -> None:
    cluster = installed_for_two.cluster

    def rotated_twice() -> bool:
        try:
            expiries.add(_expiry(cluster))
        except CommandFailed:
            return False  # the pod is being asked just while it restarts
        return len(expiries) >= 3

    wait_for(rotated_twice, 900, "two further certificates", every_s=5)
    assert admitted.bare == []
    assert admitted.refused == []
    assert admitted.injected > 100
