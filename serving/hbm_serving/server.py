"""`hbm serve`: sockets, two uvicorn servers in one loop, ready file, SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import structlog
import uvicorn
import uvloop
from fastapi import FastAPI

from hbm_serving.admin import build_admin_app
from hbm_serving.connection import BoundedHttpProtocol
from hbm_serving.engine import Engine
from hbm_serving.errors import ConfigError
from hbm_serving.http import build_app
from hbm_serving.metrics import Metrics

_log = structlog.get_logger("hbm_serving")


class _Server(uvicorn.Server):
    """Leaves signals to us: two servers share the loop and the pipeline drains between them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ConfigError` when the address is taken or unknown."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, proto)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another port "
            "(0: any free one)"
        ) from error
    bound.setblocking(False)
    return bound


def claim_run_dir(run_dir: Path) -> int | None:
    """Holds `server.lock` in `run_dir` until the process ends; the descriptor that holds it.

    A second server would replace the control block of the first, which nobody would then hear.
    Raises `ConfigError` when a server runs there. None when the directory cannot be written (a full
    or read-only file system): then the engine serves without a control block, and says so.
    """
    try:
        descriptor = os.open(run_dir / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(
            f"--run-dir: {run_dir} already has a server; stop it or use another directory"
        ) from error
    return descriptor


def _configure(app: FastAPI, engine: Engine) -> uvicorn.Config:
    limits = engine.config.server
    return uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        loop="none",
        lifespan="off",
        ws="none",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(1, round(limits.keep_alive_s)),
        timeout_graceful_shutdown=max(1, round(limits.drain_s)),
        limit_concurrency=limits.max_connections,
    )


class Listening(NamedTuple):
    """Where a running server can be reached."""

    host: str
    port: int
    admin_port: int


def write_ready_file(path: Path, listening: Listening) -> None:
    """Where this server listens, written by rename so that nobody reads half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"pid": os.getpid(), **listening._asdict()}) + "\n")
    partial.rename(path)


async def listen(
    engine: Engine,
    public: socket.socket,
    admin: socket.socket,
    stop: asyncio.Event,
    on_ready: Callable[[Listening], None],
) -> None:
    """Serves on two bound sockets until `stop` is set, then drains and closes the engine."""
    metrics = Metrics(engine.samples)
    servers = [
        (_Server(_configure(build_app(engine, metrics), engine)), public),
        (_Server(_configure(build_admin_app(engine, metrics), engine)), admin),
    ]
    engine.start()
    tasks = [asyncio.create_task(server.serve(sockets=[bound])) for server, bound in servers]
    while not all(server.started for server, _ in servers):
        if any(task.done() for task in tasks):
            await asyncio.gather(*tasks)
            raise RuntimeError("a listener ended before it had started")
        await asyncio.sleep(0.005)
    host, port = public.getsockname()[:2]
    listening = Listening(host, port, admin.getsockname()[1])
    on_ready(listening)
    _log.info(
        "serving",
        model=engine.config.model.name,
        url=f"http://{host}:{port}",
        admin_port=listening.admin_port,
        device=str(engine.device),
        alpha=engine.memory.alpha,
    )
    await stop.wait()
    begun_s = time.monotonic()
    _log.info("draining", in_queue=engine.queue.depth)
    engine.drain()
    await asyncio.sleep(engine.config.server.drain_delay_s)
    for server, _ in servers:
        server.should_exit = True  # stops accepting, finishes what is in flight
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.to_thread(engine.close)
    _log.info("stopped", seconds=round(time.monotonic() - begun_s, 3))


def serve(
    engine: Engine,
    public: socket.socket,
    admin: socket.socket,
    ready_file: Path | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Returns when everything is closed."""

    def on_ready(listening: Listening) -> None:
        if ready_file is not None:
            write_ready_file(ready_file, listening)

    async def until_signalled() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await listen(engine, public, admin, stop, on_ready)

    # What is here now stays: a full collection over torch's objects would hold requests up for
    # a sixth of a second, and the interpreter runs several before it ends.
    gc.collect()
    gc.freeze()
    try:
        uvloop.run(until_signalled())
    finally:
        engine.close()
        public.close()
        admin.close()
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)
