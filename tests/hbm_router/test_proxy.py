"""What goes through the proxy, and how it comes out on the other side."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.hbm_router.backend import Received, response
from tests.hbm_router.http_client import connection, get, post


async def test_passes_a_request_and_its_answer(backends, router):
    (a,) = await backends("a")
    server = await router([a])
    async with connection(server.port) as client:
        reply = await client.ask(post(user="u1", body=b"x" * 1000), "POST")
    assert reply.status == 200
    assert reply.json() == {"node": "a", "target": "/v1/rank", "bytes": 1000}
    assert reply.header("x-hbm-node") == "a"
    assert reply.header("x-hbm-decision") == "kv=unknown;why=hash;source=none"
    assert a.requests[0].header("x-user-id") == "u1"
    assert a.requests[0].header("x-forwarded-for") == "127.0.0.1"
    assert a.requests[0].header("host") == "router"


async def test_one_user_keeps_one_node_and_users_spread(backends, router):
    nodes = await backends("a", "b", "c")
    server = await router(nodes)
    homes: dict[str, set[str]] = {}
    async with connection(server.port) as client:
        for _ in range(3):
            for user in range(30):
                reply = await client.ask(post(user=f"u{user}"), "POST")
                homes.setdefault(f"u{user}", set()).add(str(reply.header("x-hbm-node")))
    assert all(len(seen) == 1 for seen in homes.values())
    assert set.union(*homes.values()) == {"a", "b", "c"}


async def test_connections_are_kept_alive_on_both_sides(backends, router):
    (a,) = await backends("a")
    server = await router([a])
    async with connection(server.port) as client:
        for _ in range(20):
            assert (await client.ask(post(), "POST")).status == 200
    assert a.connections == 1


async def test_request_id_is_made_when_absent_and_passed_when_given(backends, router):
    (a,) = await backends("a")
    server = await router([a])
    async with connection(server.port) as client:
        made = await client.ask(get())
        given = await client.ask(get(x_request_id="mine-1"))
        empty = await client.ask(get(x_request_id=""))
    assert made.header("x-request-id") == a.requests[0].header("x-request-id")
    assert len(str(made.header("x-request-id"))) == 32
    assert given.header("x-request-id") == a.requests[1].header("x-request-id") == "mine-1"
    assert len(str(a.requests[2].header("x-request-id"))) == 32
    assert empty.header("x-request-id") == a.requests[2].header("x-request-id")


async def test_trace_context_passes_unchanged(backends, router):
    (a,) = await backends("a")
    server = await router([a])
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    async with connection(server.port) as client:
        await client.ask(get(traceparent=trace, tracestate="x=1"))
    assert a.requests[0].header("traceparent") == trace
    assert a.requests[0].header("tracestate") == "x=1"


async def test_hop_by_hop_fields_end_here(backends, router):
    (a,) = await backends("a")

    async def answer(request, reader, writer):
        writer.write(
            response(b"ok", connection="keep-alive, x-inner", keep_alive="timeout=5").replace(
                b"\r\n\r\n", b"\r\nx-inner: 1\r\nx-outer: 2\r\nx-hbm-node: fake\r\n\r\n"
            )
        )

    a.answer = answer
    server = await router([a])
    async with connection(server.port) as client:
        reply = await client.ask(
            get(
                connection="keep-alive, X-Secret",
                x_secret="1",
                keep_alive="300",
                te="trailers",
                proxy_authorization="Basic x",
                x_kept="2",
                x_forwarded_for="10.0.0.9",
            )
        )
    seen = {name for name, _ in a.requests[0].headers}
    assert not seen & {"connection", "x-secret", "keep-alive", "te", "proxy-authorization"}
    assert a.requests[0].header("x-kept") == "2"
    assert a.requests[0].header("x-forwarded-for") == "10.0.0.9, 127.0.0.1"
    assert reply.header("x-inner") is None
    assert reply.header("keep-alive") is None
    assert reply.header("x-outer") == "2"
    assert reply.header("x-hbm-node") == "a"


@pytest.mark.parametrize("sizes", [[1], [5, 7, 11], [70_000, 1, 70_000]])
async def test_chunked_request_bodies(backends, router, sizes):
    (a,) = await backends("a")
    server = await router([a])
    async with connection(server.port) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for size in sizes:
            client.send(b"%x;ext=1\r\n%b\r\n" % (size, b"z" * size))
        client.send(b"0\r\nX-Trailer: t\r\n\r\n")
        reply = await client.reply("POST")
        assert reply.json()["bytes"] == sum(sizes)
        assert a.requests[0].body == b"z" * sum(sizes)
        assert (await client.ask(get())).status == 200, "the connection goes on"


async def test_chunked_and_unframed_answers(backends, router):
    (a,) = await backends("a")

    async def answer(request: Received, reader, writer):
        if request.target == "/chunked":
            writer.write(response(b"", length=False, transfer_encoding="chunked"))
            for part in (b"one", b"two" * 10_000):
                writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            writer.write(b"0\r\nx-trailer: t\r\n\r\n")
            return None
        writer.write(response(b"until the end", length=False))
        return True

    a.answer = answer
    server = await router([a])
    async with connection(server.port) as client:
        chunked = await client.ask(get("/chunked"))
        unframed = await client.ask(get("/unframed"))
        old = await client.ask(b"GET /unframed HTTP/1.0\r\n\r\n")
        assert await client.closed() == b"", "HTTP/1.0 without a length ends with the connection"
    assert chunked.body == b"one" + b"two" * 10_000
    assert unframed.body == old.body == b"until the end"
    assert unframed.header("transfer-encoding") == "chunked"
    assert old.header("transfer-encoding") is None


async def test_head_and_bodyless_answers(backends, router):
    (a,) = await backends("a")
    server = await router([a])

    async with connection(server.port) as client:
        reply = await client.ask(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n", "HEAD")
        assert (reply.status, reply.body) == (200, b"")
        assert int(str(reply.header("content-length"))) > 0

        async def answer(request, reader, writer):
            writer.write(response(b"", status=int(request.target[1:]), length=False))

        a.answer = answer
        for status in (204, 304):
            reply = await client.ask(get(f"/{status}"))
            assert (reply.status, reply.body) == (status, b"")
            assert reply.header("transfer-encoding") is None


async def test_expect_continue_is_answered_before_the_body(backends, router):
    (a,) = await backends("a")
    server = await router([a])
    async with connection(server.port) as client:
        client.send(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
        )
        async with asyncio.timeout(10):
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"body")
        reply = await client.reply("POST")
    assert reply.json()["bytes"] == 4
    assert a.requests[0].header("expect") is None


async def test_expect_continue_is_refused_without_reading_the_body(backends, router):
    server = await router(await backends("a"), max_body_bytes=10)
    async with connection(server.port) as client:
        client.send(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\nExpect: 100-continue\r\n\r\n"
        )
        reply = await client.reply("POST")
        assert (reply.status, reply.interim) == (413, [])
        client.abort()
    async with connection(server.port) as client:
        reply = await client.ask(post(expect="a-miracle"), "POST")
        assert reply.status == 417


async def test_interim_answers_pass(backends, router):
    (a,) = await backends("a")

    async def answer(request, reader, writer):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n")
        writer.write(response(b"done"))

    a.answer = answer
    server = await router([a])
    async with connection(server.port) as client:
        reply = await client.ask(get())
        assert (reply.status, reply.interim, reply.body) == (200, [103], b"done")
        assert (await client.ask(get())).body == b"done"


async def test_offers_to_switch_protocols_are_ignored(backends, router):
    """Java's HTTP client offers h2c with every request, bodies included."""
    (a,) = await backends("a")
    server = await router([a])
    async with connection(server.port) as client:
        for _ in range(2):
            reply = await client.ask(
                post(
                    body=b"abcdef",
                    connection="Upgrade, HTTP2-Settings",
                    upgrade="h2c",
                    http2_settings="AAEAAEAAAAIAAAAB",
                    x_forwarded_for="10.1.1.1",
                ),
                "POST",
            )
            assert reply.json()["bytes"] == 6
    assert a.requests[0].header("upgrade") is None
    assert a.requests[1].header("x-forwarded-for") == "10.1.1.1, 127.0.0.1"


async def test_upgrade_split_over_packets(backends, router):
    (a,) = await backends("a")
    server = await router([a])
    data = post(body=b"abcdef", connection="Upgrade", upgrade="websocket") + get("/next")
    async with connection(server.port) as client:
        for at in range(0, len(data), 7):
            client.send(data[at : at + 7])
            await asyncio.sleep(0)
        assert (await client.reply("POST")).json()["bytes"] == 6
        assert (await client.reply()).json()["target"] == "/next"


async def test_pipelined_requests_are_answered_in_order(backends, router):
    nodes = await backends("a", "b", "c")
    slow = asyncio.Event()

    async def answer(request: Received, reader, writer):
        if request.target == "/0":
            await slow.wait()
        writer.write(response(request.target.encode()))

    for node in nodes:
        node.answer = answer
    server = await router(nodes)
    async with connection(server.port) as client:
        client.send(b"".join(post(f"/{n}", user=f"u{n}", body=b"b" * n) for n in range(40)))
        asyncio.get_running_loop().call_later(0.05, slow.set)
        for n in range(40):
            assert (await client.reply("POST")).body == f"/{n}".encode()


async def test_too_many_pipelined_requests_close_the_connection(backends, router):
    (a,) = await backends("a")
    server = await router([a])
    async with connection(server.port) as client:
        client.send(get() * 1000)
        answered = 0
        reply = await client.reply()
        while reply.header("connection") != "close":
            assert reply.status == 200
            answered += 1
            reply = await client.reply()
        assert await client.closed() == b""
    assert 60 <= answered <= 70


async def test_old_and_closing_clients(backends, router):
    server = await router(await backends("a"))
    async with connection(server.port) as client:
        reply = await client.ask(b"GET / HTTP/1.0\r\n\r\n")
        assert reply.status == 200
        assert reply.header("connection") == "close"
        assert await client.closed() == b""
    async with connection(server.port) as client:
        for _ in range(3):
            reply = await client.ask(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert reply.header("connection") == "keep-alive"
    async with connection(server.port) as client:
        client.send(get(connection="close") + b"whatever comes after")
        assert (await client.reply()).status == 200
        assert await client.closed() == b""


async def test_absolute_targets(backends, router):
    (a,) = await backends("a")
    server = await router([a])
    async with connection(server.port) as client:
        await client.ask(b"GET http://h.example:81/p/q?r=1 HTTP/1.1\r\nHost: other\r\n\r\n")
        await client.ask(b"OPTIONS * HTTP/1.1\r\nHost: other\r\n\r\n", "OPTIONS")
    assert a.requests[0].target == "/p/q?r=1"
    assert a.requests[0].header("host") == "h.example:81"
    assert a.requests[1].target == "*"


async def test_answer_before_the_body_is_complete(backends, router):
    (a,) = await backends("a")
    server = await router([a])
    head = asyncio.Event()

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response(b"too much", status=413))
        head.set()
        await reader.read(-1)
        writer.close()

    raw = await asyncio.start_server(serve, "127.0.0.1", 0)
    a.port = raw.sockets[0].getsockname()[1]
    server = await router([a])
    async with connection(server.port) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nabc")
        await head.wait()
        reply = await client.reply("POST")
        assert (reply.status, reply.body) == (413, b"too much")
        assert reply.header("connection") == "close"
        client.send(b"x" * 1000)
        assert await client.closed() == b""
    raw.close()


async def test_bytes_beyond_an_answer_void_the_connection(backends, router):
    (a,) = await backends("a")

    async def answer(request, reader, writer):
        writer.write(response(b"mine") + response(b"smuggled"))

    a.answer = answer
    server = await router([a])
    async with connection(server.port) as client:
        for _ in range(5):
            assert (await client.ask(get())).body == b"mine"
    assert a.connections == 5


async def test_learns_lengths_and_checks_itself(backends, router):
    (a,) = await backends("a")

    async def answer(request: Received, reader, writer):
        reused = "0" if len(a.requests) == 1 else "128"
        writer.write(
            response(
                b"ok",
                x_hbm_history_tokens="130",
                x_hbm_candidates="20",
                x_hbm_kv_reused_tokens=reused,
                x_hbm_service_ms="2.5",
                x_hbm_queue_ms="0.5",
            )
        )

    a.answer = answer
    server = await router([a])
    async with connection(server.port) as client:
        decisions = []
        for _ in range(2):
            reply = await client.ask(post(user="u"), "POST")
            decisions.append(reply.header("x-hbm-decision"))
        reply = await client.ask(post(user="other"), "POST")
        decisions.append(reply.header("x-hbm-decision"))
        reply = await client.ask(post(user="other", x_hbm_history_tokens="99"), "POST")
        decisions.append(reply.header("x-hbm-decision"))
    assert [str(text).split("source=")[1] for text in decisions] == [
        "none",
        "memory",
        "regression",
        "header",
    ]
    assert "kv=hit" in str(decisions[1])
    (family,) = (
        each for each in server.metrics.registry.collect() if each.name == "hbm_router_kv_predicted"
    )
    outcomes = {sample.labels["outcome"]: sample.value for sample in family.samples}
    assert outcomes == {"tp": 2, "fp": 0, "fn": 1, "tn": 1}


async def test_anonymous_requests_have_no_residency(backends, router):
    server = await router(await backends("a", "b"))
    async with connection(server.port) as client:
        for data in (get(), post(user="x" * 257)):
            reply = await client.ask(data)
            assert reply.status == 200
            assert "kv=none" in str(reply.header("x-hbm-decision"))
    assert len(server.plane.memory) == 0


async def test_backend_status_and_body_pass_unchanged(backends, router):
    (a,) = await backends("a")

    async def answer(request, reader, writer):
        writer.write(
            response(json.dumps({"error": "busy"}).encode(), status=503, retry_after="3", x_y="z")
        )

    a.answer = answer
    server = await router([a])
    async with connection(server.port) as client:
        reply = await client.ask(post(), "POST")
        assert (reply.status, reply.header("retry-after")) == (503, "3")
        assert reply.json() == {"error": "busy"}
        assert (await client.ask(post(), "POST")).status == 503, "busy is not broken"
