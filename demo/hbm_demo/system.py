"""One whole system: Redis, model servers, their sidecars, the router. Fresh for each arm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from hbm_demo.processes import Processes
from hbm_demo.redis_server import start_redis, wait_redis
from hbm_demo.settings import ALPHA_START, MODEL_PRESET, DemoSettings

_READY_S = 480.0
"""Compiling the kernels for the first time on a machine that is busy with other work included;
what ends instead is noticed at once."""
_TICK_MS = 200
"""So often that the decisions of one arm suffice for a P99."""
_MOVES = ("--slew-per-s", "0.2", "--move-fraction", "1", "--dwell-accesses-per-slot", "0.4")
"""A regime lasts 35 s here, not the quarter of an hour that the default moves are made for."""
_NAMESPACE = "demo"
_HOST = "127.0.0.1"


class Arm(NamedTuple):
    """One pass over the requests."""

    name: str
    mode: str  # of the sidecar
    title: str


ADAPTIVE = Arm("adaptive", "auto", "α moves")
FIXED = Arm("fixed", "fixed", f"α fixed at {ALPHA_START:g}")


class Node(NamedTuple):
    """A model server and its sidecar."""

    name: str
    url: str
    admin_url: str
    run_dir: Path


class System(NamedTuple):
    """What runs."""

    router_url: str
    nodes: tuple[Node, ...]


def start_system(
    processes: Processes,
    settings: DemoSettings,
    arm: Arm,
    directory: Path,
    refill_bytes_per_s: float,
) -> System:
    """Starts everything below `directory` (a short path: unix sockets) and waits for it.

    Raises `ProcessFailed` naming the process and the last line of its log.
    """
    hbm = [sys.executable, "-m", "hbm_cli.main"]
    redis, redis_url = start_redis(processes, directory)
    environment = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HBM_LOG_JSON": "true",
        # Nobody else routes to this router: nothing to wait for when it is told to stop.
        "HBM_DRAIN_SETTLE_S": "0",
    }
    wait_redis(redis, redis_url)
    # Before the servers: they measure their prices when they start, and what the router makes of
    # prices that were measured beside a compiler sends everybody to one node.
    kernels = processes.start(
        "kernels", [sys.executable, "-m", "hbm_demo.warm"], environment=environment
    )
    kernels.wait_done(_READY_S)
    processes.forget(kernels)
    names = [f"node-{index}" for index in range(settings.nodes)]
    servers = []
    for name in names:
        run_dir = directory / name
        run_dir.mkdir()
        command = [*hbm, "serve", "--config", MODEL_PRESET, "--host", _HOST, "--port", "0"]
        command += ["--run-dir", str(run_dir), "--node", name, "--device", settings.device]
        command += ["--alpha", str(ALPHA_START), "--seed", str(settings.seed)]
        command += ["--ready-file", str(run_dir / "serve.json")]
        servers.append(
            processes.start(
                f"{name}-server",
                command,
                ready_file=run_dir / "serve.json",
                environment=environment,
            )
        )
    nodes = []
    for name, server in zip(names, servers, strict=True):
        ready = server.wait_ready(_READY_S)
        nodes.append(
            Node(
                name,
                f"http://{_HOST}:{ready['port']}",
                f"http://{_HOST}:{ready['admin_port']}",
                directory / name,
            )
        )
    waiting = []
    for node in nodes:
        command = [*hbm, "sidecar", "--run-dir", str(node.run_dir), "--node", node.name]
        command += ["--node-url", node.url, "--namespace", _NAMESPACE, "--redis-url", redis_url]
        command += ["--mode", arm.mode, "--tick-ms", str(_TICK_MS), "--port", "0"]
        command += ["--refill-bytes-per-s", str(refill_bytes_per_s), *_MOVES]
        command += ["--ready-file", str(node.run_dir / "sidecar.json")]
        if arm.mode == "fixed":
            command += ["--alpha-fixed", str(ALPHA_START)]
        waiting.append(
            processes.start(
                f"{node.name}-sidecar",
                command,
                ready_file=node.run_dir / "sidecar.json",
                environment=environment,
            )
        )
    backends = ",".join(f"{node.name}={node.url}" for node in nodes)
    command = [*hbm, "router", "--backends", backends, "--redis-url", redis_url]
    command += ["--namespace", _NAMESPACE, "--host", _HOST, "--port", "0"]
    command += ["--ready-file", str(directory / "router.json")]
    router = processes.start(
        "router", command, ready_file=directory / "router.json", environment=environment
    )
    for process in waiting:
        process.wait_ready(_READY_S)
    port = router.wait_ready(_READY_S)["port"]
    return System(f"http://{_HOST}:{port}", tuple(nodes))
