"""Bad clients, bad backends: the right error, and no worker stuck."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest
from hbm_router.config import RouterSettings
from hbm_router.server import RouterServer
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hbm_router.backend import Backend, Received, response
from tests.hbm_router.http_client import Client, connection, get, post
from tests.hbm_router.waiting import free_port, until

HOST = b"Host: x\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"bad header\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"a : b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"a: b\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"a: b\x00c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\n" + HOST + b"\n", 400),
        (b"GET nothing HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET ftp://x/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT x:80 HTTP/1.1\r\n" + HOST + b"\r\n", 405),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + HOST + b"x-request-id: " + b"i" * 300 + b"\r\n\r\n", 400),
        # What request smuggling is made of.
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
         b"0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n"
         b"0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
         400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: +3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3, 3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked, identity\r\n\r\nabc", 400),
        (b"POST / HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc", 400),
        (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n",
         400),
    ],
)  # fmt: skip
async def test_malformed_requests_get_an_answer_and_nothing_reaches_a_backend(
    backends, router, data, status
):
    (a,) = await backends("a")
    server = await router([a])
    async with connection(server.port) as client:
        client.send(data)
        reply = await client.reply()
        assert reply.status == status, reply.body
        assert reply.header("connection") == "close"
        assert set(reply.json()["error"]) == {"field", "message", "reason"}
        assert await client.closed() == b""
    assert a.requests == []
    async with connection(server.port) as client:
        assert (await client.ask(get())).status == 200


async def test_below_v2_an_error_is_one_string(backends, router):
    """The Open Inference Protocol's form, as the model server answers there."""
    (a,) = await backends("a")
    server = await router([a], max_body_bytes=4)
    async with connection(server.port) as client:
        reply = await client.ask(post("/v2/models/m/infer", body=b"12345"))
    assert reply.status == 413
    assert reply.json() == {"error": "body: the body has 5 bytes; at most 4 are allowed"}
    async with connection(server.port) as client:
        reply = await client.ask(post("/v1/rank", body=b"12345"))
    assert reply.json()["error"]["field"] == "body"
    assert reply.json()["error"]["reason"] == "body_too_large"


@pytest.mark.parametrize("step", [1, 1000, 10**6])
async def test_huge_heads_get_431(backends, router, step):
    server = await router(await backends("a"), max_head_bytes=4096)
    data = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"x-a: " + b"b" * 10_000
    async with connection(server.port) as client:
        for at in range(0, len(data) if step > 1 else 5000, step):
            client.send(data[at : at + step])
            if step > 1:
                await asyncio.sleep(0)
        assert (await client.reply()).status == 431
        await client.closed()


async def test_many_headers_get_431(backends, router):
    server = await router(await backends("a"), max_headers=50)
    fields = b"".join(b"x-%d: 1\r\n" % n for n in range(60))
    async with connection(server.port) as client:
        reply = await client.ask(b"GET / HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n")
        assert reply.status == 431


async def test_bodies_over_the_limit_get_413(backends, router):
    (a,) = await backends("a")
    server = await router([a], max_body_bytes=1000)
    async with connection(server.port) as client:
        assert (await client.ask(post(body=b"x" * 1001), "POST")).status == 413
    async with connection(server.port) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.send(b"1f4\r\n" + b"x" * 500 + b"\r\n")
        await until(lambda: a.connections, "the request to begin")
        client.send(b"1f5\r\n" + b"x" * 501 + b"\r\n")
        assert (await client.reply("POST")).status == 413
    assert a.requests == []


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: x\r\nA:",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    ],
)
async def test_slow_clients_time_out(backends, router, data):
    (a,) = await backends("a")
    server = await router([a], head_timeout_s=0.3, body_timeout_s=0.3)
    async with connection(server.port) as client:
        client.send(data)
        reply = await client.reply()
        assert (reply.status, reply.json()["error"]["reason"]) == (408, "request_timeout")
        await client.closed()
    await until(lambda: server.plane.fleet.inflight == 0, "the request to be given up")


async def test_dripping_clients_time_out(backends, router):
    """Slowloris: always another byte before the silence is too long."""
    server = await router(
        await backends("a"), head_timeout_s=0.3, body_timeout_s=5, request_timeout_s=0.3
    )
    for data in (
        b"GET / HTTP/1.1\r\n" + b"x-a: 1\r\n" * 10_000,
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n" + b"x" * 90_000,
    ):
        async with connection(server.port) as client:
            reply = asyncio.create_task(client.reply())
            sent = data.index(b"\r\n") if data[:1] == b"G" else 60
            client.send(data[:sent])
            while not reply.done():
                client.send(data[sent : sent + 1])
                sent += 1
                await asyncio.sleep(0.005)
            assert (await reply).status == 408


async def test_idle_connections_are_closed(backends, router):
    server = await router(await backends("a"), keep_alive_s=0.3, head_timeout_s=0.3)
    async with connection(server.port) as silent, connection(server.port) as client:
        assert (await client.ask(get())).status == 200
        assert await client.closed() == b""
        assert await silent.closed() == b""


async def test_a_client_that_reads_nothing_is_dropped(backends, router):
    (a,) = await backends("a")

    async def answer(request, reader, writer):
        writer.write(response(b"x" * (64 << 20)))

    a.answer = answer
    server = await router([a], write_stall_s=0.2)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
    writer.transport.pause_reading()
    writer.write(get())
    await until(lambda: server.plane.fleet.inflight == 1, "the request to begin")
    await until(lambda: server.plane.fleet.inflight == 0, "the request to be given up")
    writer.transport.abort()


@pytest.mark.parametrize(
    "garbage",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nab",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x-a: " + b"b" * 300_000,
        b"HTTP/1.1 200 OK\r\n" + b"x-a: b\r\n" * 2000 + b"\r\n",
        bytes(range(256)),
    ],
)
async def test_garbage_from_a_backend_is_502(backends, router, garbage):
    (a,) = await backends("a")

    async def answer(request: Received, reader, writer):
        writer.write(garbage)
        await writer.drain()

    a.answer = answer
    server = await router([a])
    async with connection(server.port) as client:
        for _ in range(2):
            reply = await client.ask(post(), "POST")
            assert reply.status == 502
            assert reply.json()["error"]["reason"] in ("backend_garbage", "backend_head_too_large")
            assert reply.header("x-hbm-node") == "a"


async def test_a_broken_answer_is_seen_as_broken(backends, router):
    (a,) = await backends("a")

    async def answer(request: Received, reader, writer):
        if request.target == "/length":
            writer.write(response(b"x" * 100)[:-50])
        else:
            writer.write(response(b"", length=False, transfer_encoding="chunked"))
            writer.write(b"5\r\nhello\r\nnonsense")
        await writer.drain()
        return True

    a.answer = answer
    server = await router([a])
    for path in ("/length", "/chunked"):
        async with connection(server.port) as client:
            client.send(get(path))
            sent = await client.closed()
            assert b" 200 " in sent
            assert not sent.endswith(b"0\r\n\r\n")
            assert sent.count(b"x" * 51) == 0


async def test_a_silent_backend_is_504(backends, router):
    (a,) = await backends("a")

    async def answer(request: Received, reader, writer):
        if request.target == "/half":
            writer.write(response(b"x" * 100)[:-50])
            await writer.drain()
        await asyncio.Event().wait()

    a.answer = answer
    server = await router([a], response_timeout_s=0.15)
    async with connection(server.port) as client:
        reply = await client.ask(post(), "POST")
        assert (reply.status, reply.json()["error"]["reason"]) == (504, "backend_timeout")
        client.send(get("/half"))
        sent = await client.closed()
        assert sent.endswith(b"x" * 50)
    assert server.plane.fleet.inflight == 0


async def test_an_absent_backend_is_502_and_no_backend_503(backends, router):
    absent = Backend("gone")
    absent.port = free_port()
    server = await router([absent])
    async with connection(server.port) as client:
        reply = await client.ask(post(), "POST")
        assert (reply.status, reply.json()["error"]["reason"]) == (502, "connect_failed")
        assert "gone" in reply.json()["error"]["message"]
        server.plane.set_backends(())
        reply = await client.ask(post(), "POST")
        assert (reply.status, reply.header("x-hbm-dropped-reason")) == (503, "no_backends")
        assert reply.header("retry-after") == "1"


async def test_a_backend_that_does_not_accept_is_504(backends, router, monkeypatch):
    """A listening socket whose queue is full takes no more connections."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        full = Backend("full")
        full.port = listener.getsockname()[1]
        blockers = []
        for _ in range(4):
            blocker = socket.socket()
            blocker.setblocking(False)
            blocker.connect_ex(("127.0.0.1", full.port))
            blockers.append(blocker)
        server = await router([full], connect_timeout_s=0.2)
        async with connection(server.port) as client:
            reply = await client.ask(post(), "POST")
        for blocker in blockers:
            blocker.close()
    assert (reply.status, reply.json()["error"]["reason"]) == (504, "connect_timeout")


async def test_too_many_requests_in_flight_are_shed(backends, router):
    (a,) = await backends("a")
    hold = asyncio.Event()

    async def answer(request, reader, writer):
        await hold.wait()
        writer.write(response())

    a.answer = answer
    server = await router([a], max_inflight=3)
    clients = [await Client.connect(server.port) for _ in range(3)]
    for client in clients:
        client.send(post())
    await until(lambda: server.plane.fleet.inflight == 3, "three requests in flight")
    async with connection(server.port) as client:
        reply = await client.ask(post(body=b"x" * 100), "POST")
        assert (reply.status, reply.header("x-hbm-dropped-reason")) == (503, "saturated")
        hold.set()
        for held in clients:
            assert (await held.reply("POST")).status == 200
            held.abort()
        assert (await client.ask(post(), "POST")).status == 200


async def test_too_many_connections_are_shed(backends, router):
    server = await router(await backends("a"), max_connections=2)
    async with connection(server.port) as one, connection(server.port) as two:
        assert (await one.ask(get())).status == (await two.ask(get())).status == 200
        async with connection(server.port) as three:
            reply = await three.reply()
            assert (reply.status, reply.header("x-hbm-dropped-reason")) == (503, "connections")


async def test_a_client_that_leaves_cancels_its_request(backends, router):
    (a,) = await backends("a")
    gone = asyncio.Event()

    async def answer(request, reader, writer):
        assert await reader.read() == b""
        gone.set()

    a.answer = answer
    server = await router([a])
    async with connection(server.port) as client:
        client.send(post())
        await until(lambda: a.requests, "the request to arrive")
    async with asyncio.timeout(10):
        await gone.wait()
    await until(lambda: server.plane.fleet.inflight == 0, "the request to be taken off")


async def test_thousands_of_requests_with_cancellations_leave_nothing_behind(backends, router):
    nodes = await backends("a", "b", "c")
    rng = random.Random(5)

    async def answer(request: Received, reader, writer):
        if request.target == "/slow":
            await asyncio.sleep(0.002)
        writer.write(response(b"y" * rng.randrange(5000)))
        return request.target == "/close"  # unannounced: the next request may still go there

    for node in nodes:
        node.answer = answer
    server = await router(nodes, retry_ratio=1)
    answered = cancelled = 0

    async def user(number: int) -> None:
        nonlocal answered, cancelled
        client = await Client.connect(server.port)
        for turn in range(75):
            path = rng.choice(["/fast", "/slow", "/close"])
            client.send(post(path, user=f"u{number}", body=b"b" * rng.randrange(3000)))
            if rng.random() < 0.2:
                await asyncio.sleep(rng.random() * 0.002)
                client.abort()
                cancelled += 1
                client = await Client.connect(server.port)
                continue
            assert (await client.reply("POST")).status == 200, turn
            answered += 1
        client.abort()

    await asyncio.gather(*(user(number) for number in range(40)))
    assert answered + cancelled == 3000
    await until(lambda: server.plane.fleet.inflight == 0, "all requests to be settled")
    for node in server.plane.fleet.nodes:
        assert (node.inflight, node.inflight_ms, node.before_ms) == (0, 0.0, 0.0)
    assert not server.plane.clients or await until(
        lambda: not server.plane.clients, "all connections to be forgotten"
    )


@pytest.fixture(scope="module")
def living() -> Iterator[tuple[asyncio.Runner, RouterServer]]:
    """One router with impatient limits for all examples, and the loop it lives on."""
    backend = Backend("a")
    with asyncio.Runner() as runner:

        async def start() -> RouterServer:
            await backend.start()
            server = RouterServer(
                RouterSettings(
                    backends=f"a=http://127.0.0.1:{backend.port}",
                    port=0,
                    probe_interval_s=0,
                    head_timeout_s=1,
                    body_timeout_s=1,
                    keep_alive_s=1,
                )
            )
            await server.start()
            return server

        server = runner.run(start())
        yield runner, server
        runner.run(server.stop())
        runner.run(backend.stop())


@settings(
    max_examples=60,
    deadline=None,
)
@given(
    data=st.one_of(
        st.binary(max_size=400),
        st.lists(
            st.sampled_from(
                [
                    b"GET / HTTP/1.1\r\n", b"POST /v1/rank HTTP/1.1\r\n", b"Host: x\r\n",
                    b"Content-Length: 3\r\n", b"Content-Length: 99999999999999999999\r\n",
                    b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
                    b"Connection: upgrade\r\nUpgrade: h2c\r\n", b"Expect: 100-continue\r\n",
                    b"\r\n", b"abc", b"3\r\nabc\r\n", b"0\r\n\r\n", b"\x00\xff",
                    b"X-User-ID: \xff\r\n",
                    b"X-HBM-History-Tokens: -1\r\n", b"X-HBM-Deadline-Ms: nan\r\n",
                    b"GET http://[::1/ HTTP/1.1\r\n", b"HTTP/1.1 200 OK\r\n",
                ]
            ),
            max_size=14,
        ).map(b"".join),
    ),
    split=st.integers(1, 400),
)  # fmt: skip
def test_any_bytes_are_survived(
    living: tuple[asyncio.Runner, RouterServer], data: bytes, split: int
) -> None:
    """Whatever a client sends, the answer is one of ours or the backend's, never a 500, and the
    next client is served."""
    runner, server = living

    async def scenario() -> None:
        async with connection(server.port) as client:
            for at in range(0, len(data), split):
                client.send(data[at : at + split])
            client.writer.write_eof()
            sent = await client.closed()
            for line in sent.split(b"\r\n"):
                if line.startswith(b"HTTP/1.1 "):
                    status = int(line.split()[1])
                    assert status in (100, 200) or 400 <= status < 500 or status in (501, 505)
        async with connection(server.port) as client:
            assert (await client.ask(get())).status == 200
        await until(lambda: server.plane.fleet.inflight == 0, "nothing in flight")

    runner.run(scenario())
