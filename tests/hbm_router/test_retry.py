"""When a request is sent a second time, and when it must not be."""

from __future__ import annotations

import asyncio

import pytest

from tests.hbm_router.backend import Backend, Received, response
from tests.hbm_router.http_client import connection, get, post
from tests.hbm_router.waiting import free_port


def closes(node: Backend, *, when: str, sends: bytes = b"") -> None:
    """Makes a backend close the connection instead of answering: on its first request, or once
    the connection has served one."""

    async def answer(request: Received, reader, writer):
        served = sum(1 for other in node.requests if other.connection == request.connection) - 1
        if (when == "fresh") == (served == 0):
            writer.write(sends)
            return True
        return await node._echo(request, reader, writer)

    node.answer = answer


def home(server, user: str) -> str:
    from hbm_pool.contracts.identity import user_hash

    return str(server.plane.fleet.names[server.plane.fleet.ring.home(user_hash(user))])


@pytest.fixture
async def pair(backends, router):
    """Two backends and a user at home on the first."""
    nodes = {node.name: node for node in await backends("a", "b")}

    async def start(**settings):
        server = await router(list(nodes.values()), **settings)
        user = next(f"u{n}" for n in range(100) if home(server, f"u{n}") == "a")
        return server, nodes["a"], nodes["b"], user

    return start


async def test_a_kept_alive_connection_closed_under_us_is_tried_elsewhere(pair):
    server, a, _b, user = await pair()
    closes(a, when="reused")
    async with connection(server.port) as client:
        assert (await client.ask(post("/any", user=user), "POST")).json()["node"] == "a"
        reply = await client.ask(post("/any", user=user, body=b"x" * 5000), "POST")
    assert reply.json() == {"node": "b", "target": "/any", "bytes": 5000}
    assert str(reply.header("x-hbm-decision")).endswith("retry=1")
    assert server.metrics.retries.labels("closed")._value.get() == 1


async def test_a_single_backend_is_tried_again_on_a_new_connection(backends, router):
    (a,) = await backends("a")
    closes(a, when="reused")
    server = await router([a])
    async with connection(server.port) as client:
        for _ in range(4):
            assert (await client.ask(post("/any"), "POST")).json()["node"] == "a"


@pytest.mark.parametrize(("path", "retried"), [("/v1/rank", True), ("/v2/models/m/infer", True),
                                               ("/v1/orders", False)])  # fmt: skip
async def test_a_post_on_a_new_connection_is_sent_twice_only_where_that_is_harmless(
    pair, path, retried
):
    server, a, b, user = await pair()
    closes(a, when="fresh")
    async with connection(server.port) as client:
        reply = await client.ask(post(path, user=user), "POST")
    if retried:
        assert (reply.status, reply.json()["node"]) == (200, "b")
    else:
        assert (reply.status, reply.json()["error"]["reason"]) == (502, "backend_closed")
        assert b.requests == []
    assert len(a.requests) == 1


async def test_idempotent_methods_are_sent_twice(pair):
    server, a, _, user = await pair()
    closes(a, when="fresh")
    async with connection(server.port) as client:
        reply = await client.ask(get("/v1/orders", x_user_id=user))
    assert (reply.status, reply.json()["node"]) == (200, "b")


@pytest.mark.parametrize("sends", [b"H", b"HTTP/1.1 200 OK\r\nContent-", b"HTTP/1.1 103 X\r\n\r\n"])
async def test_nothing_is_sent_twice_after_the_first_byte_of_an_answer(pair, sends):
    server, a, b, user = await pair()
    closes(a, when="fresh", sends=sends)
    async with connection(server.port) as client:
        reply = await client.ask(post(user=user), "POST")
    assert (reply.status, reply.json()["error"]["reason"]) == (502, "backend_closed")
    assert b.requests == []


async def test_bodies_too_long_to_keep_are_not_sent_twice(pair):
    server, a, _b, user = await pair(replay_bytes=1000)
    closes(a, when="fresh")
    async with connection(server.port) as client:
        reply = await client.ask(post(user=user, body=b"x" * 1001), "POST")
        assert reply.status == 502
    async with connection(server.port) as client:
        reply = await client.ask(post(user=user, body=b"x" * 1000), "POST")
        assert (reply.status, reply.json()) == (
            200,
            {"node": "b", "target": "/v1/rank", "bytes": 1000},
        )


async def test_at_most_one_second_try(pair):
    server, a, b, user = await pair()
    closes(a, when="fresh")
    closes(b, when="fresh")
    async with connection(server.port) as client:
        reply = await client.ask(post(user=user), "POST")
    assert reply.status == 502
    assert len(a.requests) == len(b.requests) == 1


async def test_second_tries_are_budgeted(pair):
    server, a, _b, user = await pair(retry_ratio=0.1, outlier_failures=10_000)
    closes(a, when="fresh")
    statuses = []
    async with connection(server.port) as client:
        for _ in range(300):
            statuses.append((await client.ask(post(user=user), "POST")).status)
    retried = statuses.count(200)
    assert statuses[:100] == [200] * 100, "one node's requests in flight find room"
    assert 125 <= retried <= 135, "then a tenth of the requests"
    assert server.metrics.retries_denied._value.get() == 300 - retried


async def test_no_budget_no_second_try(pair):
    server, a, b, user = await pair(retry_ratio=0)
    closes(a, when="fresh")
    async with connection(server.port) as client:
        assert (await client.ask(post(user=user), "POST")).status == 502
    assert b.requests == []


async def test_a_refused_connection_is_tried_elsewhere_and_remembered(backends, router):
    (b,) = await backends("b")
    gone = Backend("a")
    gone.port = free_port()
    server = await router([gone, b])
    users = [f"u{n}" for n in range(40) if home(server, f"u{n}") == "a"]
    async with connection(server.port) as client:
        for user in users:
            assert (await client.ask(post("/v1/orders", user=user), "POST")).status == 200
    assert len(users) > 5
    assert server.metrics.retries.labels("connect")._value.get() == 1, (
        "after the first refusal nobody is sent there"
    )


async def test_requests_that_wait_for_a_connection_keep_their_bodies(backends, router):
    """The body arrives while the first connection is still being refused."""
    (b,) = await backends("b")
    gone = Backend("a")
    gone.port = free_port()
    server = await router([gone, b], replay_bytes=100_000)
    user = next(f"u{n}" for n in range(100) if home(server, f"u{n}") == "a")
    async with connection(server.port) as client:
        data = post(user=user, body=b"q" * 90_000)
        for at in range(0, len(data), 9_000):
            client.send(data[at : at + 9_000])
            await asyncio.sleep(0)
        assert (await client.reply("POST")).json()["bytes"] == 90_000
    assert b.requests[0].body == b"q" * 90_000


async def test_backend_errors_eject_for_a_while_but_busy_does_not(backends, router):
    nodes = {node.name: node for node in await backends("a", "b", "c")}
    status = 500

    async def fails(request, reader, writer):
        writer.write(response(b"", status=status))

    nodes["a"].answer = fails
    server = await router(list(nodes.values()), outlier_failures=3)
    user = next(f"u{n}" for n in range(100) if home(server, f"u{n}") == "a")
    async with connection(server.port) as client:
        statuses = [(await client.ask(post(user=user), "POST")).status for _ in range(10)]
        assert statuses == [500] * 3 + [200] * 7
        node = server.plane.fleet.by_name["a"]
        node.ejected_until_s = 0.0
        server.plane.fleet.health_version += 1
        status = 503
        statuses = [(await client.ask(post(user=user), "POST")).status for _ in range(10)]
        assert statuses == [503] * 10
