"""One router process: starts all parts, serves, drains and ends."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
from pathlib import Path
from typing import Any, Final

import structlog

from hbm_router.admin import AdminServer, Lifecycle, build_app
from hbm_router.client import ClientConnection
from hbm_router.config import RouterSettings
from hbm_router.dataplane import Dataplane
from hbm_router.discovery import Discovery, StaticDiscovery
from hbm_router.metrics import RouterMetrics
from hbm_router.probes import Prober
from hbm_router.reader import SnapshotReader

TURN_S: Final = 0.5
BACKLOG: Final = 2048


class RouterServer:
    """`start`, then `drain` (or `stop` at once). All on one event loop."""

    def __init__(self, settings: RouterSettings, discovery: Discovery | None = None) -> None:
        self.settings = settings
        self.metrics = RouterMetrics()
        self.plane = Dataplane(settings, self.metrics, rng=random.Random(settings.seed))
        self.lifecycle = Lifecycle()
        self.port = 0
        self.admin_port = 0
        self._server: asyncio.Server | None = None
        self._admin: AdminServer | None = None
        self._reader: SnapshotReader | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the exception of a background task that should never have ended."""
        self._log = structlog.get_logger("hbm_router")
        self._discovery = discovery or self._make_discovery()

    async def start(self) -> None:
        """Returns once requests are accepted. Raises `OSError` when a port cannot be had."""
        settings, plane = self.settings, self.plane
        loop = asyncio.get_running_loop()
        await self._discovery.start(plane.set_backends)
        redis = settings.redis_url is not None or settings.redis_url_file is not None
        if redis:
            self._reader = SnapshotReader(settings, plane, self.metrics)
        self._admin = AdminServer(
            build_app(plane, self.lifecycle, loop), settings.host, settings.admin_port
        )
        try:
            self._server = await loop.create_server(
                lambda: ClientConnection(plane), settings.host, settings.port, backlog=BACKLOG
            )
        except OSError:
            self._admin.stop()
            raise
        self.port = self._server.sockets[0].getsockname()[1]
        self.admin_port = self._admin.port
        if self._reader is not None:
            self._reader.start()
        self._tasks = [
            loop.create_task(plane.run_sweeper()),
            loop.create_task(Prober(settings, plane.fleet, plane.outlier).run()),
            loop.create_task(self._turn()),
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)
        self._admin.start()
        self.lifecycle.serving = True
        self._log.info(
            "serving",
            host=settings.host,
            port=self.port,
            admin_port=self.admin_port,
            policy=settings.policy.value,
            backends=len(plane.fleet.nodes),
            redis=redis,
        )

    def _make_discovery(self) -> Discovery:
        """The list of the configuration, or the endpoints of its Service."""
        settings = self.settings
        if not settings.service:
            return StaticDiscovery(settings.parsed_backends())
        from hbm_router.endpoint_slices import EndpointSliceDiscovery  # the client takes 30 MB

        config = settings.kube_config()
        return EndpointSliceDiscovery(
            config,
            settings.service,
            settings.service_namespace or config.namespace,
            settings.service_port,
            self.metrics,
            self._ended,
        )

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A router without its sweeper would never time out anything: better to end."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)

    async def _turn(self) -> None:
        while True:
            self.lifecycle.turned_s = self.plane.now_s()
            await asyncio.sleep(TURN_S)

    async def drain(self, settle_s: float | None = None) -> None:
        """Not ready, but accepting for `settle_s`; then what is in flight may finish."""
        plane, settings = self.plane, self.settings
        self.lifecycle.draining = True
        plane.draining = True
        self._log.info("draining", inflight=plane.fleet.inflight)
        await asyncio.sleep(settings.drain_settle_s if settle_s is None else settle_s)
        if self._server is not None:
            self._server.close()
        for client in list(plane.clients):
            client.close_if_idle()
        until_s = plane.now_s() + settings.drain_timeout_s
        while plane.clients and plane.now_s() < until_s:
            await asyncio.sleep(0.02)
            for client in list(plane.clients):
                client.close_if_idle()
        if plane.clients:
            self._log.warning("drain timed out", connections=len(plane.clients))
        await self.stop()

    async def stop(self) -> None:
        """Ends everything at once."""
        self.lifecycle.serving = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.failed.cancel()
        await self._discovery.stop()
        if self._server is not None:
            self._server.close()
        for client in list(self.plane.clients):
            client.abort()
        for node in self.plane.fleet.nodes:
            if node.pool is not None:
                node.pool.abort()
        await asyncio.sleep(0)
        if self._reader is not None:
            await asyncio.to_thread(self._reader.stop)
        if self._admin is not None:
            await asyncio.to_thread(self._admin.stop)
        self._log.info("stopped")


def write_ready_file(path: Path, host: str, port: int, admin_port: int) -> None:
    """Tells where the router serves: complete or not there at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(
        json.dumps({"pid": os.getpid(), "host": host, "port": port, "admin_port": admin_port})
    )
    temporary.replace(path)


async def serve(settings: RouterSettings) -> None:
    """Serves until SIGTERM (drains) or SIGINT (drains without settling); a second one ends it."""
    loop = asyncio.get_running_loop()
    server = RouterServer(settings)
    await server.start()
    if settings.ready_file is not None:
        write_ready_file(settings.ready_file, settings.host, server.port, server.admin_port)
    first: asyncio.Future[int] = loop.create_future()

    def caught(number: int) -> None:
        if first.done():
            os._exit(128 + number)
        first.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, caught, number)
    ends: list[asyncio.Future[Any]] = [first, server.failed]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if server.failed.done():
        server.failed.result()
    caught_number = first.result()
    await server.drain(settle_s=0.0 if caught_number == signal.SIGINT else None)


def check_ports(settings: RouterSettings) -> None:
    """Raises `OSError` that names the port when one is taken, before anything starts."""
    for name, port in (("--port", settings.port), ("--admin-port", settings.admin_port)):
        if port == 0:
            continue
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((settings.host, port))
            except OSError as error:
                raise OSError(f"{name} {settings.host}:{port}: {error.strerror}") from error
