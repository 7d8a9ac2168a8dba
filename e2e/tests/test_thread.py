"""From `helm install` to `helm uninstall`: every command of `docs/kubernetes.md` in its order, under load.

The tests are the steps of one story: each begins where the one before ended. Between the page's
commands the client sends requests through the router, and its own log says whether any failed.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hbm_e2e.checkout import Checkout
from hbm_e2e.client import Client, failures
from hbm_e2e.cluster import AnyCluster, Cluster
from hbm_e2e.images import PROJECT
from hbm_e2e.kubectl import Kubectl
from hbm_e2e.objects import condition, containers, is_ready, name
from hbm_e2e.tables import rows, samples
from hbm_e2e.waiting import wait_for
from hbm_e2e.walkthrough import Block, Shell, programs, sh_blocks

pytestmark = pytest.mark.story

PAGE = PROJECT / "docs" / "kubernetes.md"
LOAD = Path(__file__).parent / "data" / "load"
SIDECAR_PORT = 9400


class Walk:
    """The page's commands, taken one after the other, and the cluster they are run against."""

    def __init__(self, cluster: AnyCluster, checkout: Checkout, shell: Shell) -> None:
        self.cluster = cluster
        self.checkout = checkout
        self.kubectl = cluster.kubectl.within("models")
        self._shell = shell
        self._left: list[Block] = sh_blocks(PAGE)

    def take(self, chapter: str, blocks: int | None = None) -> str:
        """Run the next blocks, which stand in this chapter: all that are left of it, or so many."""
        said = ""
        taken = 0
        while self._left and self._left[0].chapter == chapter and taken != blocks:
            said += self._shell(self._left.pop(0).text)
            taken += 1
        assert taken, f"the page has no block left in {chapter!r}"
        return said

    @property
    def done(self) -> bool:
        return not self._left

    def partitions(self) -> dict[str, dict]:
        return {name(found): found for found in self.kubectl.items("hbmp")}

    def servers(self) -> list[dict]:
        return [pod for pod in self.kubectl.items("pods", "-l", "app=rank") if is_ready(pod)]

    def sidecar_metrics(self, pod: str) -> dict[str, float]:
        path = f"/api/v1/namespaces/models/pods/{pod}:{SIDECAR_PORT}/proxy/metrics"
        return samples(self.kubectl("get", "--raw", path))


@pytest.fixture(scope="module")
def walk(
    cluster: AnyCluster, project_images: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Walk]:
    folder = tmp_path_factory.mktemp("checkout")
    checkout = Checkout(cluster, folder)
    path = programs(folder / "bin", kubectl=cluster.kubectl.program, helm=cluster.helm.program)
    environ = {
        **cluster.helm.environ,
        "PATH": f"{path}:/usr/local/bin:/usr/bin:/bin",
        "KUBECONFIG": str(cluster.kubectl.kubeconfig),
    }
    yield Walk(cluster, checkout, Shell(folder, environ))
