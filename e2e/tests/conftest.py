"""What the tests of the whole system share: images, and stories that end at their first failure."""

from collections.abc import Generator
from pathlib import Path

import pytest
from hbm_e2e.checkout import Checkout
from hbm_e2e.cluster import AnyCluster, Cluster

HERE = Path(__file__).parent
DATA = HERE / "data"
FIRST_TEST_S = 1800
BROKEN_OFF = pytest.StashKey[str]()
"""Of a file marked `story`: its first test that failed."""


@pytest.fixture(scope="session")
def python_image(cluster: AnyCluster) -> str:
    """Debian with Python, built as the project's images are; on every node of our own cluster."""
    name = cluster.image("python")
    if isinstance(cluster, Cluster):
        folder = DATA / "python"
        cluster.load([cluster.images.build(folder / "Dockerfile", folder, name)])
    return name


@pytest.fixture(scope="session")
def project_images(cluster: AnyCluster, python_image: str) -> None:
    """The images of `images/Dockerfile` from this source tree, on every node of our own cluster."""
    if isinstance(cluster, Cluster):
        cluster.load(cluster.images.build_project())


@pytest.fixture(scope="session")
def checkout(
    cluster: AnyCluster, project_images: None, tmp_path_factory: pytest.TempPathFactory
) -> Checkout:
    """What the documents' commands read; the images that it names are there."""
    return Checkout(cluster, tmp_path_factory.mktemp("checkout"))


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
