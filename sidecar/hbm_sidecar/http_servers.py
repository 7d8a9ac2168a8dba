"""The two HTTP servers of admin: one on the pod's address, one on a unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any, Final

import uvicorn
from fastapi import FastAPI

from hbm_sidecar.config import ADMIN_SOCKET, SidecarConfig

SOCKET_LOOK_S: Final = 0.5
"""How often it looks whether its unix socket is still there."""


class AdminServer(uvicorn.Server):
    """A uvicorn server that says when it listens and leaves signals to its process."""

    def __init__(self, settings: uvicorn.Config) -> None:
        super().__init__(settings)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so."""
        await super().startup(sockets=sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _control_socket(config: SidecarConfig) -> socket.socket:
    """The unix socket of /v1: for this user and group only."""
    path = config.admin_socket
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o117)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(64)
    return listener


def http_server(app: FastAPI) -> AdminServer:
    """A server for a handful of callers: probes, scrapes, `hbm explain`."""
    return AdminServer(
        uvicorn.Config(
            app,
            access_log=False,
            log_level="warning",
            lifespan="off",
            loop="asyncio",
            ws="none",
            timeout_graceful_shutdown=1,
            timeout_keep_alive=30,
            limit_concurrency=64,
        )
    )


async def serve_control(
    app: FastAPI, config: SidecarConfig, ready: asyncio.Event, stop: asyncio.Event, log: Any
) -> None:
    """/v1 on its unix socket, made anew when somebody deletes it, until `stop`."""
    while not stop.is_set():
        server = http_server(app)
        sock = _control_socket(config)
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        await server.listening.wait()
        ready.set()
        while not stop.is_set() and config.admin_socket.is_socket():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), SOCKET_LOOK_S)
        if not stop.is_set():
            log.warning("file is gone from the run directory; it is made anew", file=ADMIN_SOCKET)
        server.should_exit = True
        await serving
