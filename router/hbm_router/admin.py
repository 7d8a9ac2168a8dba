"""The admin port: probes, metrics, what the router knows, and why it would choose what.

It has a thread and an event loop of its own, so that probes and scrapes are answered while the
data path is saturated. What belongs to the data path's loop is asked there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import uvicorn
from fastapi import FastAPI, Query, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from hbm_router import wire
from hbm_router.request import RequestHead

if TYPE_CHECKING:
    from hbm_router.dataplane import Dataplane

ANSWER_TIMEOUT_S: Final = 2.0
STUCK_S: Final = 30.0
"""The data path's loop has not turned for this long: the process should be restarted."""

T = TypeVar("T")


@dataclasses.dataclass
class Lifecycle:
    """What probes ask about; written by the server, read by the admin thread."""

    serving: bool = False
    draining: bool = False
    turned_s: float = 0.0
    """When the data path's event loop last turned (monotonic clock)."""


def build_app(plane: Dataplane, lifecycle: Lifecycle, loop: asyncio.AbstractEventLoop) -> FastAPI:
    """The admin application over a data path that runs on `loop`."""
    app = FastAPI(title="HBM Partition router", docs_url=None, redoc_url=None)

    async def on_data_loop(function: Callable[[], T]) -> T:
        future: Future[T] = Future()

        def call() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        loop.call_soon_threadsafe(call)
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await asyncio.wrap_future(future)

    @app.exception_handler(TimeoutError)
    async def _timeout(*_: Any) -> JSONResponse:
        return JSONResponse(
            {
                "error": {
                    "field": "server",
                    "message": "the data path did not answer in time",
                    "reason": "timeout",
                }
            },
            status_code=504,
        )

    @app.get("/livez")
    @app.get("/healthz")
    async def livez() -> Response:
        """200 while the data path's event loop turns."""
        silent_s = plane.now_s() - lifecycle.turned_s
        if lifecycle.turned_s and silent_s > STUCK_S:
            return PlainTextResponse(
                f"the data path has been stuck for {silent_s:.0f} s\n", status_code=503
            )
        return PlainTextResponse("ok\n")

    @app.get("/readyz")
    async def readyz() -> Response:
        """200 when requests are accepted and at least one backend may be chosen."""
        if lifecycle.draining:
            return PlainTextResponse("draining\n", status_code=503)
        if not lifecycle.serving:
            return PlainTextResponse("starting\n", status_code=503)
        now_s = plane.now_s()
        if not any(plane.outlier.healthy(node, now_s) for node in list(plane.fleet.nodes)):
            return PlainTextResponse("no healthy backend\n", status_code=503)
        return PlainTextResponse("ok\n")

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(generate_latest(plane.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/nodes")
    async def nodes() -> dict[str, Any]:
        """Every backend: address, health, load, and what it last said."""
        return await on_data_loop(lambda: _nodes(plane))

    @app.get("/debug/route")
    async def route(
        user: Annotated[str | None, Query(max_length=256)] = None,
        history_tokens: Annotated[int | None, Query(ge=0)] = None,
        candidates: Annotated[int | None, Query(ge=0)] = None,
        content_length: Annotated[int | None, Query(ge=0)] = None,
        deadline_ms: Annotated[float | None, Query(ge=0)] = None,
    ) -> dict[str, Any]:
        """How a request like this would be routed now, with every node's cost. Changes nothing."""
        head = RequestHead()
        head.content_length = content_length
        for name, value in (
            (wire.HISTORY_TOKENS, history_tokens),
            (wire.CANDIDATES, candidates),
            (wire.DEADLINE_MS, deadline_ms),
        ):
            if value is not None:
                head.known[name] = str(value).encode()
        return await on_data_loop(lambda: _route(plane, user, head))

    return app


def _nodes(plane: Dataplane) -> dict[str, Any]:
    rows = dict(plane.node_rows())
    snapshot = plane.chooser.snapshot
    views = dict(zip(snapshot.names, snapshot.views, strict=True))
    nodes = []
    for node in plane.fleet.nodes:
        view = views.get(node.name)
        nodes.append(
            {
                "name": node.name,
                "url": node.backend.url,
                **rows[node.name],
                "unreachable": node.unreachable,
                "probed_down": node.probed_down,
                "ejections": node.ejections,
                "state": view.state._asdict() if view is not None else None,
            }
        )
    return {"nodes": nodes, "panic": plane.outlier.panic, "informed": plane.chooser.informed}


def _route(plane: Dataplane, user: str | None, head: RequestHead) -> dict[str, Any]:
    facts, costs = plane.explain(user, head)
    home = None
    if facts.user is not None and plane.fleet.nodes:
        home = plane.fleet.names[plane.fleet.ring.home(facts.user)]
    return {
        "policy": plane.settings.policy.value,
        "informed": plane.chooser.informed,
        "user": facts.user,
        "history_tokens": facts.history_tokens,
        "candidates": facts.candidates,
        "source": facts.source,
        "home": home,
        "nodes": [cost._asdict() for cost in costs],
    }


class AdminServer:
    """Runs the admin application in a thread of its own."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
            self._socket.listen()  # so that whoever reads the ready file may connect at once
        except OSError:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="httptools",
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(target=self._run, name="admin", daemon=True)

    def _run(self) -> None:
        serve: Awaitable[None] = self._server.serve(sockets=[self._socket])
        asyncio.run(serve)  # type: ignore[arg-type]

    def start(self) -> None:
        """Starts serving."""
        self._thread.start()

    def stop(self) -> None:
        """Stops and waits for the thread."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(timeout=5)
        self._socket.close()
