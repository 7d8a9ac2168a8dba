"""What all tests of the operator against a real API server share."""

from __future__ import annotations

import pytest
from hbm_e2e.api_server import ApiServer
from hbm_operator.models.crd import definitions


@pytest.fixture(scope="session")
def crds(api_server: ApiServer) -> ApiServer:
    """The API server with the custom resources installed and served."""
    kubectl = api_server.kubectl
    kubectl.apply(*definitions().values(), server_side=True)
    names = [definition["metadata"]["name"] for definition in definitions().values()]
    kubectl("wait", "--for=condition=Established", *(f"crd/{name}" for name in names))
    return api_server
