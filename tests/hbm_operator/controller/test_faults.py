"""Every request of the controller fails in every way, and the state still converges."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.hbm_operator.controller.conftest import (
    ControllerProcess,
    Tenant,
    condition,
    current,
    eventually,
)
from tests.kube_faults import FaultProxy

pytestmark = pytest.mark.apiserver
Start = Callable[..., ControllerProcess]

FAULTS: dict[str, Callable[[FaultProxy, str, str], None]] = {
    "409": lambda proxy, method, path: proxy.answer(409, times=2, method=method, path=path),
    "429": lambda proxy, method, path: proxy.answer(
        429, times=2, method=method, path=path, retry_after_s=0.2
    ),
    "500": lambda proxy, method, path: proxy.answer(500, times=2, method=method, path=path),
    "timeout": lambda proxy, method, path: proxy.hang(method=method, path=path),
    "cut-before": lambda proxy, method, path: proxy.drop(times=2, method=method, path=path),
    "cut-after": lambda proxy, method, path: proxy.drop(method=method, path=path, after=True),
}
REQUESTS = {
    "list": ("GET", r"/(pods|hbmpartitions|hbmpolicies)(\?|$)"),
    "namespaces": ("GET", "/namespaces"),
    "partition": ("PATCH", r"/hbmpartitions/[^/?]+(\?|$)"),
    "conditions": ("PATCH", "/hbmpartitions/.*/status"),
    "removal": ("DELETE", "/hbmpartitions/"),
    "policy-status": ("PATCH", "/hbmpolicies/.*/status"),
    "role-binding": ("PATCH", "/rolebindings/"),
    "events": ("POST", "/events"),
    "watch": ("WATCH", ""),
}


async def whole_story(tenant: Tenant) -> None:
    """Two pods, a policy, an answer, a renewal, an end: all that the controller writes."""
    await tenant.policy()
    for name in ("ranker-0", "ranker-1"):
        await tenant.pod(name)
    for name in ("ranker-0", "ranker-1"):
        await tenant.until(name, lambda p: p["spec"].get("policyRef"), "a governed partition")
        await tenant.acknowledge(name)
        await tenant.until(name, lambda p: current(p, "Ready")[0] == "True", f"{name} ready")
    await tenant.until_policy("p", lambda s: s["applied"] == 2, "the counts")
    await tenant.delete_pod("ranker-0")
    pod = await tenant.pod("ranker-0")
    await tenant.until(
        "ranker-0",
        lambda p: p["spec"]["podRef"]["uid"] == pod["metadata"]["uid"],
        "the new pod's partition",
    )
    await tenant.acknowledge("ranker-0")
    await tenant.until("ranker-0", lambda p: current(p, "Ready")[0] == "True", "ready again")
    await tenant.phase("ranker-1", "Succeeded")
    await tenant.gone("ranker-1")


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
async def test_it_converges_whatever_fails(
    tenant: Tenant,
    controller: Start,
    proxy: FaultProxy,
    fault: Callable[[FaultProxy, str, str], None],
) -> None:
    for method, path in REQUESTS.values():
        fault(proxy, method, path)
    process = controller("--request-timeout-s", "1", "--resync-s", "5", through=proxy)
    await whole_story(tenant)
    hit = {name for name, request in REQUESTS.items() if proxy.count(*request)}
    assert hit == REQUESTS.keys(), "each kind of request was made, and so met its fault"
    assert process.running


async def test_it_converges_while_watches_are_cut_again_and_again(
    tenant: Tenant, controller: Start, proxy: FaultProxy
) -> None:
    controller(through=proxy)
    ended = asyncio.Event()

    async def cut() -> None:
        while not ended.is_set():
            await asyncio.to_thread(proxy.cut)
            await asyncio.sleep(0.3)

    cutting = asyncio.create_task(cut())
    try:
        await whole_story(tenant)
    finally:
        ended.set()
        await cutting


async def test_a_resync_finds_what_silent_watches_kept_back(
    tenant: Tenant, controller: Start, proxy: FaultProxy
) -> None:
    controller("--resync-s", "1", through=proxy)
    proxy.silence()
    await whole_story(tenant)


async def test_a_watch_that_lags_behind_is_not_taken_for_silent_sidecars(
    tenant: Tenant, controller: Start, proxy: FaultProxy
) -> None:
    """Its sidecar reports all the time; the controller hears nothing of it, and looks."""
    flags = ("--stale-s", "2", "--sweep-s", "0.2", "--resync-s", "3600", "--stall-s", "3600")
    process = controller(*flags, through=proxy)
    await tenant.policy()
    await tenant.pod("ranker-0")
    await tenant.until("ranker-0", lambda p: p["spec"].get("policyRef"), "a governed partition")
    await tenant.acknowledge("ranker-0")
    await tenant.until("ranker-0", lambda p: current(p, "Ready")[0] == "True", "ready")
    proxy.silence()

    async def looked_again() -> bool:
        await tenant.acknowledge("ranker-0")
        found = await tenant.partition("ranker-0")
        assert found is not None
        assert condition(found, "Degraded") == ("False", "AsExpected")
        return proxy.count("GET", "/hbmpartitions/ranker-0") >= 2

    await eventually(looked_again, "the controller to look at the object itself")
    assert process.metric("hbm_operator_partitions_degraded", reason="SidecarSilent") == 0


async def test_probes_fail_while_watches_are_silent_and_the_server_answers(
    tenant: Tenant, controller: Start, proxy: FaultProxy
) -> None:
    process = controller("--stall-s", "2", "--resync-s", "3600", through=proxy)
    proxy.silence()
    await eventually(lambda: process.get("/healthz")[0] == 503, "the probe to fail")
    status, body = process.get("/readyz")
    assert status == 503
    assert "hbmpolicies" in body
    # The server is away: a new process would not help, but nobody should count on this one.
    proxy.answer(500, times=1_000, method="GET", path="/hbmpolicies")
    assert process.get("/healthz")[0] == 200
    assert process.get("/readyz")[0] == 503


async def test_pods_that_come_back_200_times_while_the_controller_is_killed(
    tenant: Tenant, controller: Start
) -> None:
    """StatefulSet pods under kill -9: each of the newest pods has its own partition in the end,
    and none of the older ones is left."""
    process = controller("--resync-s", "5")
    await tenant.policy()
    replicas, rounds = 10, 20
    for number in range(replicas):
        await tenant.pod(f"ranker-{number}")
    uids: dict[str, str] = {}
    for turn in range(rounds):
        if turn % 4 == 1:
            process.kill()
        for number in range(replicas):
            name = f"ranker-{number}"
            await tenant.delete_pod(name)
            uids[name] = (await tenant.pod(name))["metadata"]["uid"]
        if turn % 4 == 1:
            process.start()
    for name, uid in uids.items():
        await tenant.until(
            name, lambda p, uid=uid: p["spec"]["podRef"]["uid"] == uid, f"{name}'s own partition"
        )
        await tenant.acknowledge(name)
    for name in uids:
        await tenant.until(name, lambda p: current(p, "Ready")[0] == "True", f"{name} ready")
    status = await tenant.until_policy("p", lambda s: s["applied"] == replicas, "the counts")
    assert (status["selected"], condition(status, "Ready")[0]) == (replicas, "True")
