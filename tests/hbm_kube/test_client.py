"""Verbs, errors and retries against a real API server, through a proxy that misbehaves."""

from __future__ import annotations

import asyncio
import time

import pytest
from hbm_e2e.api_server import ApiServer
from hbm_kube.client import PAGE, KubeClient
from hbm_kube.config import KubeConfig
from hbm_kube.errors import (
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    KubeError,
    NotFound,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)
from hbm_kube.resources import CONFIGMAPS, NAMESPACES, PODS, SERVICE_ACCOUNTS, Resource

from tests.hbm_kube.conftest import config_map
from tests.kube_faults import FaultProxy, eventually

pytestmark = pytest.mark.apiserver


async def test_life_of_an_object(kube: KubeClient, namespace: str) -> None:
    made = await kube.create(CONFIGMAPS, config_map("a", namespace, x="1"), namespace)
    uid = made["metadata"]["uid"]
    applied = await kube.apply(
        CONFIGMAPS,
        {"metadata": {"name": "a", "namespace": namespace}, "data": {"y": "2"}},
        field_manager="tester",
    )
    assert applied["data"] == {"x": "1", "y": "2"}
    # What an owner leaves out of its next apply is taken away.
    applied = await kube.apply(
        CONFIGMAPS,
        {"metadata": {"name": "a", "namespace": namespace}, "data": {"z": "3"}},
        field_manager="tester",
    )
    assert applied["data"] == {"x": "1", "z": "3"}
    merged = await kube.patch(CONFIGMAPS, "a", namespace, {"data": {"x": None}})
    assert merged["data"] == {"z": "3"}
    test_then_replace = [
        {"op": "test", "path": "/data/z", "value": "3"},
        {"op": "replace", "path": "/data/z", "value": "4"},
    ]
    await kube.patch(CONFIGMAPS, "a", namespace, test_then_replace)
    assert (await kube.get(CONFIGMAPS, "a", namespace))["data"] == {"z": "4"}
    with pytest.raises(Invalid):
        await kube.patch(CONFIGMAPS, "a", namespace, test_then_replace)
    with pytest.raises(Conflict, match="UID in the precondition"):
        await kube.delete(CONFIGMAPS, "a", namespace, uid="another")
    await kube.delete(CONFIGMAPS, "a", namespace, uid=uid)
    with pytest.raises(NotFound, match='configmaps "a" not found') as caught:
        await kube.get(CONFIGMAPS, "a", namespace)
    assert (caught.value.code, caught.value.reason) == (404, "NotFound")


async def test_what_the_server_refuses_has_a_kind(kube: KubeClient, namespace: str) -> None:
    await kube.create(CONFIGMAPS, config_map("a", namespace), namespace)
    with pytest.raises(Conflict) as exists:
        await kube.create(CONFIGMAPS, config_map("a", namespace), namespace)
    assert exists.value.reason == "AlreadyExists"
    with pytest.raises(Invalid, match="Invalid_Name"):
        await kube.create(CONFIGMAPS, config_map("Invalid_Name", namespace), namespace)
    with pytest.raises(NotFound):
        await kube.list(Resource("hbm-partition.test", "v1", "wonders", "Wonder"), namespace)
    await kube.apply(CONFIGMAPS, config_map("a", namespace, x="1"), field_manager="one")
    with pytest.raises(Conflict, match="conflict"):
        await kube.apply(
            CONFIGMAPS, config_map("a", namespace, x="2"), field_manager="two", force=False
        )


async def test_a_service_account_may_do_nothing_unless_told(
    kube: KubeClient, proxy: FaultProxy, namespace: str, api_server: ApiServer
) -> None:
    token = api_server.token("default", namespace)
    async with KubeClient(proxy.config(token=token)) as own:
        with pytest.raises(Forbidden, match="cannot list resource"):
            await own.list(CONFIGMAPS, namespace)
    async with KubeClient(proxy.config(token="no.such.token")) as unknown:
        with pytest.raises(Unauthorized):
            await unknown.list(CONFIGMAPS, namespace)


async def test_token_request(kube: KubeClient, namespace: str) -> None:
    answer = await kube.create(
        SERVICE_ACCOUNTS,
        {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}},
        namespace,
        name="default",
        subresource="token",
    )
    assert answer["status"]["token"].count(".") == 2


async def test_lists_are_paged_and_selected(kube: KubeClient, namespace: str) -> None:
    many = PAGE + 3

    async def make(number: int) -> None:
        body = config_map(f"c{number}", namespace)
        body["metadata"]["labels"] = {"odd": str(number % 2)}
        await kube.create(CONFIGMAPS, body, namespace)

    await asyncio.gather(*(make(number) for number in range(many)))
    found = await kube.list(CONFIGMAPS, namespace, label_selector="odd")
    assert len(found.items) == many
    assert int(found.resource_version) > 0
    first = found.items[0]
    assert (first["apiVersion"], first["kind"]) == ("v1", "ConfigMap")
    assert "managedFields" not in first["metadata"]
    odd = await kube.list(CONFIGMAPS, namespace, label_selector="odd=1")
    assert len(odd.items) == many // 2
    one = await kube.list(CONFIGMAPS, namespace, field_selector="metadata.name=c7")
    assert [item["metadata"]["name"] for item in one.items] == ["c7"]
    everywhere = await kube.list(NAMESPACES)
    assert namespace in {item["metadata"]["name"] for item in everywhere.items}


async def test_a_list_whose_next_page_is_gone_starts_again(
    kube: KubeClient, proxy: FaultProxy, namespace: str
) -> None:
    await asyncio.gather(
        *(
            kube.create(CONFIGMAPS, config_map(f"c{number}", namespace), namespace)
            for number in range(PAGE + 1)
        )
    )
    proxy.answer(410, path="continue=")
    found = await kube.list(CONFIGMAPS, namespace)
    assert len({item["metadata"]["uid"] for item in found.items}) == len(found.items) > PAGE
    proxy.answer(410, path="continue=", times=100)
    with pytest.raises(Gone):
        await kube.list(CONFIGMAPS, namespace)


@pytest.mark.parametrize("code", [429, 500, 503, 504])
async def test_a_passing_failure_is_not_seen(
    kube: KubeClient, proxy: FaultProxy, namespace: str, requests: list[tuple[str, int]], code: int
) -> None:
    proxy.answer(code, times=2)
    await kube.apply(CONFIGMAPS, config_map("a", namespace, x="1"), field_manager="tester")
    assert requests == [("apply", code), ("apply", code), ("apply", 201)]


async def test_retry_after_is_obeyed(
    kube: KubeClient, proxy: FaultProxy, namespace: str, requests: list[tuple[str, int]]
) -> None:
    proxy.answer(429, retry_after_s=1)
    began = time.monotonic()
    await kube.list(CONFIGMAPS, namespace)
    assert time.monotonic() - began >= 1.0
    assert requests == [("list", 429), ("list", 200)]


async def test_what_does_not_pass_is_said_after_a_bounded_number_of_tries(
    kube: KubeClient, proxy: FaultProxy, namespace: str, requests: list[tuple[str, int]]
) -> None:
    proxy.answer(429, times=100)
    with pytest.raises(TooManyRequests, match="injected 429"):
        await kube.list(CONFIGMAPS, namespace)
    assert requests == [("list", 429)] * 5


@pytest.mark.parametrize("code", [400, 403, 404, 409, 422])
async def test_a_refusal_is_not_asked_for_twice(
    kube: KubeClient, proxy: FaultProxy, namespace: str, requests: list[tuple[str, int]], code: int
) -> None:
    proxy.answer(code, times=100)
    with pytest.raises(KubeError) as caught:
        await kube.apply(CONFIGMAPS, config_map("a", namespace), field_manager="tester")
    assert caught.value.code == code
    assert requests == [("apply", code)]


async def test_a_lost_answer_is_asked_for_again_where_that_is_harmless(
    kube: KubeClient, proxy: FaultProxy, namespace: str
) -> None:
    proxy.drop(after=True, times=2)
    applied = await kube.apply(
        CONFIGMAPS, config_map("a", namespace, x="1"), field_manager="tester"
    )
    assert applied["data"] == {"x": "1"}


async def test_a_lost_answer_to_a_creation_is_said(
    kube: KubeClient, proxy: FaultProxy, namespace: str
) -> None:
    proxy.drop(after=True, method="POST")
    with pytest.raises(Unavailable):
        await kube.create(CONFIGMAPS, config_map("a", namespace), namespace)
    assert proxy.count("POST") == 1
    assert (await kube.get(CONFIGMAPS, "a", namespace))["metadata"]["name"] == "a"


async def test_a_creation_that_was_not_done_is_sent_again(
    kube: KubeClient, proxy: FaultProxy, namespace: str
) -> None:
    proxy.answer(429, method="POST", times=3)
    await kube.create(CONFIGMAPS, config_map("a", namespace), namespace)


async def test_an_answer_that_does_not_come_is_given_up(proxy: FaultProxy, namespace: str) -> None:
    proxy.hang(times=2)
    async with KubeClient(proxy.config(), timeout_s=0.5, attempts=2, backoff_s=0.01) as kube:
        with pytest.raises(Unavailable, match=r"no answer within 0\.5 s"):
            await kube.get(PODS, "x", namespace)
        with pytest.raises(NotFound):
            await kube.get(PODS, "x", namespace)


async def test_no_server_at_all(api_server: ApiServer) -> None:
    config = KubeConfig(server="https://127.0.0.1:9", ca_file=api_server.ca_certificate)
    async with KubeClient(config, attempts=2, backoff_s=0.01) as kube:
        with pytest.raises(Unavailable, match="no connection"):
            await kube.list(PODS)


async def test_requests_in_flight_are_bounded(proxy: FaultProxy, namespace: str) -> None:
    proxy.hang(times=2, path="configmaps/h")
    async with KubeClient(proxy.config(), concurrency=2, timeout_s=1.0, attempts=1) as kube:
        hanging = [
            asyncio.create_task(kube.get(CONFIGMAPS, f"h{number}", namespace)) for number in (1, 2)
        ]
        await eventually(lambda: proxy.count(path="configmaps/h") == 2, "both to be sent")
        third = asyncio.create_task(kube.get(CONFIGMAPS, "free", namespace))
        outcomes = await asyncio.gather(*hanging, third, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable, NotFound]
    # It was sent only after one of the two before it had ended.
    assert [seen.path.rpartition("/")[2] for seen in proxy.seen][-1] == "free"


async def test_an_outage_of_the_api_server_is_said_and_ends(
    kube: KubeClient, proxy: FaultProxy, namespace: str, api_server: ApiServer
) -> None:
    api_server.kill_api()
    try:
        with pytest.raises(Unavailable):
            await kube.list(CONFIGMAPS, namespace)
    finally:
        api_server.restore_api()  # from this thread: what starts a process must outlive it
    await kube.apply(CONFIGMAPS, config_map("a", namespace), field_manager="tester")
