"""The HTTP request of one trace entry: `POST /v1/rank` with the full history."""

from __future__ import annotations

from typing import NamedTuple

import orjson
from hbm_pool.contracts import headers

from hbm_load.trace import TraceRequest

PATH = "/v1/rank"


class HttpRequest(NamedTuple):
    """Bytes of one request, head and body."""

    head: bytes
    body: bytes


def rank_request(
    request: TraceRequest,
    host: str,
    request_id: str,
    deadline_ms: float | None = None,
    prefix: str = "",
) -> HttpRequest:
    """Head and body of `request` for the server `host` (`name:port`) below the path `prefix`."""
    body = orjson.dumps(
        {
            "history": {"items": request.items, "timestamps": request.timestamps},
            "candidates": request.candidates,
            "query_time": request.query_time,
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
    lines = [
        f"POST {prefix}{PATH} HTTP/1.1",
        f"host: {host}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"{headers.USER_ID}: {request.user_id}",
        f"{headers.REQUEST_ID}: {request_id}",
        f"{headers.HISTORY_TOKENS}: {len(request.items)}",
        f"{headers.CANDIDATES}: {len(request.candidates)}",
    ]
    if deadline_ms is not None:
        lines.append(f"{headers.DEADLINE_MS}: {deadline_ms:g}")
    return HttpRequest(("\r\n".join(lines) + "\r\n\r\n").encode(), body)
