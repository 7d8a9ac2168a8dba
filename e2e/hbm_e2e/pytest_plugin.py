"""Fixtures for tests that need a real API server; loaded for the whole suite.

`api_server` is one server per test process. Tests share it, so each makes a namespace of its own
(`namespace` does) and names its cluster-wide objects after it.
"""

import os
import uuid
from collections.abc import Iterator

import pytest

from hbm_e2e.api_server import PROGRAMS, ApiServer
from hbm_e2e.toolchain import Toolchain


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "apiserver: needs a real API server; skipped where its programs are neither built nor "
        "HBM_E2E_BUILD=1 asks to build them",
    )


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    toolchain = Toolchain()
    missing = toolchain.missing(PROGRAMS)
    if missing:
        if not os.environ.get("HBM_E2E_BUILD"):
            pytest.skip(
                f"not built: {', '.join(missing)}; run `PYTHONPATH=e2e python3.11 -m hbm_e2e "
                f"build {' '.join(PROGRAMS)}` or set HBM_E2E_BUILD=1"
            )
        toolchain.build(PROGRAMS)
    with ApiServer(tmp_path_factory.mktemp("api-server"), toolchain) as server:
        yield server


@pytest.fixture
def namespace(api_server: ApiServer) -> Iterator[str]:
    """A fresh namespace with its default service account; deleted (not waited for) at the end."""
    name = f"test-{uuid.uuid4().hex[:10]}"
    kubectl = api_server.kubectl
    kubectl("create", "namespace", name)
    api_server.wait_for_service_account(name)
    yield name
    kubectl("delete", "namespace", name, "--wait=false")
