"""Whole processes die under load: Redis, a backend, the router itself."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import h11
import pytest

from tests.hbm_router.http_client import Client, connection, get, post
from tests.hbm_router.waiting import free_port, until, until_async

SCRIPT = Path(__file__).with_name("backend_process.py")


class BackendProcess:
    """A backend that can be killed and started again on the same port."""

    def __init__(self, name: str, delay_ms: float) -> None:
        self.name = name
        self.port = free_port()
        self._delay_ms = delay_ms
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, str(SCRIPT), self.name, str(self.port), str(self._delay_ms)]
        )

    async def serving(self) -> None:
        async def answers() -> bool:
            try:
                async with connection(self.port) as client:
                    return (await client.ask(get("/v2/health/ready"))).status == 200
            except OSError:
                return False

        await until_async(answers, f"backend {self.name}")

    def kill(self) -> None:
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()
            self._popen = None


@pytest.fixture
def backend_processes() -> Iterator[Callable[..., list[BackendProcess]]]:
    started: list[BackendProcess] = []

    def start(*names: str, delay_ms: float = 5) -> list[BackendProcess]:
        fresh = [BackendProcess(name, delay_ms) for name in names]
        for process in fresh:
            process.start()
        started.extend(fresh)
        return fresh

    yield start
    for process in started:
        process.kill()


def flag(nodes: list[BackendProcess]) -> str:
    return ",".join(f"{node.name}=http://127.0.0.1:{node.port}" for node in nodes)


class Load:
    """Clients that ask one request after the other until told to stop."""

    def __init__(self, port: int, clients: int = 12, path: str = "/v1/rank") -> None:
        self.port = port
        self.statuses: Counter[int] = Counter()
        self.nodes: Counter[str] = Counter()
        self.why: Counter[str] = Counter()
        self.lost = 0
        self.cut = 0
        self._path = path
        self._stop = False
        self._tasks = [asyncio.create_task(self._user(number)) for number in range(clients)]

    async def _user(self, number: int) -> None:
        client: Client | None = None
        turn = 0
        while not self._stop:
            turn += 1
            try:
                if client is None:
                    client = await Client.connect(self.port)
                user = f"u{(number * 31 + turn) % 40}"
                reply = await client.ask(post(self._path, user=user, body=b"b" * 800), "POST")
            except h11.RemoteProtocolError:
                self.cut += 1
                client = None
                continue
            except OSError:
                self.lost += 1
                client = None
                await asyncio.sleep(0.01)
                continue
            self.statuses[reply.status] += 1
            self.nodes[str(reply.header("x-hbm-node"))] += 1
            decision = str(reply.header("x-hbm-decision"))
            self.why[decision.split("why=")[1].split(";")[0] if "why=" in decision else ""] += 1
            if reply.header("connection") == "close":
                client.abort()
                client = None
        if client is not None:
            client.abort()

    @property
    def answered(self) -> int:
        return sum(self.statuses.values())

    async def more(self, count: int) -> None:
        goal = self.answered + count
        await until(lambda: self.answered >= goal, f"{count} more answers")

    async def stop(self) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)


def admin(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def cut_short(port: int) -> int:
    """Responses that had begun when their backend died, as the router counts them."""
    _, text = admin(port, "/metrics")
    name = "hbm_router_responses_cut_short_total"
    counted = [line for line in text.splitlines() if line.startswith(name)]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in counted))


async def not_ready(probe: Client) -> bool:
    return (await probe.ask(get("/readyz"))).status == 503


async def test_redis_dies_and_returns_under_load(backends, router, redis_server, publisher) -> None:
    nodes = await backends("a", "b")
    server = await router(
        nodes,
        redis_url=redis_server.url,
        poll_ms=20,
        redis_timeout_ms=100,
        fresh_s=0.2,
        half_life_s=0.2,
        expire_s=0.6,
    )

    async def beat() -> None:
        while True:
            if redis_server._answers():
                for name in "ab":
                    publisher.heartbeat(name, {})
            await asyncio.sleep(0.05)

    beating = asyncio.create_task(beat())
    load = Load(server.port)
    await until(lambda: load.why["home"] + load.why["cost"] > 50, "decisions by cost")
    redis_server.kill()
    await until(lambda: load.why["stale"] > 50, "decisions by hash")
    assert server.metrics.store_up._value.get() == 0
    redis_server.start()
    by_cost = load.why["home"] + load.why["cost"]
    await until(lambda: load.why["home"] + load.why["cost"] > by_cost + 50, "decisions by cost")
    beating.cancel()
    await load.stop()
    assert set(load.statuses) == {200}
    assert load.lost == 0


async def test_redis_absent_from_the_start(backends, router) -> None:
    nodes = await backends("a", "b")
    server = await router(nodes, redis_url=f"redis://127.0.0.1:{free_port()}", poll_ms=20)
    load = Load(server.port, clients=4)
    await load.more(200)
    await load.stop()
    assert set(load.statuses) == {200}
    assert set(load.why) <= {"hash", "spill"}


async def test_a_backend_is_killed_under_load(backend_processes, router_process) -> None:
    nodes = backend_processes("a", "b", "c")
    for node in nodes:
        await node.serving()
    router = router_process(
        *("--backends", flag(nodes), "--port", "0", "--probe-interval-s", "0.1")
    )
    load = Load(router.port)
    await load.more(300)
    for _ in range(2):
        nodes[0].kill()
        await load.more(300)
        nodes[0].start()
        before = load.nodes["a"]
        await until(lambda before=before: load.nodes["a"] > before, "the node to be used again")
    await load.stop()
    assert set(load.statuses) == {200}, "ranking changes nothing: it may be sent again"
    assert load.lost == 0
    assert load.cut == cut_short(router.admin_port), "only what had begun cannot be sent again"


async def test_killing_a_backend_fails_only_what_it_was_working_on(
    backend_processes, router_process
) -> None:
    nodes = backend_processes("a", "b", "c")
    for node in nodes:
        await node.serving()
    router = router_process(
        *("--backends", flag(nodes), "--port", "0", "--probe-interval-s", "0.1"),
        *("--pure-paths", ""),
    )
    load = Load(router.port, path="/v1/orders")
    await load.more(300)
    nodes[0].kill()
    await load.more(600)
    await load.stop()
    assert set(load.statuses) <= {200, 502}
    assert load.statuses[502] + load.cut <= 12, "at most what was in flight"
    assert load.lost == 0


async def test_sigterm_drains(backend_processes, router_process) -> None:
    nodes = backend_processes("a", delay_ms=400)
    await nodes[0].serving()
    router = router_process(
        *("--backends", flag(nodes), "--port", "0", "--drain-settle-s", "1"),
    )
    assert admin(router.admin_port, "/readyz")[0] == 200
    held = [await Client.connect(router.port) for _ in range(4)]
    idle = await Client.connect(router.port)
    for client in held:
        client.send(post())
    async with connection(router.admin_port) as probe:
        router.terminate()
        await until_async(lambda: not_ready(probe), "readyz to say 503")
        assert (await probe.ask(get("/livez"))).status == 200
    async with connection(router.port) as late:
        reply = await late.ask(post(), "POST")
        assert reply.status == 200, "while it settles new requests are served"
        assert reply.header("connection") == "close"
    for client in held:
        assert (await client.reply("POST")).status == 200
    assert await idle.closed() == b""
    assert await asyncio.to_thread(router.popen.wait, 30) == 0
    with pytest.raises(OSError, match="Connect call failed"):
        await Client.connect(router.port)


async def test_sigint_ends_quickly_and_a_second_signal_at_once(
    backend_processes, router_process
) -> None:
    nodes = backend_processes("a", delay_ms=20_000)
    await nodes[0].serving()
    quick = router_process("--backends", flag(nodes), "--port", "0", "--drain-settle-s", "60")
    quick.popen.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(quick.popen.wait, 30) == 0
    stuck = router_process("--backends", flag(nodes), "--port", "0", "--drain-settle-s", "60")
    async with connection(stuck.port) as client:
        client.send(post())
        stuck.terminate()
        async with connection(stuck.admin_port) as probe:
            await until_async(lambda: not_ready(probe), "readyz to say 503")
        stuck.terminate()
        assert await asyncio.to_thread(stuck.popen.wait, 30) == 128 + signal.SIGTERM


async def test_the_router_is_killed_and_started_again(
    backend_processes, router_process, redis_server, publisher
) -> None:
    nodes = backend_processes("a", "b")
    for node in nodes:
        await node.serving()
    from hbm_pool.contracts.identity import user_hash

    publisher.heartbeat("a", {user_hash("u1"): 1600})
    publisher.heartbeat("b", {})
    port = free_port()
    flags = ("--backends", flag(nodes), "--port", str(port), "--redis-url", redis_server.url)
    first = router_process(*flags)
    load = Load(port, clients=4)
    await load.more(100)
    first.kill()
    second = router_process(*flags)
    await load.more(100)
    await load.stop()
    assert set(load.statuses) == {200}

    def route() -> dict[str, object]:
        nodes = json.loads(admin(second.admin_port, "/debug/route?user=u1")[1])["nodes"]
        return {line["name"]: line["cached_tokens"] for line in nodes}

    await until(lambda: route()["a"] == 1600, "the new router to have read the digests")


def peak_rss_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


async def test_large_bodies_stream_both_ways_in_bounded_memory(
    backend_processes, router_process
) -> None:
    nodes = backend_processes("a", delay_ms=0)
    await nodes[0].serving()
    router = router_process("--backends", flag(nodes), "--port", "0")
    async with connection(router.port) as client:
        assert (await client.ask(post(), "POST")).status == 200
    before = peak_rss_bytes(router.popen.pid)
    size = 192 << 20
    async with connection(router.port) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size)
        block = b"x" * (1 << 20)
        for _ in range(size // len(block)):
            client.send(block)
            await client.writer.drain()
        assert (await client.reply("POST")).body == b"a %d" % size
    async with connection(router.port) as client:
        client.send(get(f"/download?{size // 65536}"))
        received = 0
        while received < size:
            data = await client.reader.read(1 << 20)
            assert data
            received += len(data)
            if received < 1 << 21:
                await asyncio.sleep(0.02)  # a slow reader at first: the backend must be held back
    assert peak_rss_bytes(router.popen.pid) - before < 48 << 20
