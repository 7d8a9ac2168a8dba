"""What the tests of the whole system share: images, and stories that end at their first failure."""

import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from hbm_e2e.checkout import Checkout
from hbm_e2e.client import Client, NodeClient
from hbm_e2e.cluster import AnyCluster, Cluster
from hbm_e2e.images import TARGETS, Image, ImageStore
from hbm_e2e.installation import Models, in_order, install, remove_everything
from hbm_e2e.requirements import require

HERE = Path(__file__).parent
FIRST_TEST_S = 1800
GPUS_PER_NODE = 4
OF_PROJECT = {"project_images", "built"}
"""Fixtures that are about the images of `images/Dockerfile`."""
BROKEN_OFF = pytest.StashKey[str]()
"""Of a file marked `story`: its first test that failed."""


class Building(NamedTuple):
    """Images on their way, in this order."""

    python: Future[Image]
    project: Future[list[Image]]


@pytest.fixture(scope="session", autouse=True)
def building(request: pytest.FixtureRequest) -> Iterator[Building | None]:
    """Builds the images that the collected tests need, from the first test on: the cluster starts
    and is tested meanwhile. None where the cluster is somebody else's."""
    if os.environ.get("CLUSTER", "own") != "own":
        yield None
        return
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    require()
    store = ImageStore()
    with ThreadPoolExecutor(1) as pool:
        python = pool.submit(store.build_python)
        project = pool.submit(lambda: store.build_project() if wanted & OF_PROJECT else [])
        yield Building(python, project)
        project.cancel()


@pytest.fixture(scope="session")
def python_image(cluster: AnyCluster, building: Building | None) -> str:
    """Debian with Python, built as the project's images are; on every node of our own cluster."""
    if isinstance(cluster, Cluster) and building is not None:
        cluster.load([building.python.result()])
    return cluster.image("python")


@pytest.fixture(scope="session")
def project_images(cluster: AnyCluster, building: Building | None, python_image: str) -> None:
    """The images of `images/Dockerfile` from this source tree, on every node of our own cluster."""
    if isinstance(cluster, Cluster) and building is not None:
        cluster.load(building.project.result())


@pytest.fixture(scope="session")
def built(building: Building | None) -> dict[str, Image]:
    """The images of `images/Dockerfile` by target, as archives; no cluster is needed."""
    if building is None:
        pytest.skip("the images of somebody else's cluster were built elsewhere")
    return dict(zip(TARGETS, building.project.result(), strict=True))


@pytest.fixture(scope="session")
def checkout(
    cluster: AnyCluster, project_images: None, tmp_path_factory: pytest.TempPathFactory
) -> Checkout:
    """What the documents' commands read; the images and GPUs that it names are there."""
    if isinstance(cluster, Cluster):
        cluster.offer_gpus(GPUS_PER_NODE)
    return Checkout(cluster, tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def client_beside(own_cluster: Cluster) -> Callable[..., Client]:
    """A client on a node that is none of those given."""

    def beside(*nodes: str) -> Client:
        free = next(node.name for node in own_cluster.nodes if node.name not in nodes)
        return NodeClient(own_cluster, free)

    return beside


@pytest.fixture(scope="module")
def installed(cluster: AnyCluster, checkout: Checkout) -> Iterator[Models]:
    """The chart, a route, a policy and two servers, as after chapter 5 of the page."""
    remove_everything(cluster, "models")
    examples = checkout.folder / "docs" / "examples"
    cluster.kubectl("create", "namespace", "models")
    models = Models(cluster)
    install(cluster, checkout.chart, "-f", str(examples / "routes.yaml"))
    models.kubectl("apply", "-f", str(examples / "policy.yaml"))
    models.kubectl("apply", "-f", str(examples / "server.yaml"))
    yield models
    remove_everything(cluster, "models", wait=False)


@pytest.fixture
def calm(own_cluster: Cluster, installed: Models) -> Models:
    """Everything in order; `own_cluster` starts again what a test has killed."""
    own_cluster.repair()
    in_order(own_cluster, installed)
    return installed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test starts a cluster and builds images; those with pods wait for pods."""
    for item in items:
        if item.path.is_relative_to(HERE) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(FIRST_TEST_S))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "story: each test of the file begins where the one before it ended"
    )
    config.addinivalue_line("markers", "e2e_full: kills and power cuts; left out of `make e2e`")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember where a story broke off."""
    report = yield
    if report.failed and item.get_closest_marker("story") and item.parent is not None:
        item.parent.stash.setdefault(BROKEN_OFF, item.name)
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("story") and item.parent is not None:
        broken = item.parent.stash.get(BROKEN_OFF, None)
        if broken:
            pytest.skip(f"the story broke off at {broken}")
