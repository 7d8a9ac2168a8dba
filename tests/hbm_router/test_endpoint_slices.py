"""Backends out of EndpointSlices: from the objects, and from a real API server."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from hbm_e2e.api_server import ApiServer
from hbm_kube.config import KubeConfig
from hbm_router.config import RouterSettings
from hbm_router.discovery import Backend
from hbm_router.endpoint_slices import (
    EndpointSliceDiscovery,
    State,
    endpoints_of,
    merged,
    port_of,
    usable,
)
from hbm_router.metrics import RouterMetrics
from hypothesis import given
from hypothesis import strategies as st

from tests.hbm_router.waiting import wait_until
from tests.kube_faults import FaultProxy, eventually


def a_slice(*endpoints: dict[str, Any], family: str = "IPv4", **fields: Any) -> dict[str, Any]:
    return {
        "addressType": family,
        "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}],
        "endpoints": list(endpoints),
    } | fields


def an_endpoint(uid: str, address: str, **conditions: bool | None) -> dict[str, Any]:
    return {
        "addresses": [address],
        "targetRef": {"kind": "Pod", "name": uid, "uid": uid},
        "conditions": conditions,
    }


@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        ({}, State.READY),
        ({"ready": None}, State.READY),
        ({"ready": True, "serving": True, "terminating": False}, State.READY),
        ({"ready": False, "serving": False}, State.NOT_READY),
        ({"ready": False, "serving": True, "terminating": True}, State.DRAINING),
        ({"ready": False, "serving": False, "terminating": True}, State.NOT_READY),
        # publishNotReadyAddresses: ready although it terminates.
        ({"ready": True, "serving": True, "terminating": True}, State.DRAINING),
    ],
)
def test_conditions(conditions: dict[str, bool | None], state: State) -> None:
    (found,) = endpoints_of(a_slice(an_endpoint("u", "10.0.0.1", **conditions)), "http")
    assert found.state is state
    assert found.backend == Backend("u", "10.0.0.1", 8000)


@pytest.mark.parametrize(
    ("ports", "wanted", "port"),
    [
        ([{"name": "http", "port": 8000}], "http", 8000),
        ([{"name": "grpc", "port": 9000}, {"name": "http", "port": 8000}], "http", 8000),
        ([{"name": "grpc", "port": 9000}], "http", None),
        ([{"name": "grpc", "port": 9000}, {"name": "http", "port": 8000}], "8000", 8000),
        ([{"name": "http", "port": 8000}], "80", 8000),  # the Service's own number
        ([{"name": "a", "port": 9000}, {"name": "b", "port": 8000}], "80", None),
        ([{"name": "http", "port": 53, "protocol": "UDP"}], "http", None),
        (None, "8000", 8000),  # all ports
        ([{"name": ""}], "http", None),
    ],
)
def test_ports(ports: list[dict[str, Any]] | None, wanted: str, port: int | None) -> None:
    assert port_of(ports, wanted) == port


def test_both_families_and_a_move_between_slices_are_one_backend() -> None:
    slices = [
        a_slice(an_endpoint("a", "fd00::1"), an_endpoint("b", "fd00::2"), family="IPv6"),
        a_slice(an_endpoint("a", "10.0.0.1")),
        a_slice(an_endpoint("c", "10.0.0.3", ready=False)),
        a_slice(an_endpoint("c", "10.0.0.3", ready=True)),
        a_slice(an_endpoint("d", "x.example"), family="FQDN"),
    ]
    found = merged(each for one in slices for each in endpoints_of(one, "http"))
    assert usable(found) == (
        Backend("a", "10.0.0.1", 8000),
        Backend("b", "fd00::2", 8000),
        Backend("c", "10.0.0.3", 8000),
    )


def test_those_that_terminate_get_requests_only_where_none_is_ready() -> None:
    draining = an_endpoint("a", "10.0.0.1", ready=False, serving=True, terminating=True)
    starting = an_endpoint("b", "10.0.0.2", ready=False)
    found = endpoints_of(a_slice(draining, starting), "http")
    assert [each.name for each in usable(found)] == ["a"]
    found += endpoints_of(a_slice(an_endpoint("c", "10.0.0.3")), "http")
    assert [each.name for each in usable(found)] == ["c"]


def test_an_endpoint_without_a_pod_goes_by_its_address() -> None:
    (found,) = endpoints_of(a_slice({"addresses": ["fd00::1"]}, family="IPv6"), "http")
    assert found.backend == Backend("fd00--1", "fd00::1", 8000)


conditions = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from([True, False, None]) for name in
                  ("ready", "serving", "terminating")}
)  # fmt: skip


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["IPv4", "IPv6"]), conditions),
        max_size=12,
    ),
    st.randoms(),
)
def test_the_order_of_slices_says_nothing(entries: list[Any], random: Any) -> None:
    def backends(entries: list[Any]) -> tuple[Backend, ...]:
        slices = [
            a_slice(
                an_endpoint(uid, f"10.0.0.{ord(uid)}" if family == "IPv4" else f"fd00::{uid}", **c),
                family=family,
            )
            for uid, family, c in entries
        ]
        return usable(merged(each for one in slices for each in endpoints_of(one, "http")))

    first = backends(entries)
    shuffled = entries.copy()
    random.shuffle(shuffled)
    assert backends(shuffled) == first
    assert len({each.name for each in first}) == len(first)


# -- a real API server --------------------------------------------------------------------------


class Service:
    """A Service with a selector; the cluster's own controller makes its slices."""

    def __init__(self, server: ApiServer, namespace: str) -> None:
        self.kubectl = server.kubectl.within(namespace)
        self.namespace = namespace
        self.node = f"node-{namespace}"
        """Pods on unknown nodes get no endpoint."""
        self.kubectl.apply(
            {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self.node}},
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "model"},
                "spec": {
                    "selector": {"app": "model"},
                    "ports": [{"name": "http", "port": 80, "targetPort": 8000}],
                },
            },
        )

    def pod(self, name: str, address: str) -> str:
        """A ready pod; its uid."""
        self.kubectl.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "labels": {"app": "model"}},
                "spec": {"containers": [{"name": "main", "image": "none"}], "nodeName": self.node},
            }
        )
        self.status(name, podIP=address, podIPs=[{"ip": address}])
        self.ready(name, True)
        uid: str = self.kubectl.get("pod", name)["metadata"]["uid"]
        return uid

    def ready(self, name: str, is_ready: bool) -> None:
        condition = {"type": "Ready", "status": "True" if is_ready else "False"}
        self.status(name, phase="Running", conditions=[condition])

    def status(self, name: str, **status: Any) -> None:
        patch = json.dumps({"status": status})
        self.kubectl("patch", "pod", name, "--subresource=status", "--type=merge", "-p", patch)

    def terminate(self, name: str) -> None:
        """Begin: without a kubelet it goes on until `gone`."""
        self.kubectl("delete", "pod", name, "--wait=false", "--grace-period=300")

    def gone(self, *names: str) -> None:
        self.kubectl("delete", "pod", *names, "--grace-period=0", "--force")


@pytest.fixture
def service(api_server: ApiServer, namespace: str) -> Iterator[Service]:
    service = Service(api_server, namespace)
    yield service
    service.kubectl("delete", "node", service.node)


@pytest.fixture
def proxy(api_server: ApiServer) -> Iterator[FaultProxy]:
    with FaultProxy(api_server) as proxy:
        yield proxy


class Followed:
    """What a discovery has told."""

    def __init__(self) -> None:
        self.lists: list[tuple[Backend, ...]] = []
        self.metrics = RouterMetrics()
        self.ended: list[Any] = []

    @property
    def names(self) -> set[str]:
        return {each.name for each in self.lists[-1]}

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"hbm_router_{name}", labels)


@pytest.fixture
async def follow(
    proxy: FaultProxy, service: Service
) -> AsyncIterator[Callable[..., Awaitable[Followed]]]:
    discoveries = []

    async def start(port: str = "http", config: KubeConfig | None = None) -> Followed:
        followed = Followed()
        discovery = EndpointSliceDiscovery(
            config or proxy.config(),
            "model",
            service.namespace,
            port,
            followed.metrics,
            followed.ended.append,
        )
        discoveries.append(discovery)
        await discovery.start(followed.lists.append)
        return followed

    yield start
    for discovery in discoveries:
        await discovery.stop()


@pytest.mark.apiserver
async def test_pods_come_drain_and_go(
    service: Service, follow: Callable[..., Awaitable[Followed]]
) -> None:
    first = service.pod("a", "10.9.0.1")
    followed = await follow()
    await eventually(lambda: followed.names == {first}, "the first pod")
    assert followed.lists[-1] == (Backend(first, "10.9.0.1", 8000),)
    second = service.pod("b", "10.9.0.2")
    await eventually(lambda: followed.names == {first, second}, "the second pod")
    service.terminate("a")
    await eventually(lambda: followed.names == {second}, "no requests to a pod that ends")
    assert followed.sample("endpoints", state="draining") == 1
    service.ready("b", False)
    await eventually(lambda: followed.names == {first}, "the one that still serves")
    service.ready("b", True)
    await eventually(lambda: followed.names == {second}, "the ready one")
    service.gone("a", "b")
    await eventually(lambda: followed.lists[-1] == (), "none")
    # The same name and address, another pod.
    third = service.pod("a", "10.9.0.1")
    await eventually(lambda: followed.names == {third}, "the successor")
    assert third != first


@pytest.mark.apiserver
async def test_an_outage_leaves_the_list(
    service: Service,
    follow: Callable[..., Awaitable[Followed]],
    proxy: FaultProxy,
    api_server: ApiServer,
) -> None:
    first = service.pod("a", "10.9.0.1")
    followed = await follow()
    await eventually(lambda: followed.names == {first}, "the first pod")
    told = len(followed.lists)
    api_server.kill_api()
    try:
        await eventually(lambda: followed.sample("discovery_failures_total"), "the outage")
        assert followed.sample("discovery_up") == 0
        assert len(followed.lists) == told
    finally:
        api_server.restore_api()
    second = service.pod("b", "10.9.0.2")
    await eventually(lambda: followed.names == {first, second}, "news after the outage")
    proxy.answer(410, method="WATCH")
    proxy.answer(500, path="endpointslices", times=3)
    proxy.cut()
    third = service.pod("c", "10.9.0.3")
    await eventually(lambda: followed.names == {first, second, third}, "news after faults")
    assert not any(len(each) == 0 for each in followed.lists[1:])
    assert followed.ended == []


@pytest.mark.apiserver
async def test_it_starts_without_the_api_and_without_rights(
    service: Service,
    follow: Callable[..., Awaitable[Followed]],
    proxy: FaultProxy,
    api_server: ApiServer,
) -> None:
    uid = service.pod("a", "10.9.0.1")
    token = api_server.token("default", service.namespace)
    followed = await follow(config=proxy.config(token=token))
    assert followed.lists == [()]
    assert proxy.count("GET", "endpointslices", code=403) > 0
    service.kubectl("create", "role", "r", "--verb=list,watch", "--resource=endpointslices")
    account = f"--serviceaccount={service.namespace}:default"
    service.kubectl("create", "rolebinding", "r", "--role=r", account)
    await eventually(lambda: followed.names == {uid}, "the pod")


@pytest.mark.apiserver
def test_the_router_as_a_process(
    service: Service,
    proxy: FaultProxy,
    api_server: ApiServer,
    router_process: Callable[..., Any],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uid = service.pod("a", "10.9.0.1")
    service.kubectl("create", "role", "r", "--verb=list,watch", "--resource=endpointslices")
    account = f"--serviceaccount={service.namespace}:default"
    service.kubectl("create", "rolebinding", "r", "--role=r", account)
    token_dir = proxy.token_dir(
        tmp_path / "token", api_server.token("default", service.namespace), service.namespace
    )
    for name, value in proxy.environment().items():
        monkeypatch.setenv(name, value)
    router = router_process(
        *("--service", "model", "--service-port", "80", "--kube-token-dir", str(token_dir)),
        *("--port", "0", "--redis-url-file", str(tmp_path / "url")),
    )

    def names() -> list[str]:
        url = f"http://127.0.0.1:{router.admin_port}/v1/nodes"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return [node["name"] for node in json.load(answer)["nodes"]]

    wait_until(lambda: names() == [uid], "the backend")
    router.terminate()
    assert router.popen.wait(30) == 0


def test_outside_of_a_cluster_a_service_is_refused() -> None:
    with pytest.raises(ValueError, match="KUBERNETES_SERVICE_HOST is not set"):
        RouterSettings(service="model")
