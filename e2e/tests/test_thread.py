"""From `helm install` to `helm uninstall`: the commands of `docs/kubernetes.md` in their order.

The tests are the steps of one story: each begins where the one before ended. Beside the page's
commands the client sends requests through the router, and its own log says whether any failed.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hbm_dashboards.data import Series, asked, filled, panels
from hbm_dashboards.picture import draw
from hbm_e2e.checkout import Checkout
from hbm_e2e.client import Client, NodeClient, ProxyClient
from hbm_e2e.cluster import AnyCluster, Cluster
from hbm_e2e.images import PROJECT
from hbm_e2e.installation import RELEASE, SYSTEM, Models, remove_everything
from hbm_e2e.kubectl import CommandFailed
from hbm_e2e.objects import condition, containers, name
from hbm_e2e.prometheus import Prometheus, jobs_of
from hbm_e2e.tables import rows
from hbm_e2e.waiting import wait_for
from hbm_e2e.walkthrough import Block, Shell, programs, sh_blocks

pytestmark = pytest.mark.story

PAGE = PROJECT / "docs" / "kubernetes.md"
LOAD = Path(__file__).parent / "data" / "load"
REGULARS, STRANGERS = LOAD / "regulars.yaml", LOAD / "strangers.yaml"
POLICY_FIRST = "policy-first"


class Walk:
    """The page's commands, taken one after the other."""

    def __init__(self, shell: Shell) -> None:
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

    def left(self) -> list[Block]:
        return self._left


@pytest.fixture(scope="module")
def walk(cluster: AnyCluster, checkout: Checkout) -> Iterator[Walk]:
    path = programs(
        checkout.folder / "bin", kubectl=cluster.kubectl.program, helm=cluster.helm.program
    )
    environ = {
        **cluster.helm.environ,
        "PATH": f"{path}:/usr/local/bin:/usr/bin:/bin",
        "KUBECONFIG": str(cluster.kubectl.kubeconfig),
    }
    remove_everything(cluster, "models", POLICY_FIRST)
    yield Walk(Shell(checkout.folder, environ))
    remove_everything(cluster, "models", POLICY_FIRST, wait=False)


@pytest.fixture(scope="module")
def prometheus(
    cluster: AnyCluster, walk: Walk, checkout: Checkout
) -> Iterator[tuple[Prometheus, float] | None]:
    """Scrapes from the second chapter on what the chart's PodMonitors name; with the time since
    which it does. None where the cluster is somebody else's."""
    if not isinstance(cluster, Cluster):
        yield None
        return
    values = [checkout.chart / "values-cpu.yaml", checkout.folder / "docs/examples/routes.yaml"]
    rendered = cluster.helm(
        *("template", RELEASE, str(checkout.chart), "--namespace", SYSTEM),
        *(word for file in values for word in ("--values", str(file))),
        *("--set", "monitoring.podMonitor.enabled=true"),
        *("--api-versions", "monitoring.coreos.com/v1"),
    )
    objects = [one for one in yaml.safe_load_all(rendered) if one]
    running = Prometheus(cluster)
    running.start()
    try:
        running.follow(*jobs_of(one for one in objects if one["kind"] == "PodMonitor"))
        with running.keeping_up():
            yield running, time.time()
    finally:
        running.stop()


@pytest.fixture(scope="module")
def models(cluster: AnyCluster) -> Models:
    return Models(cluster)


@pytest.fixture(scope="module")
def client(cluster: AnyCluster, tmp_path_factory: pytest.TempPathFactory) -> Client:
    if isinstance(cluster, Cluster):
        return NodeClient(cluster, "n1")
    return ProxyClient(tmp_path_factory.mktemp("client"))


COMPILED = """
import os
from pathlib import Path
def kernels(variable):
    folder = Path(os.environ[variable])
    return {str(path.relative_to(folder)) for path in folder.rglob("*.nb*")}
print(len(kernels("HBM_KERNELS_DIR")), *(kernels("NUMBA_CACHE_DIR") - kernels("HBM_KERNELS_DIR")))
"""
"""How many kernels the sidecar's image ships, and which ones its pod has had to compile besides."""


def columns(models: Models, *headings: str) -> list[tuple[str, ...]]:
    """Of what `kubectl get hbmp` prints."""
    return [
        tuple(row[heading] for heading in headings) for row in rows(models.kubectl("get", "hbmp"))
    ]


def test_install(walk: Walk, cluster: AnyCluster) -> None:
    said = walk.take("Install")
    assert said.count("Phase:          Succeeded") == 2
    deployments = cluster.kubectl.within(SYSTEM).items("deployments")
    assert {name(found) for found in deployments} == {
        "hbm-controller",
        "hbm-redis",
        "hbm-webhook",
    }
    assert all(condition(found, "Available")[0] == "True" for found in deployments)


def test_a_labelled_server_is_injected_before_there_is_a_policy(
    walk: Walk, models: Models, prometheus: object
) -> None:
    walk.take("A model server")
    for pod in models.servers().values():
        assert {one["name"] for one in containers(pod)} == {"hbm-sidecar", "server"}
        assert all(one["ready"] and one["restartCount"] == 0 for one in containers(pod))
    partitions = models.partitions()
    assert set(partitions) == set(models.servers())
    assert len(partitions) == 2
    for found in partitions.values():
        assert condition(found, "Admitted") == ("False", "NoPolicy")
        assert found["spec"]["mode"] == "Hold"
    wait_for(
        lambda: columns(models, "ALPHA", "APPLIED") == [("0.5", "True")] * 2,
        60,
        "both to report",
        because=lambda: models.kubectl("get", "hbmp"),
    )


def test_a_policy_governs_them(walk: Walk, models: Models) -> None:
    walk.take("A policy")
    models.wait_followed()
    for found in models.partitions().values():
        assert condition(found, "Admitted") == ("True", "PolicySelected")
        assert condition(found, "Degraded") == ("False", "AsExpected")
        assert found["spec"]["mode"] == "Auto"
    status = models.policy()["status"]
    assert (status["selected"], status["applied"], status["failed"]) == (2, 2, 0)


def test_it_says_what_it_does(walk: Walk) -> None:
    said = walk.take("Look")
    assert "PolicySelected" in said
    assert said.count("α=0.5") == 3


def test_a_router_answers(walk: Walk, models: Models) -> None:
    said = walk.take("A router")
    assert '"scores":[' in said
    assert len(models.routers()) == 2
    wait_for(models.digests_arrive, 60, "digests to travel from sidecars to routers", every_s=1)


def test_auto_moves_alpha_where_the_load_wants_it(models: Models, client: Client) -> None:
    def moved() -> bool:
        # Not in both for certain: where few users land all of them fit, and a move saves nothing.
        statuses = [found["status"] for found in models.partitions().values()]
        return any(one.get("alpha", 0.5) < 0.45 and one.get("moves") for one in statuses) and all(
            "p99Ms" in one and "kvHitRatio" in one for one in statuses
        )

    with models.under_load(client, REGULARS) as sent:
        wait_for(moved, 240, "α to go down", 1, lambda: models.kubectl("get", "hbmp"))
        table = models.kubectl("get", "hbmp")
    assert sent.failures == []
    for pod in models.servers():
        said = models.kubectl.exec(pod, "python3", "-c", COMPILED, container="hbm-sidecar")
        shipped, *compiled = said.split()
        assert int(shipped) > 0
        assert compiled == []
    for row in rows(table):
        blank = [heading for heading, cell in row.items() if not cell]
        assert not blank, table


def test_recommend_publishes_and_leaves_alpha_alone(
    walk: Walk, models: Models, client: Client
) -> None:
    walk.take("Change your mind", blocks=1)
    models.wait_followed()
    pods = models.servers()
    before = {pod: models.sidecar_metrics(pod)["hbm_sidecar_alpha"] for pod in pods}

    def recommended() -> bool:
        statuses = [found["status"] for found in models.partitions().values()]
        return any(one["target"] > one["alpha"] + 0.05 for one in statuses)

    with models.under_load(client, STRANGERS) as sent:
        wait_for(
            recommended, 240, "more α to be recommended", 1, lambda: models.kubectl("get", "hbmp")
        )
    assert sent.failures == []
    assert before == {pod: models.sidecar_metrics(pod)["hbm_sidecar_alpha"] for pod in pods}


def test_fixed_applies(walk: Walk, models: Models, client: Client) -> None:
    observed = "hbm_sidecar_kube_followed_seconds"
    within = f'{observed}_bucket{{le="0.25"}}'
    counted = {pod: models.sidecar_metrics(pod) for pod in models.servers()}

    def fixed() -> bool:
        statuses = [found["status"] for found in models.partitions().values()]
        return all(abs(one["alpha"] - 0.3) < 0.02 for one in statuses)

    with models.under_load(client, STRANGERS) as sent:
        walk.take("Change your mind", blocks=1)
        models.wait_followed()
        wait_for(fixed, 120, "α to be 0.3", 1, lambda: models.kubectl("get", "hbmp"))
    assert sent.failures == []
    for pod, before in counted.items():
        metrics = models.sidecar_metrics(pod)
        assert metrics[f"{observed}_count"] == before[f"{observed}_count"] + 1
        # Within one tick: nothing was observed above it.
        assert metrics[within] == before[within] + 1


def test_what_makes_no_sense_is_refused(models: Models) -> None:
    with pytest.raises(CommandFailed, match=r"alpha\.fixed must lie between alpha\.min"):
        models.kubectl(
            *("patch", "hbmpol", "rank", "--type", "merge"),
            *("-p", '{"spec": {"alpha": {"fixed": 0.95}}}'),
        )


def test_and_back_to_auto(walk: Walk, models: Models) -> None:
    walk.take("Change your mind")
    models.wait_followed()


def test_servers_and_routers_restart_without_a_failed_request(
    walk: Walk, models: Models, client: Client
) -> None:
    before = set(models.servers())
    with models.under_load(client, REGULARS) as sent:
        walk.take("Restart without a failed request")
        models.kubectl("rollout", "restart", "deployment/hbm-router-rank")
        models.kubectl.wait_ready("deployment/hbm-router-rank", 300)
        models.wait_followed()
        answering = set(sent.nodes())
    assert sent.failures == []
    assert not before & set(models.partitions())
    after = {pod["metadata"]["uid"] for pod in models.servers().values()}
    assert after & answering


def test_a_deleted_pod_takes_its_partition_along(models: Models, client: Client) -> None:
    gone = min(models.servers())
    with models.under_load(client, REGULARS) as sent:
        models.kubectl("delete", "pod", gone)
        models.kubectl.wait_gone("hbmp", gone)
        models.kubectl.wait_ready("deployment/rank", 300)
        models.wait_followed()
    assert sent.failures == []
    assert len(models.partitions()) == 2


def test_a_policy_may_be_there_first(cluster: AnyCluster, checkout: Checkout) -> None:
    models = Models(cluster, POLICY_FIRST)
    cluster.kubectl("create", "namespace", POLICY_FIRST)
    policy = checkout.folder / "docs" / "examples" / "policy.yaml"
    models.kubectl("apply", "-f", str(policy))
    wait_for(
        lambda: condition(models.policy(), "Ready") == ("True", "NoPods"), 60, "the empty policy"
    )
    deployment, service = checkout.model_server
    deployment["spec"]["replicas"] = 1
    models.kubectl.apply(deployment, service)
    models.kubectl.wait_ready("deployment/rank", 300)
    models.wait_followed()
    (found,) = models.partitions().values()
    assert condition(found, "Admitted") == ("True", "PolicySelected")
    cluster.kubectl("delete", "namespace", POLICY_FIRST, "--wait=false")


def test_upgrades_leave_running_sidecars_connected(
    cluster: AnyCluster, checkout: Checkout, models: Models, client: Client
) -> None:
    before = {pod: models.sidecar_metrics(pod) for pod in models.servers()}
    with models.under_load(client, REGULARS) as sent:
        for number in (1, 2):
            cluster.helm(
                *("upgrade", RELEASE, str(checkout.chart), "--namespace", SYSTEM),
                *("--reuse-values", "--wait", "--timeout", "5m"),
                *("--set", f"controller.podAnnotations.upgrade=number-{number}"),
                *("--set", f"redis.podAnnotations.upgrade=number-{number}"),
            )
            wait_for(models.digests_arrive, 60, "all to reach the new Redis", every_s=1)
    assert sent.failures == []
    assert set(models.servers()) == set(before)
    for pod, metrics in before.items():
        after = models.sidecar_metrics(pod)
        assert after["hbm_sidecar_kube_up"] == 1
        assert after["hbm_sidecar_heartbeats_total"] > metrics["hbm_sidecar_heartbeats_total"]
    cluster.helm("test", RELEASE, "--namespace", SYSTEM)


def test_dashboards_are_there(walk: Walk) -> None:
    said = walk.take("Dashboards and alerts")
    assert len(rows(said)) == 3


@pytest.mark.parametrize("board", ["fleet", "partition", "router"])
def test_every_panel_shows_data(
    board: str,
    cluster: AnyCluster,
    models: Models,
    prometheus: tuple[Prometheus, float] | None,
    request: pytest.FixtureRequest,
) -> None:
    if prometheus is None:
        pytest.skip("the Prometheus of somebody else's cluster is theirs to ask")
    store, since = prometheus
    selector = "grafana_dashboard=1"
    (text,) = (
        text
        for found in cluster.kubectl.within(SYSTEM).items("configmaps", "-l", selector)
        for name, text in found["data"].items()
        if name == f"{board}.json"
    )
    dashboard = json.loads(text)
    (longest,) = store.query(
        f'topk(1, count_over_time(hbm_pool_alpha{{namespace="{models.namespace}"}}[1h]))'
    )
    chosen = {"namespace": models.namespace, "pod": longest["metric"]["pod"], "route": "rank"}
    now = time.time()
    answers = [
        [
            (one, [Series.of(found) for found in store.query_range(one.expression, since, now, 5)])
            for one in asked(panel, chosen)
        ]
        for panel in panels(dashboard)
    ]
    empty = [
        f"{one.panel}: {one.legend}: {one.expression}"
        for panel in answers
        for one, found in panel
        if not any(series.points for series in found)
    ]
    draw(dashboard, answers, Path(request.config.rootpath) / f"out/e2e/dashboards/{board}.png")
    assert empty == []
    for mark in dashboard["annotations"]["list"]:
        store.query_range(filled(mark["expr"], chosen), since, now, 5)


def test_uninstalled_pods_serve_on(walk: Walk, models: Models, checkout: Checkout) -> None:
    before = set(models.servers())
    said = walk.take("Remove")
    assert all(crd in said for crd in ("hbmpolicies", "hbmpartitions"))
    assert walk.left() == []
    assert set(models.servers()) == before
    for pod in models.servers().values():
        assert all(one["restartCount"] == 0 for one in containers(pod))
    assert '"scores":[' in models.rank("rank", checkout)
