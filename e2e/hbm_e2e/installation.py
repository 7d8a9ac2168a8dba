"""The chart on a cluster, model servers below it, and what both say of themselves."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hbm_e2e.checkout import Checkout
from hbm_e2e.client import Client, Sent
from hbm_e2e.cluster import AnyCluster
from hbm_e2e.errors import HarnessError
from hbm_e2e.kubectl import Kubectl
from hbm_e2e.objects import condition, is_ready, name
from hbm_e2e.tables import samples
from hbm_e2e.waiting import wait_for

RELEASE = "hbm"
SYSTEM = "hbm-system"
MODELS = "models"
ROUTER = "hbm-router-rank"
CRDS = ("hbmpartitions.hbm-partition.io", "hbmpolicies.hbm-partition.io")
SIDECAR_PORT = 9400
ROUTER_ADMIN_PORT = 8081
REQUEST = "docs/examples/request.json"


class Models:
    """A namespace with the Deployment `rank` of `docs/examples/server.yaml`."""

    def __init__(self, cluster: AnyCluster, namespace: str = MODELS, router: str = ROUTER) -> None:
        self.namespace = namespace
        self.router = router
        """Service of the route to them."""
        self.kubectl: Kubectl = cluster.kubectl.within(namespace)

    def partitions(self) -> dict[str, Any]:
        """By the name of the pod."""
        return {name(found): found for found in self.kubectl.items("hbmp")}

    def servers(self) -> dict[str, Any]:
        """Ready pods by name."""
        pods = self.kubectl.items("pods", "-l", "app=rank")
        return {name(pod): pod for pod in pods if is_ready(pod)}

    def policy(self) -> Any:
        return self.kubectl.get("hbmpol", "rank")

    def followed(self) -> bool:
        """Whether every Ready pod has its partition, and all of it follows the newest policy."""
        generation = self.policy()["metadata"]["generation"]
        partitions = self.partitions()
        return set(partitions) == set(self.servers()) and all(
            condition(found, "Ready")[0] == "True"
            and found["spec"]["policyRef"]["generation"] == generation
            and found["status"]["observedGeneration"] == found["metadata"]["generation"]
            for found in partitions.values()
        )

    def as_expected(self) -> bool:
        """Whether no partition is Degraded."""
        return all(
            condition(found, "Degraded") == ("False", "AsExpected")
            for found in self.partitions().values()
        )

    def wait_followed(self, timeout_s: float = 120) -> None:
        wait_for(
            self.followed,
            timeout_s,
            f"all partitions of {self.namespace} to follow their policy",
            every_s=0.5,
            because=lambda: self.kubectl("get", "hbmp,pods"),
        )

    def edit_policy(self) -> None:
        """A new generation, which every partition must follow."""
        slo = 20 + self.policy()["metadata"]["generation"]
        patch = f'{{"spec": {{"slo": {{"latencyMs": {slo}}}}}}}'
        self.kubectl("patch", "hbmpol", "rank", "--type", "merge", "-p", patch)

    def routers(self) -> dict[str, Any]:
        """Ready pods of the route by name."""
        pods = self.kubectl.items("pods", "-l", "hbm-partition.io/route")
        return {name(pod): pod for pod in pods if is_ready(pod)}

    def sidecar_metrics(self, pod: str) -> dict[str, float]:
        """`/metrics` of a pod's sidecar."""
        return self._metrics(pod, SIDECAR_PORT)

    def router_metrics(self, pod: str) -> dict[str, float]:
        """`/metrics` of a router."""
        return self._metrics(pod, ROUTER_ADMIN_PORT)

    def digests_arrive(self) -> bool:
        """Whether every sidecar reaches Redis, and every router reads there."""
        return all(
            self.sidecar_metrics(pod)["hbm_sidecar_redis_up"] == 1 for pod in self.servers()
        ) and all(self.router_metrics(pod)["hbm_router_store_up"] == 1 for pod in self.routers())

    def rank(self, service: str, checkout: Checkout) -> str:
        """The answer to one request, through the API server's proxy."""
        path = f"/api/v1/namespaces/{self.namespace}/services/{service}:http/proxy/v1/rank"
        return self.kubectl("create", "--raw", path, "-f", str(checkout.folder / REQUEST))

    def _metrics(self, pod: str, port: int) -> dict[str, float]:
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}:{port}/proxy/metrics"
        return samples(self.kubectl("get", "--raw", path))

    @contextmanager
    def under_load(self, client: Client, scenario: Path) -> Iterator[Sent]:
        """Requests through the router meanwhile; one has been answered before the block. Users go
        where they are cheapest: that may be the same server for all of them."""
        with client.sending(self.kubectl, self.router, scenario) as sent:
            yield sent


def install(
    cluster: AnyCluster, chart: Path, *words: str, release: str = RELEASE, namespace: str = SYSTEM
) -> None:
    """The chart, small as on the page; until its webhook is asked."""
    cluster.helm(
        *("install", release, str(chart), "--namespace", namespace, "--create-namespace"),
        *("-f", str(chart / "values-cpu.yaml"), *words, "--timeout", "5m"),
    )
    prefix = release if "hbm" in release else f"{release}-hbm"
    cluster.kubectl.within(namespace).wait_ready(f"deployment/{prefix}-webhook", 300)


def in_order(
    cluster: AnyCluster, *all_models: Models, release: str = RELEASE, namespace: str = SYSTEM
) -> None:
    """All deployments available, all pods injected, partitions Ready, digests on their way."""
    prefix = release if "hbm" in release else f"{release}-hbm"
    for deployment in ("controller", "redis", "webhook"):
        cluster.kubectl.within(namespace).wait_ready(f"deployment/{prefix}-{deployment}", 300)
    for models in all_models:
        for deployment in models.kubectl.items("deployments"):
            models.kubectl.wait_ready(f"deployment/{name(deployment)}", 300)
        models.wait_followed(180)
        wait_for(
            models.as_expected,
            120,
            "no partition to be Degraded",
            every_s=1,
            because=partial(models.kubectl, "describe", "hbmp"),
        )
        # A kubelet shows a changed address of Redis to its pods within a minute and a half.
        wait_for(
            models.digests_arrive, 150, "digests to travel from sidecars to routers", every_s=1
        )


def remove_everything(cluster: AnyCluster, *namespaces: str, wait: bool = True) -> None:
    """All releases, the definitions with all objects, and namespaces (waited for, unless told)."""
    try:
        releases = {
            (found["name"], found["namespace"])
            for found in json.loads(cluster.helm("list", "--all-namespaces", "-o", "json"))
            if found["chart"].startswith("hbm-partition-")
        }
        for release, namespace in releases | {(RELEASE, SYSTEM)}:
            cluster.helm(
                *("uninstall", release, "--namespace", namespace, "--ignore-not-found", "--wait")
            )
    except HarnessError as error:
        raise HarnessError(f"cannot remove an earlier installation: {error}") from error
    kubectl = cluster.kubectl
    kubectl("delete", "crd", *CRDS, "--ignore-not-found", timeout_s=180)
    kubectl(
        *(
            "delete",
            "namespace",
            SYSTEM,
            *namespaces,
            "--ignore-not-found",
            f"--wait={str(wait).lower()}",
        ),
        timeout_s=180,
    )
