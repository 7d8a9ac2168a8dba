"""A client that reaches the real API server through the fault proxy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hbm_e2e.api_server import ApiServer
from hbm_kube.client import KubeClient
from hbm_kube.resources import Resource

from tests.kube_faults import FaultProxy


@pytest.fixture
def proxy(api_server: ApiServer) -> Iterator[FaultProxy]:
    with FaultProxy(api_server) as proxy:
        yield proxy


@pytest.fixture
def requests() -> list[tuple[str, int]]:
    """(verb, HTTP status) of each attempt of `kube`."""
    return []


@pytest.fixture
async def kube(proxy: FaultProxy, requests: list[tuple[str, int]]) -> AsyncIterator[KubeClient]:
    def note(verb: str, _: Resource, code: int, __: float) -> None:
        requests.append((verb, code))

    async with KubeClient(proxy.config(), on_request=note, timeout_s=20.0, backoff_s=0.01) as kube:
        yield kube


def config_map(name: str, namespace: str, **data: str) -> dict[str, Any]:
    """A ConfigMap: the plainest object there is."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace},
        "data": data,
    }
