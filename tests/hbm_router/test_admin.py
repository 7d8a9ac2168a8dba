"""The admin port: probes that survive load, and explanations that agree with what happens."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from hbm_pool.contracts.identity import user_hash
from prometheus_client.parser import text_string_to_metric_families

from tests.hbm_router.backend import Backend
from tests.hbm_router.http_client import connection, post
from tests.hbm_router.waiting import free_port, until


@pytest.fixture
async def ask():
    async with httpx.AsyncClient(timeout=20) as client:

        async def get(server, path: str) -> httpx.Response:
            return await client.get(f"http://127.0.0.1:{server.admin_port}{path}")

        yield get


async def test_probes(backends, router, ask) -> None:
    server = await router(await backends("a"))
    for path in ("/livez", "/healthz", "/readyz"):
        assert (await ask(server, path)).status_code == 200
    server.lifecycle.draining = True
    assert (await ask(server, "/readyz")).status_code == 503
    assert (await ask(server, "/livez")).status_code == 200
    server.lifecycle.draining = False
    gone = Backend("gone")
    gone.port = free_port()
    lonely = await router([gone], probe_interval_s=0.02)
    await until(lambda: lonely.plane.fleet.nodes[0].unreachable, "the check to fail")
    answer = await ask(lonely, "/readyz")
    assert (answer.status_code, answer.text) == (503, "no healthy backend\n")


async def test_probes_answer_while_the_data_path_is_stuck(backends, router) -> None:
    server = await router(await backends("a"))

    def blocking() -> list[int]:
        with httpx.Client(timeout=20) as client:
            base = f"http://127.0.0.1:{server.admin_port}"
            return [
                client.get(base + path).status_code
                for path in ("/livez", "/readyz", "/metrics", "/v1/nodes")
            ]

    # The data path's loop waits in this very call: only the admin thread can answer.
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor() as pool:
        statuses = pool.submit(blocking).result(timeout=30)
    assert statuses == [200, 200, 200, 504]
    server.lifecycle.turned_s = server.plane.now_s() - 100
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert pool.submit(blocking).result(timeout=30)[0] == 503


async def test_the_explanation_agrees_with_the_decision(
    backends, router, ask, redis_server, publisher
) -> None:
    nodes = await backends("a", "b", "c")
    server = await router(nodes, redis_url=redis_server.url, poll_ms=20)
    users = {user_hash(f"u{n}"): 1600 for n in range(20)}
    publisher.heartbeat("a", users, queue_ms=2.0)
    publisher.heartbeat("b", {}, queue_ms=1.0)
    publisher.heartbeat("c", {}, queue_ms=9.0)
    async with connection(server.port) as client:
        await client.ask(post(), "POST")
        for user in range(20):
            route = (
                await ask(server, f"/debug/route?user=u{user}&history_tokens=2000&candidates=50")
            ).json()
            if user == 0:
                await until(
                    lambda: server.plane._offered is not None or server.plane.chooser.informed,
                    "the digests",
                )
                await client.ask(post(), "POST")
                continue
            best = min(route["nodes"], key=lambda line: line["cost_ms"])
            reply = await client.ask(
                post(user=f"u{user}", x_hbm_history_tokens="2000", x_hbm_candidates="50"), "POST"
            )
            decision = dict(
                part.split("=") for part in str(reply.header("x-hbm-decision")).split(";")
            )
            assert reply.header("x-hbm-node") == best["name"] == "a"
            assert (decision["kv"], decision["source"]) == ("hit", "header")
            assert float(decision["est_ms"]) == pytest.approx(best["cost_ms"], abs=0.06)
            assert best["cached_tokens"] == 1600
    assert all(node.inflight == 0 for node in server.plane.fleet.nodes)
    listed = (await ask(server, "/v1/nodes")).json()
    assert listed["informed"] is True
    assert listed["nodes"][0]["state"]["queue_ms"] == 2.0
    assert listed["nodes"][0]["digest_users"] == 20


@pytest.mark.parametrize("query", ["history_tokens=-1", "history_tokens=x", "user=" + "u" * 300])
async def test_bad_queries_get_422(backends, router, ask, query) -> None:
    server = await router(await backends("a"))
    answer = await ask(server, f"/debug/route?{query}")
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][1] in query


async def test_metrics_count_what_happened(backends, router, ask) -> None:
    nodes = await backends("a", "b")
    server = await router(nodes)
    async with connection(server.port) as client:
        for user in range(10):
            await client.ask(post(user=f"u{user}"), "POST")
    async with connection(server.port) as client:
        await client.ask(b"nonsense\r\n\r\n")

    async def samples() -> dict[tuple[str, str], float]:
        text = (await ask(server, "/metrics")).text
        return {
            (sample.name, json.dumps(sample.labels, sort_keys=True)): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    seen = await samples()
    assert seen["hbm_router_requests_total", '{"code": "200"}'] == 10
    assert seen["hbm_router_requests_total", '{"code": "400"}'] == 1
    assert seen["hbm_router_errors_total", '{"reason": "bad_request"}'] == 1
    assert seen["hbm_router_decision_duration_seconds_count", "{}"] == 10
    routed = [value for (name, _), value in seen.items() if name == "hbm_router_decisions_total"]
    assert sum(routed) == 10
    assert ("hbm_router_node_healthy", '{"node": "b"}') in seen
    server.plane.set_backends(tuple(node.backend for node in server.plane.fleet.nodes[:1]))
    assert not [key for key in await samples() if '"node": "b"' in key[1]], "its series are gone"


async def test_user_names_are_no_labels(backends, router, ask) -> None:
    server = await router(await backends("a"))
    async with connection(server.port) as client:
        await client.ask(post(user="very-special-user"), "POST")
    assert "very-special-user" not in (await ask(server, "/metrics")).text
    await asyncio.sleep(0)
