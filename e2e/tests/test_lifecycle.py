"""Definitions that come late, an upgrade with sidecars of the version before, a release that moves.

The tests are the steps of one story. It begins with the frozen chart of version 0.1.0 and ends with
the present one under another name in another namespace; one server serves all the while.
"""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hbm_e2e.checkout import Checkout
from hbm_e2e.client import Client
from hbm_e2e.cluster import AnyCluster, Cluster
from hbm_e2e.images import PROJECT
from hbm_e2e.installation import (
    CRDS,
    MODELS,
    RELEASE,
    SYSTEM,
    Models,
    in_order,
    install,
    remove_everything,
)
from hbm_e2e.objects import condition, containers, is_ready, ready_since
from hbm_e2e.waiting import wait_for

pytestmark = [pytest.mark.e2e_full, pytest.mark.story]

HERE = Path(__file__).parent
FROZEN = HERE.parent / "fixtures" / "hbm-partition-0.1.0.tgz"
REGULARS = HERE / "data" / "load" / "regulars.yaml"
LATE_S = 30
MOVED, ELSEWHERE = "pools", "gpu-system"
PROTOCOL = "PROTOCOL_VERSION: Final = 1"
NEXT_OPERATOR = """\
ARG BASE
FROM {operator}
COPY names.py /opt/hbm/lib/python3.11/site-packages/hbm_operator/names.py
"""


@pytest.fixture(scope="module")
def models(cluster: AnyCluster) -> Iterator[Models]:
    remove_everything(cluster, MODELS, ELSEWHERE)
    yield Models(cluster)
    remove_everything(cluster, MODELS, ELSEWHERE, wait=False)


@pytest.fixture(scope="module")
def next_operator(
    cluster: AnyCluster, project_images: None, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The operator of a later version, which expects sidecars to say more than ours do."""
    if not isinstance(cluster, Cluster):
        pytest.skip("builds an image of its own: on the harness's own cluster only")
    operator = cluster.image("operator")
    folder = tmp_path_factory.mktemp("next")
    names = (PROJECT / "operator" / "hbm_operator" / "names.py").read_text()
    assert PROTOCOL in names
    (folder / "names.py").write_text(names.replace(PROTOCOL, PROTOCOL.replace("1", "2")))
    (folder / "Dockerfile").write_text(NEXT_OPERATOR.format(operator=operator))
    (built,) = cluster.images.build_project("operator")
    image = cluster.images.build(
        folder / "Dockerfile", folder, cluster.image("operator-next"), arguments={"OF": built.id}
    )
    cluster.load([image])
    return image.name.removeprefix("docker.io/").rsplit(":", 1)[0]


def controller(cluster: AnyCluster) -> Any:
    (pod,) = cluster.kubectl.within(SYSTEM).items(
        "pods", "-l", "app.kubernetes.io/component=controller"
    )
    return pod


def running_s(pod: Any) -> float:
    """Since when its container runs; 0 while it does not."""
    for one in containers(pod):
        if "running" in one["state"]:
            began = datetime.fromisoformat(one["state"]["running"]["startedAt"])
            return (datetime.now(UTC) - began).total_seconds()
    return 0.0


def test_definitions_may_come_late(cluster: AnyCluster, checkout: Checkout, models: Models) -> None:
    values = str(checkout.chart / "values-cpu.yaml")
    cluster.helm(
        *("install", RELEASE, str(FROZEN), "--namespace", SYSTEM, "--create-namespace"),
        *("-f", values, "--set", "crds.install=false", "--timeout", "5m"),
    )
    kubectl = cluster.kubectl.within(SYSTEM)
    wait_for(
        lambda: running_s(controller(cluster)) > LATE_S,
        180,
        f"the controller to have waited {LATE_S} s",
        every_s=1,
        because=lambda: kubectl("get", "pods"),
    )
    assert not is_ready(controller(cluster))
    kubectl("apply", "--server-side", "-f", str(PROJECT / "crds"))
    for deployment in ("controller", "webhook", "redis"):
        kubectl.wait_ready(f"deployment/hbm-{deployment}", 180)
    assert [one["restartCount"] for one in containers(controller(cluster))] == [0]


def test_a_server_under_the_version_before(
    cluster: AnyCluster, checkout: Checkout, models: Models
) -> None:
    cluster.kubectl("create", "namespace", MODELS)
    models.kubectl("apply", "-f", str(checkout.folder / "docs" / "examples" / "policy.yaml"))
    models.kubectl.apply(*checkout.servers())
    routed(cluster, FROZEN, checkout)
    in_order(cluster, models)


def routed(cluster: AnyCluster, chart: Path, checkout: Checkout, *words: str) -> None:
    """Upgrade the release, with a route."""
    values = [checkout.chart / "values-cpu.yaml", checkout.folder / "docs/examples/routes.yaml"]
    cluster.helm(
        *("upgrade", RELEASE, str(chart), "--namespace", SYSTEM, "--wait", "--timeout", "5m"),
        *(word for file in values for word in ("-f", str(file))),
        *(words or ("--set", "crds.install=false")),
    )


def test_sidecars_of_the_version_before_work_on(
    cluster: AnyCluster,
    checkout: Checkout,
    models: Models,
    next_operator: str,
    client_beside: Callable[..., Client],
) -> None:
    """The upgrade also takes over the definitions, which somebody else had installed."""
    before = {pod: ready_since(found) for pod, found in models.servers().items()}

    def outdated() -> bool:
        return all(
            condition(found, "Degraded") == ("True", "SidecarOutdated")
            for found in models.partitions().values()
        )

    with models.under_load(client_beside(), REGULARS) as sent:
        routed(
            *(cluster, checkout.chart, checkout, "--take-ownership"),
            *("--set", f"controller.image.repository={next_operator}"),
        )
        wait_for(outdated, 120, "the old sidecar to be told so", every_s=1)
        models.edit_policy()
        models.wait_followed()
        wait_for(models.digests_arrive, 60, "digests to travel on", every_s=1)
        assert outdated()
    assert sent.failures == []
    assert {pod: ready_since(found) for pod, found in models.servers().items()} == before
    for crd in CRDS:
        owner = cluster.kubectl.get("crd", crd)["metadata"]["annotations"]
        assert owner["meta.helm.sh/release-name"] == RELEASE


def test_an_upgrade_that_changes_nothing_writes_nothing(
    cluster: AnyCluster, checkout: Checkout, models: Models
) -> None:
    routed(cluster, checkout.chart, checkout, "--set", "crds.install=true")
    in_order(cluster, models)
    before = generations(cluster)
    routed(cluster, checkout.chart, checkout, "--set", "crds.install=true")
    assert generations(cluster) == before


def generations(cluster: AnyCluster) -> dict[str, Any]:
    """Of what a release is made of, and what the controller wrote into its webhook's entry."""
    kinds = "deployments,services,mutatingwebhookconfigurations,customresourcedefinitions"
    selector = f"app.kubernetes.io/instance={RELEASE}"
    listed = cluster.kubectl.items(kinds, "--all-namespaces", "-l", selector)
    return {
        f"{one['kind']}/{one['metadata']['name']}": (
            one["metadata"].get("generation"),
            [hook["clientConfig"].get("caBundle") for hook in one.get("webhooks", ())],
        )
        for one in listed
    }


def test_without_a_release_sidecars_are_refused_and_pods_serve_on(
    cluster: AnyCluster, checkout: Checkout, models: Models
) -> None:
    before = {pod: ready_since(found) for pod, found in models.servers().items()}
    (pod,) = before
    cluster.helm("uninstall", RELEASE, "--namespace", SYSTEM, "--wait")
    denied = 'hbm_sidecar_kube_failures_total{operation="status"}'
    wait_for(
        lambda: models.sidecar_metrics(pod)[denied] > 0,
        180,
        "the sidecar's next report to be refused",
        every_s=2,
    )
    assert {pod: ready_since(found) for pod, found in models.servers().items()} == before
    assert '"scores":[' in models.rank("rank", checkout)
    assert models.policy()["spec"]["mode"] == "Auto"


def test_another_name_in_another_namespace_takes_over(
    cluster: AnyCluster, checkout: Checkout, models: Models
) -> None:
    before = {pod: ready_since(found) for pod, found in models.servers().items()}
    examples = checkout.folder / "docs" / "examples"
    install(
        *(cluster, checkout.chart, "-f", str(examples / "routes.yaml"), "--take-ownership"),
        release=MOVED,
        namespace=ELSEWHERE,
    )
    models.edit_policy()
    in_order(cluster, models, release=MOVED, namespace=ELSEWHERE)
    assert {pod: ready_since(found) for pod, found in models.servers().items()} == before
    for crd in CRDS:
        owner = cluster.kubectl.get("crd", crd)["metadata"]["annotations"]
        assert owner["meta.helm.sh/release-namespace"] == ELSEWHERE
