"""Fixtures for tests that need a real Kubernetes; loaded for the whole suite.

`api_server` is one API server per test process, `cluster` the three nodes (or, by
`CLUSTER=existing`, the cluster that `KUBECONFIG` names). Tests share them, so each works in a
namespace of its own (`namespace`, `cluster_namespace`). The harness is imported when a test first
asks for it: all others start without.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hbm_e2e.api_server import ApiServer
    from hbm_e2e.cluster import AnyCluster, Cluster
    from hbm_e2e.kubectl import Kubectl


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "apiserver: needs a real API server; skipped where its programs are neither built nor "
        "HBM_E2E_BUILD=1 asks to build them",
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build what the collected tests lack, if asked to: that takes longer than a test may."""
    wanting = any("api_server" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanting and os.environ.get("HBM_E2E_BUILD") and not session.config.option.collectonly:
        from hbm_e2e.api_server import PROGRAMS
        from hbm_e2e.toolchain import Toolchain

        Toolchain().build(PROGRAMS)


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    from hbm_e2e.api_server import PROGRAMS, ApiServer
    from hbm_e2e.toolchain import Toolchain

    toolchain = Toolchain()
    missing = toolchain.missing(PROGRAMS)
    if missing:
        pytest.skip(
            f"not built: {', '.join(missing)}; run `PYTHONPATH=e2e python3.11 -m hbm_e2e "
            f"build {' '.join(PROGRAMS)}` or set HBM_E2E_BUILD=1"
        )
    with ApiServer(tmp_path_factory.mktemp("api-server"), toolchain) as server:
        yield server


@pytest.fixture
def namespace(api_server: ApiServer) -> Iterator[str]:
    """A fresh namespace with its default service account; deleted (not waited for) at the end."""
    yield from _namespace(api_server.kubectl)


@pytest.fixture(scope="session")
def cluster() -> Iterator[AnyCluster]:
    """Started unless it runs; what was started here is stopped, unless HBM_E2E_KEEP=1."""
    from hbm_e2e.cluster import Cluster, ExistingCluster

    kind = os.environ.get("CLUSTER", "own")
    if kind == "existing":
        yield ExistingCluster()
        return
    if kind != "own":
        raise pytest.UsageError(f"CLUSTER is {kind!r}; it may be `own` or `existing`")
    own = Cluster()
    ran = own.is_up()
    try:
        own.up()
        yield own
    finally:
        if not ran and not os.environ.get("HBM_E2E_KEEP"):
            own.down()


@pytest.fixture
def own_cluster(cluster: AnyCluster) -> Iterator[Cluster]:
    """For tests that cut power and kill daemons; all of it runs again afterwards."""
    from hbm_e2e.cluster import Cluster

    if not isinstance(cluster, Cluster):
        pytest.skip("nobody cuts the power of a cluster that is not the harness's own")
    yield cluster
    cluster.repair()


@pytest.fixture
def cluster_namespace(cluster: AnyCluster) -> Iterator[str]:
    """A fresh namespace of the cluster; deleted (not waited for) at the end."""
    yield from _namespace(cluster.kubectl)


def _namespace(kubectl: Kubectl) -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex[:10]}"
    kubectl("create", "namespace", name)
    kubectl.within(name).wait_for_service_account()
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep a bundle of every failure of a test that had a cluster, before it is cleaned up."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and call.when != "teardown" and cluster is not None:
        from hbm_e2e.bundle import Bundle
        from hbm_e2e.cluster import Cluster

        label = re.sub(r"\W+", "-", item.nodeid.rsplit("/", 1)[-1]).strip("-")
        folder = Path(item.config.rootpath) / "out" / "e2e" / label
        logs = cluster.folder / "logs" if isinstance(cluster, Cluster) else None
        Bundle(folder).collect(cluster.kubectl, logs)
        report.sections.append(("bundle", f"logs, events and objects: {folder}"))
    return report
