"""The public HTTP application: `/v1/rank`, health, metrics; Open Inference Protocol beside it.

The handlers read the body themselves, bounded in size and time before anything is parsed, and
answer every failure with `{"error": {"field", "message", "reason"}}`, as the router does.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request
from fastapi.responses import Response
from hbm_pool.contracts import headers as names
from hbm_pool.contracts.identity import MAX_USER_ID_BYTES, user_hash
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hbm_serving.batching import RankResult
from hbm_serving.config import ServerSection
from hbm_serving.engine import Engine
from hbm_serving.errors import Refused, RequestError
from hbm_serving.metrics import Metrics
from hbm_serving.schema import ErrorResponse, RankResponse

_log = structlog.get_logger("hbm_serving")
_USER_ID = names.USER_ID.encode()
_DEADLINE = names.DEADLINE_MS.encode()
_CONTENT_LENGTH = b"content-length"
_CONTENT_ENCODING = b"content-encoding"

Handler = Callable[[Request], Awaitable[Response]]


async def read_body(request: Request, limits: ServerSection) -> bytes:
    """The whole body, or `RequestError` 413 (too long), 408 (too slow), 415 (compressed)."""
    for name, value in request.scope["headers"]:
        if name == _CONTENT_LENGTH and int(value) > limits.max_body_bytes:
            raise RequestError(
                "body",
                f"{value.decode()} bytes; at most {limits.max_body_bytes} are read",
                status=413,
            )
        if name == _CONTENT_ENCODING and value.lower() != b"identity":
            raise RequestError(
                "content-encoding",
                f"{value.decode('latin-1')} is not read; send the body uncompressed",
                status=415,
            )
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.max_body_bytes:
                    raise RequestError(
                        "body", f"more than {limits.max_body_bytes} bytes", status=413
                    )
                chunks.append(chunk)
    except TimeoutError:
        raise RequestError(
            "body",
            f"not complete after {limits.body_timeout_s:g} s ({size} bytes came)",
            status=408,
        ) from None
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def user_of(request: Request) -> int:
    """User hash out of `X-User-ID`; 0 without one (anonymous, never cached)."""
    values = [value for name, value in request.scope["headers"] if name == _USER_ID]
    if not values:
        return 0
    if len(values) > 1:
        raise RequestError(names.USER_ID, "is given twice; send one", status=400)
    raw: bytes = values[0]
    if not 1 <= len(raw) <= MAX_USER_ID_BYTES:
        raise RequestError(
            names.USER_ID, f"has {len(raw)} bytes; 1 to {MAX_USER_ID_BYTES} are allowed", status=400
        )
    try:
        raw.decode()
    except UnicodeDecodeError:
        raise RequestError(names.USER_ID, "is not UTF-8", status=400) from None
    return user_hash(raw)


def deadline_of(request: Request) -> float | None:
    """Latency budget in ms out of `X-HBM-Deadline-MS`, None without one."""
    for name, value in request.scope["headers"]:
        if name == _DEADLINE:
            try:
                deadline_ms = float(value)
            except ValueError:
                deadline_ms = math.nan
            if not (math.isfinite(deadline_ms) and deadline_ms > 0.0):
                shown = value.decode("latin-1")[:40]
                raise RequestError(
                    names.DEADLINE_MS,
                    f"{shown!r} is not a positive number of milliseconds",
                    status=400,
                )
            return deadline_ms
    return None


def result_headers(result: RankResult, candidates: int, request_tokens: int) -> dict[str, str]:
    """What was hit, so that router and client can check themselves."""
    headers = {
        names.HISTORY_TOKENS: str(request_tokens),
        names.CANDIDATES: str(candidates),
        names.KV_REUSED_TOKENS: str(result.kv_reused_tokens),
        names.ROWS_LOOKED_UP: str(result.rows_looked_up),
        names.ROWS_MISSED: str(result.rows_missed),
        names.SERVICE_MS: f"{result.service_ms:.3f}",
        names.QUEUE_MS: f"{result.queue_ms:.3f}",
        names.ALPHA: f"{result.alpha:.6g}",
        names.MODEL_VERSION: str(result.model_version),
        names.KV_ROW_LAG_S: f"{result.kv_row_lag_s:.3f}",
    }
    if result.top_shards:
        headers[names.TOP_SHARDS] = ",".join(map(str, result.top_shards))
    return headers


def error_body(field: str, message: str, reason: str) -> bytes:
    return orjson.dumps({"error": {"field": field, "message": message, "reason": reason}})


def oip_error_body(field: str, message: str, reason: str) -> bytes:
    """Open Inference Protocol wants one string."""
    return orjson.dumps({"error": f"{field}: {message}"})


def json_response(
    body: bytes, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(body, status, headers, media_type="application/json")


class Answering:
    """Runs handlers and turns whatever they raise into an answer; counts and times requests."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.perf_counter) -> None:
        self._metrics = metrics
        self._clock = clock

    def __call__(
        self, endpoint: str, handler: Handler, body: Callable[[str, str, str], bytes] = error_body
    ) -> Handler:
        """Wraps `handler`; `body` writes an error in the form of its protocol."""

        async def answer(request: Request) -> Response:
            started_s = self._clock()
            try:
                response = await handler(request)
            except RequestError as error:
                # Unread rest of a body: only closing the connection gets rid of it.
                close = {"connection": "close"} if error.status in (408, 413, 415) else None
                response = json_response(
                    body(error.field, error.message, error.reason), error.status, close
                )
            except Refused as refused:
                response = json_response(
                    body("server", refused.message, refused.reason),
                    503,
                    {
                        "retry-after": str(max(1, math.ceil(refused.retry_after_s))),
                        names.DROPPED_REASON: refused.reason,
                    },
                )
            except ClientDisconnect:
                response = json_response(body("body", "the client went away", "disconnected"), 400)
            except Exception:
                _log.exception("request failed", endpoint=endpoint)
                response = json_response(body("server", "internal error", "internal"), 500)
            request_id = request.headers.get(names.REQUEST_ID)
            if request_id is not None:
                response.headers[names.REQUEST_ID] = request_id
            self._metrics.answered(endpoint, response.status_code, self._clock() - started_s)
            return response

        answer.__name__ = endpoint
        answer.__doc__ = handler.__doc__
        return answer


def build_app(engine: Engine, metrics: Metrics) -> FastAPI:
    """The application of the public port."""
    from hbm_serving.oip import add_oip

    limits = engine.config.server
    model_name = engine.config.model.name
    app = FastAPI(
        title="HBM Partition model server",
        version="1",
        description="Ranks candidates for a user's whole history.",
        docs_url=None,
        redoc_url=None,
    )
    answering = Answering(metrics)
    plain_errors(app)

    async def rank(request: Request) -> Response:
        """Scores candidates for one user's whole history."""
        user, deadline_ms = user_of(request), deadline_of(request)
        parsed = engine.parser.parse_json(await read_body(request, limits), user)
        result = await engine.rank(parsed, deadline_ms)
        return json_response(
            orjson.dumps(
                {
                    "scores": result.scores,
                    "model": model_name,
                    "model_version": result.model_version,
                    "history_tokens": result.history_tokens,
                    "kv_reused_tokens": result.kv_reused_tokens,
                },
                option=orjson.OPT_SERIALIZE_NUMPY,
            ),
            headers=result_headers(result, len(parsed.candidates), parsed.request_tokens),
        )

    app.post(
        "/v1/rank",
        openapi_extra=_rank_openapi(engine),
        response_model=RankResponse,
        responses={
            status: {"model": ErrorResponse, "description": text}
            for status, text in (
                (400, "Not JSON, or a wrong header"),
                (408, "The body came too slowly"),
                (413, "The body is too large"),
                (415, "The body is compressed"),
                (422, "A field is missing or wrong; the answer names it"),
                (503, "Overloaded, late or draining; try again after `Retry-After` seconds"),
            )
        },
    )(answering("rank", rank))

    async def live() -> Response:
        """The process answers."""
        return json_response(b'{"live":true}')

    async def ready() -> Response:
        """Whether new requests are welcome: 503 while starting, draining or failed."""
        state = engine.state
        status = 200 if state == "ready" else 503
        return json_response(orjson.dumps({"ready": status == 200, "state": state}), status)

    async def metrics_page() -> Response:
        """Prometheus text format."""
        body, content_type = metrics.render()
        return Response(body, media_type=content_type)

    not_ready: dict[int | str, dict[str, Any]] = {503: {"description": "Not ready"}}
    app.get("/healthz", response_class=Response)(live)
    app.get("/readyz", response_class=Response, responses=not_ready)(ready)
    app.get("/metrics", response_class=Response)(metrics_page)
    add_oip(app, engine, answering)
    return app


def plain_errors(app: FastAPI) -> None:
    """Unknown paths and methods are answered in our form too."""

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        field = "method" if error.status_code == 405 else "path"
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        body = oip_error_body if request.url.path.startswith("/v2") else error_body
        headers = dict(error.headers) if error.headers else None
        return json_response(body(field, message, "bad_request"), error.status_code, headers)

    app.add_exception_handler(HTTPException, unknown)


def _rank_openapi(engine: Engine) -> dict[str, Any]:
    schema = engine.parser.body.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                target = definitions[node["$ref"].rsplit("/", 1)[1]]
                return inlined({**target, **{k: v for k, v in node.items() if k != "$ref"}})
            return {key: inlined(value) for key, value in node.items()}
        return [inlined(value) for value in node] if isinstance(node, list) else node

    user_id = {
        "name": "X-User-ID",
        "in": "header",
        "required": False,
        "description": "Names the user; without it nothing is cached.",
        "schema": {"type": "string", "minLength": 1, "maxLength": MAX_USER_ID_BYTES},
    }
    deadline = {
        "name": "X-HBM-Deadline-MS",
        "in": "header",
        "required": False,
        "description": "Latency budget; a request that would miss it is refused with 503.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    }
    return {
        "parameters": [user_id, deadline],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": inlined(schema)}},
        },
    }
