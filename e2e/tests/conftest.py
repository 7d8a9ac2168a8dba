from pathlib import Path

import pytest
from hbm_e2e.cluster import AnyCluster, Cluster

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def python_image(cluster: AnyCluster) -> str:
    """Debian with Python, built as the project's images are; on every node of our own cluster."""
    name = cluster.image("python")
    if isinstance(cluster, Cluster):
        folder = DATA / "python"
        cluster.load([cluster.images.build(folder / "Dockerfile", folder, name)])
    return name
