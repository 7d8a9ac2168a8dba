"""The process `hbm operator webhook`: the TLS port, the admin port, and their life."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import uuid
from typing import Any, Final

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from hbm_operator.webhook.admission import Admission
from hbm_operator.webhook.metrics import WebhookMetrics
from hbm_operator.webhook.self_admission import NotReady, admit_own_pod
from hbm_operator.webhook.settings import WebhookSettings
from hbm_operator.webhook.tls import ServingCertificate

_FINISH_S: Final = 10.0
"""Requests in flight get this long after the drain."""
_WAITING: Final = 0.2
"""Share of the usual time between two looks while there is no certificate at all."""
_KEEP_ALIVE_S: Final = 120.0
"""The API server keeps its connections for 90 s; it must be the one that closes them."""


class WebhookServer:
    """Serves until it is told to stop.

    Args:
        settings: of the process.
        native: whether the cluster has native sidecars.
    """

    def __init__(self, settings: WebhookSettings, *, native: bool) -> None:
        self._settings = settings
        self._metrics = WebhookMetrics()
        self._own_uid = str(uuid.uuid4())
        self._admission = Admission(settings.injection(native=native), self._metrics, self._own_uid)
        self._certificate = ServingCertificate(settings.tls_dir, self._certificate_loaded)
        self._loaded = asyncio.Event()
        self._port = 0
        """Of the TLS server; 0: it does not listen yet."""
        self._log = structlog.get_logger()

    async def run(self, stop: asyncio.Event) -> None:
        """Listens, serves, and drains once `stop` is set.

        Raises:
            OSError: a port cannot be listened on.
        """
        settings = self._settings
        async with contextlib.AsyncExitStack() as stack:
            admin_port = await self._listen(stack, self._admin_app(), settings.admin_port)
            reloading = asyncio.create_task(self._keep_certificate())
            stack.callback(reloading.cancel)
            if not await self._first_certificate(stop, reloading):
                return
            self._port = await self._listen(
                stack, self._admission.app(), settings.port, self._certificate
            )
            self._log.info("serving", port=self._port, admin_port=admin_port)
            if settings.ready_file is not None:
                text = json.dumps({"port": self._port, "admin_port": admin_port})
                await asyncio.to_thread(settings.ready_file.write_text, text)
            await _either(stop, reloading)
            self._admission.draining = True
            self._log.info("draining", seconds=settings.drain_s)
            await asyncio.sleep(settings.drain_s)
        self._log.info("stopped")

    async def _listen(
        self,
        stack: contextlib.AsyncExitStack,
        app: web.Application,
        port: int,
        certificate: ServingCertificate | None = None,
    ) -> int:
        """Serves `app`, and closes it in order with `stack`. Returns the port."""
        runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            keepalive_timeout=_KEEP_ALIVE_S,
            shutdown_timeout=_FINISH_S,
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        listening = _bound(self._settings.host, port)
        site = web.SockSite(
            runner, listening, ssl_context=certificate.context if certificate else None
        )
        await site.start()
        return int(listening.getsockname()[1])

    # -- certificate -----------------------------------------------------------------------------

    async def _first_certificate(self, stop: asyncio.Event, reloading: asyncio.Task[None]) -> bool:
        """Waits for a pair of files. False: told to stop before."""
        if self._certificate.expires is None:
            self._log.info("waiting for a certificate", directory=str(self._settings.tls_dir))
        loaded = asyncio.create_task(self._loaded.wait())
        await _either(stop, reloading, loaded)
        loaded.cancel()
        return self._loaded.is_set()

    async def _keep_certificate(self) -> None:
        while True:
            await asyncio.to_thread(self._certificate.reload)
            if self._certificate.expires is not None:
                self._loaded.set()
            often = 1.0 if self._loaded.is_set() else _WAITING
            await asyncio.sleep(self._settings.tls_reload_s * often)

    def _certificate_loaded(self, loaded: bool) -> None:
        self._metrics.certificate_loads.labels("loaded" if loaded else "refused").inc()
        if loaded and self._certificate.expires is not None:
            self._metrics.certificate_expiry.set(self._certificate.expires.timestamp())

    # -- admin port ------------------------------------------------------------------------------

    def _admin_app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._show_metrics)
        return app

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        try:
            await self._admit_own_pod()
        except NotReady as problem:
            return web.Response(status=503, text=f"{problem}\n")
        return web.Response(text="ok\n")

    async def _admit_own_pod(self) -> None:
        if self._admission.draining:
            raise NotReady("draining")
        if not self._port:
            raise NotReady(f"there is no certificate in {self._settings.tls_dir} yet")
        await admit_own_pod(
            self._settings.host or "localhost",
            self._port,
            self._settings.server_name,
            self._certificate,
            self._own_uid,
        )

    async def _show_metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._metrics.registry),
            headers={"Content-Type": CONTENT_TYPE_LATEST},
        )


async def _either(stop: asyncio.Event, *tasks: asyncio.Task[Any]) -> None:
    """Returns once it is told to stop or one of the tasks has ended; raises what that raised."""
    stopping = asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    for task in done:
        task.result()


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket; without a host on all addresses of both families."""
    if host:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=256)
    dual = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", port),
        family=socket.AF_INET6 if dual else socket.AF_INET,
        dualstack_ipv6=dual,
        backlog=256,
    )


async def serve(settings: WebhookSettings) -> None:
    """Runs the webhook until SIGTERM or SIGINT."""
    from hbm_operator.webhook.capabilities import native_sidecars

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    native = await native_sidecars(settings.native_sidecars)
    await WebhookServer(settings, native=native).run(stop)


def check(settings: WebhookSettings) -> None:
    """What can be known to be wrong before anything starts.

    Raises:
        OSError: a port cannot be listened on, or the ready file cannot be written.
    """
    for flag, port in (("port", settings.port), ("admin-port", settings.admin_port)):
        try:
            _bound(settings.host, port).close()
        except OSError as error:
            where = f"{settings.host}:{port}" if settings.host else str(port)
            raise OSError(f"--{flag}: {where} cannot be listened on ({error.strerror})") from error
    if settings.ready_file is not None and not os.access(settings.ready_file.parent, os.W_OK):
        raise OSError(f"--ready-file: {settings.ready_file.parent} cannot be written")
