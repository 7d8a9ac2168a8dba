"""A watch against a real API server: whatever happens to its streams, no event is missing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hbm_e2e.api_server import ApiServer
from hbm_kube.client import KubeClient, WatchEvent
from hbm_kube.errors import Forbidden, KubeError, NotFound, Unavailable
from hbm_kube.resources import CONFIGMAPS, Resource

from tests.hbm_kube.conftest import config_map
from tests.kube_faults import FaultProxy, eventually

pytestmark = pytest.mark.apiserver


class Watched:
    """What a watch has said so far, and the objects that follow from it."""

    def __init__(self, kube: KubeClient, namespace: str, **selection: Any) -> None:
        self.events: list[WatchEvent] = []
        self.objects: dict[str, dict[str, Any]] = {}
        """By uid."""
        self.failures: list[KubeError] = []
        self._kube, self._namespace, self._selection = kube, namespace, selection

    async def follow(self) -> None:
        events = self._kube.watch(
            CONFIGMAPS, self._namespace, on_failure=self.failures.append, **self._selection
        )
        async with aclosing(events):
            async for event in events:
                self.take(event)

    def take(self, event: WatchEvent) -> None:
        self.events.append(event)
        if event.type in ("ADDED", "MODIFIED", "DELETED"):
            uid = event.object["metadata"]["uid"]
            known = uid in self.objects
            assert known == (event.type != "ADDED"), event
            if event.type == "DELETED":
                del self.objects[uid]
            else:
                self.objects[uid] = event.object

    def data(self) -> dict[str, dict[str, str]]:
        """Content by name."""
        return {o["metadata"]["name"]: o.get("data", {}) for o in self.objects.values()}

    def types(self) -> list[str]:
        return [event.type for event in self.events if event.type != "BOOKMARK"]

    def count(self, kind: str) -> int:
        return sum(event.type == kind for event in self.events)

    async def until(self, **data: dict[str, str]) -> None:
        await eventually(lambda: self.data() == data, f"{data}; it is {self.data()}")


@pytest.fixture
async def follow(kube: KubeClient, namespace: str) -> AsyncIterator[Callable[..., Watched]]:
    """Starts watches of ConfigMaps without the one that every namespace has."""
    tasks = []

    def start(**selection: Any) -> Watched:
        selection.setdefault("field_selector", "metadata.name!=kube-root-ca.crt")
        watched = Watched(kube, namespace, **selection)
        tasks.append(asyncio.create_task(watched.follow()))
        return watched

    yield start
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, asyncio.CancelledError), outcome


async def test_what_is_there_then_what_happens(
    kube: KubeClient, namespace: str, follow: Callable[..., Watched]
) -> None:
    await kube.create(CONFIGMAPS, config_map("a", namespace, x="1"), namespace)
    watched = follow()
    await eventually(lambda: "SYNCED" in watched.types(), "the first list")
    assert watched.types() == ["ADDED", "SYNCED"]
    await kube.create(CONFIGMAPS, config_map("b", namespace), namespace)
    await kube.patch(CONFIGMAPS, "a", namespace, {"data": {"x": "2"}})
    await kube.delete(CONFIGMAPS, "b", namespace)
    await watched.until(a={"x": "2"})
    await eventually(lambda: watched.types()[-1] == "DELETED", "the deletion")
    assert watched.types() == ["ADDED", "SYNCED", "ADDED", "MODIFIED", "DELETED"]
    assert all("managedFields" not in o["metadata"] for o in watched.objects.values())


async def test_one_object_by_name(
    kube: KubeClient, namespace: str, follow: Callable[..., Watched]
) -> None:
    watched = follow(name="b")
    await eventually(lambda: "SYNCED" in watched.types(), "the first list")
    await kube.create(CONFIGMAPS, config_map("a", namespace), namespace)
    await kube.create(CONFIGMAPS, config_map("b", namespace, x="1"), namespace)
    await watched.until(b={"x": "1"})
    assert watched.types() == ["SYNCED", "ADDED"]


async def test_an_object_larger_than_any_buffer(
    kube: KubeClient, namespace: str, follow: Callable[..., Watched]
) -> None:
    watched = follow()
    await eventually(lambda: "SYNCED" in watched.types(), "the first list")
    await kube.create(CONFIGMAPS, config_map("a", namespace, x="y" * 900_000), namespace)
    await eventually(lambda: "a" in watched.data(), "the object")
    assert len(watched.data()["a"]["x"]) == 900_000


async def test_a_cut_stream_goes_on_where_it_was(
    kube: KubeClient, proxy: FaultProxy, namespace: str, follow: Callable[..., Watched]
) -> None:
    watched = follow()
    await eventually(lambda: watched.count("BOOKMARK") == 1, "the stream")
    for number in range(3):
        proxy.silence()
        await kube.apply(
            CONFIGMAPS, config_map("a", namespace, x=str(number)), field_manager="tester"
        )
        proxy.cut()
        proxy.speak()
        await watched.until(a={"x": str(number)})
    assert watched.types() == ["SYNCED", "ADDED", "MODIFIED", "MODIFIED"]
    assert {type(failure) for failure in watched.failures} == {Unavailable}
    assert proxy.count("GET", "configmaps$") == 1


async def test_a_silent_stream_is_left(
    kube: KubeClient, proxy: FaultProxy, namespace: str, follow: Callable[..., Watched]
) -> None:
    watched = follow(inactivity_s=0.5)
    await eventually(lambda: watched.count("BOOKMARK") == 1, "the stream")
    proxy.silence()
    await kube.create(CONFIGMAPS, config_map("a", namespace), namespace)
    await eventually(lambda: watched.failures, "the silence to be noticed")
    assert "silent for 0.5 s" in str(watched.failures[0])
    proxy.speak()
    await watched.until(a={})
    assert watched.types().count("ADDED") == 1


@pytest.mark.parametrize("code", [401, 403, 429, 500, 503])
async def test_a_refused_watch_goes_on(
    kube: KubeClient, proxy: FaultProxy, namespace: str, follow: Callable[..., Watched], code: int
) -> None:
    proxy.answer(code, method="WATCH", times=2)
    watched = follow()
    await eventually(lambda: watched.count("BOOKMARK") == 1, "the stream")
    assert [failure.code for failure in watched.failures] == [code, code]
    await kube.create(CONFIGMAPS, config_map("a", namespace), namespace)
    await watched.until(a={})


async def test_a_list_that_fails_is_tried_again(
    kube: KubeClient, proxy: FaultProxy, namespace: str, follow: Callable[..., Watched]
) -> None:
    proxy.answer(403, method="GET", times=2)
    await kube.create(CONFIGMAPS, config_map("a", namespace), namespace)
    watched = follow()
    await watched.until(a={})
    assert [type(failure) for failure in watched.failures] == [Forbidden, Forbidden]


async def test_a_version_that_is_gone_means_another_list(
    kube: KubeClient, proxy: FaultProxy, namespace: str, follow: Callable[..., Watched]
) -> None:
    await kube.create(CONFIGMAPS, config_map("stays", namespace), namespace)
    await kube.create(CONFIGMAPS, config_map("goes", namespace), namespace)
    old = await kube.create(CONFIGMAPS, config_map("again", namespace), namespace)
    watched = follow()
    await eventually(lambda: watched.count("BOOKMARK") == 1, "the stream")
    proxy.silence()
    await kube.delete(CONFIGMAPS, "goes", namespace)
    await kube.delete(CONFIGMAPS, "again", namespace)
    new = await kube.create(CONFIGMAPS, config_map("again", namespace, x="1"), namespace)
    proxy.answer(410, method="WATCH")
    proxy.cut()
    proxy.speak()
    await watched.until(stays={}, again={"x": "1"})
    await eventually(lambda: watched.count("SYNCED") == 2, "the end of the second list")
    deleted = [event.object for event in watched.events if event.type == "DELETED"]
    assert {o["metadata"]["name"] for o in deleted} == {"goes", "again"}
    assert old["metadata"]["uid"] in {o["metadata"]["uid"] for o in deleted}
    assert new["metadata"]["uid"] in watched.objects
    # "stays" is known and unchanged: not a word about it.
    assert watched.types() == [*["ADDED"] * 3, "SYNCED", "DELETED", "DELETED", "ADDED", "SYNCED"]
    # That a version is old is no fault.
    assert [failure.code for failure in watched.failures] == [0]


async def test_a_resource_that_is_not_there_yet(kube: KubeClient, namespace: str) -> None:
    failures: list[KubeError] = []

    def end_after_two(error: KubeError) -> None:
        failures.append(error)
        if len(failures) == 2:
            raise error

    events = kube.watch(
        Resource("hbm-partition.test", "v1", "wonders", "Wonder"), on_failure=end_after_two
    )
    with pytest.raises(NotFound):
        await anext(events)
    assert len(failures) == 2


async def test_compaction_and_a_restart_of_the_api_server(tmp_path: Path) -> None:
    """Against a server of its own: the version is really gone, from etcd and from every cache."""
    with ApiServer(tmp_path / "server", controllers=False) as server, FaultProxy(server) as proxy:
        async with KubeClient(proxy.config(), backoff_s=0.05) as kube:
            watched = Watched(kube, "default", field_selector="metadata.name!=kube-root-ca.crt")
            following = asyncio.create_task(watched.follow())
            await kube.create(CONFIGMAPS, config_map("goes", "default"), "default")
            await watched.until(goes={})
            proxy.silence()
            await kube.delete(CONFIGMAPS, "goes", "default")
            made = await kube.create(CONFIGMAPS, config_map("a", "default", x="1"), "default")
            etcd = server.control_plane.endpoints.etcd_url
            body = {"revision": made["metadata"]["resourceVersion"], "physical": True}
            async with aiohttp.request("POST", f"{etcd}/v3/kv/compaction", json=body) as answer:
                assert answer.status == 200, await answer.text()
            server.kill_api()
            proxy.cut()
            proxy.speak()
            await eventually(lambda: watched.failures, "the outage to be noticed")
            server.restore_api()
            await watched.until(a={"x": "1"})
            await kube.patch(CONFIGMAPS, "a", "default", {"data": {"x": "2"}})
            await watched.until(a={"x": "2"})
            following.cancel()
            with pytest.raises(asyncio.CancelledError):
                await following
    assert watched.count("SYNCED") == proxy.count("GET", "configmaps$", code=200) == 2
