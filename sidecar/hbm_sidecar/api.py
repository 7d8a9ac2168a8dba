"""HTTP of the sidecar: health and metrics on TCP, all that changes it on a unix socket."""

from __future__ import annotations

from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hbm_sidecar.partition import Partition, PartitionChange, PartitionRefused

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_BODY_BYTES = 64 * 1024


class PartitionAnswer(BaseModel):
    """The wish in force, who governs it, and why newer content is not in force (if so)."""

    partition: Partition
    owner: str | None
    problem: str | None
    generation: int


class AdminView(Protocol):
    """What the HTTP layer needs of the admin process."""

    def partition(self) -> PartitionAnswer:
        """The wish in force."""

    def change(self, change: PartitionChange) -> PartitionAnswer:
        """Replace the wish. `ValidationError`, `PartitionRefused`, or `OSError` if not kept."""

    def reset(self) -> PartitionAnswer:
        """Back to the wish of the start. `PartitionRefused`."""

    def state(self) -> dict[str, Any]:
        """Everything known, as JSON."""

    def explain(self, last: int) -> list[dict[str, Any]]:
        """The last decisions, oldest first."""

    def policy(self) -> dict[str, Any]:
        """The parameters they were taken with."""

    def prices(self) -> dict[str, Any]:
        """What the twin prices with beside what the server declares."""

    def residual(self) -> dict[str, Any]:
        """What became of the learned residual that is asked for."""

    def readiness(self) -> dict[str, str]:
        """What keeps decisions from being taken, by part; empty when nothing does."""

    def metrics(self) -> bytes:
        """Prometheus text."""


def public_app(admin: AdminView) -> FastAPI:
    """Bound to the pod's address: nothing here changes or reveals anything of users."""
    app = FastAPI(title="HBM sidecar health", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        missing = admin.readiness()
        return JSONResponse(
            {"ready": not missing, "missing": missing}, status_code=503 if missing else 200
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(admin.metrics(), media_type=_METRICS_TYPE)

    return app


def control_app(admin: AdminView) -> FastAPI:
    """Bound to the unix socket in the run directory."""
    app = FastAPI(title="HBM sidecar", version="1")
    app.add_middleware(BodyLimit)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Any, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(
            {"detail": [_speakable(one) for one in error.errors()]}, status_code=422
        )

    @app.exception_handler(PartitionRefused)
    async def refused(_: Any, error: PartitionRefused) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=409)

    @app.exception_handler(OSError)
    async def not_kept(_: Any, error: OSError) -> JSONResponse:
        return JSONResponse(
            {"detail": f"the partition could not be kept and is not in force: {error}"},
            status_code=507,
        )

    @app.get("/v1/partition")
    async def get_partition() -> PartitionAnswer:
        """The wish in force."""
        return admin.partition()

    @app.put("/v1/partition")
    async def put_partition(change: PartitionChange) -> PartitionAnswer:
        """Replace the wish; fields left out are as the sidecar was started. Kept over restarts."""
        try:
            return admin.change(change)
        except ValidationError as error:
            raise RequestValidationError(
                [{**one, "loc": ("body", *one["loc"])} for one in _plain(error)]
            ) from error

    @app.delete("/v1/partition")
    async def delete_partition() -> PartitionAnswer:
        """Forget what was PUT: back to the wish the sidecar was started with."""
        return admin.reset()

    @app.get("/v1/state")
    async def get_state() -> dict[str, Any]:
        """What is known of server, twin, decisions, residency, Redis and children."""
        return admin.state()

    @app.get("/v1/explain")
    async def get_explain(
        last: Annotated[int, Query(ge=1, le=10_000)] = 10,
    ) -> dict[str, Any]:
        """Why the last decisions were taken, oldest first, what each layer added, and with which
        parameters and prices."""
        return {
            "decisions": admin.explain(last),
            "policy": admin.policy(),
            "prices": admin.prices(),
            "residual": admin.residual(),
        }

    return app


def _plain(error: ValidationError) -> list[dict[str, Any]]:
    return [dict(one) for one in error.errors(include_url=False, include_context=False)]


def _speakable(error: dict[str, Any]) -> dict[str, Any]:
    """One error without what JSON cannot carry: NaN, lone surrogates, exceptions."""
    return {
        "loc": [part if isinstance(part, int) else ascii(part)[1:-1] for part in error["loc"]],
        "msg": str(error["msg"]).removeprefix("Value error, "),
        "type": error["type"],
        "input": ascii(error.get("input"))[:80],
    }


class BodyLimit:
    """ASGI middleware: collects the body; beyond `MAX_BODY_BYTES` the answer is 413."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the whole body on as one message, then whatever else comes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                text = f"the body is larger than {MAX_BODY_BYTES} bytes; a partition never is"
                await JSONResponse({"detail": text}, status_code=413)(scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)
