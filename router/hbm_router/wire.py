"""HTTP/1.1 as the proxy writes it: which fields are passed on, and its own answers.

Field names are compared in lower case and passed on as they came. Hop-by-hop fields (RFC 9110
section 7.6.1) end here; message framing is written anew, so that no two parsers ever see the same
ambiguous bytes.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final, NamedTuple

import orjson
from hbm_pool.contracts import headers

HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)

USER_ID: Final = headers.USER_ID.encode()
HISTORY_TOKENS: Final = headers.HISTORY_TOKENS.encode()
CANDIDATES: Final = headers.CANDIDATES.encode()
REQUEST_ID: Final = headers.REQUEST_ID.encode()
DEADLINE_MS: Final = headers.DEADLINE_MS.encode()
KV_REUSED_TOKENS: Final = headers.KV_REUSED_TOKENS.encode()
SERVICE_MS: Final = headers.SERVICE_MS.encode()
QUEUE_MS: Final = headers.QUEUE_MS.encode()
TOP_SHARDS: Final = headers.TOP_SHARDS.encode()
NODE: Final = headers.NODE.encode()
DECISION: Final = headers.DECISION.encode()
DROPPED_REASON: Final = headers.DROPPED_REASON.encode()

DROP, CONNECTION, TELLS, LENGTH, ID, CODING, HOST, EXPECT, FORWARDED, ROUTES = range(10)
RESPONSE_FIELDS: Final = {
    **dict.fromkeys(HOP_BY_HOP, DROP),
    b"connection": CONNECTION,
    # What the router learns from; passed on too.
    **dict.fromkeys(
        (HISTORY_TOKENS, CANDIDATES, KV_REUSED_TOKENS, SERVICE_MS, QUEUE_MS, TOP_SHARDS), TELLS
    ),
    b"content-length": LENGTH,
    REQUEST_ID: ID,
    # Only we say this.
    NODE: DROP,
    DECISION: DROP,
}
"""What is done with a response field; most are passed on and need no look."""
REQUEST_FIELDS: Final = {
    **dict.fromkeys(HOP_BY_HOP, DROP),
    b"connection": CONNECTION,
    b"transfer-encoding": CODING,
    **dict.fromkeys(
        (USER_ID, HISTORY_TOKENS, CANDIDATES, REQUEST_ID, DEADLINE_MS, TOP_SHARDS), ROUTES
    ),
    b"host": HOST,
    b"content-length": LENGTH,
    b"expect": EXPECT,
    b"x-forwarded-for": FORWARDED,
}
"""The same for requests."""

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK: Final = b"0\r\n\r\n"
STATUS_LINES: Final = {
    int(status): f"HTTP/1.1 {int(status)} {status.phrase}\r\n".encode() for status in HTTPStatus
}


class Refusal(NamedTuple):
    """An answer of our own. `dropped` names load shedding, as opposed to an error."""

    status: int
    reason: str
    message: str
    dropped: bool = False
    retry_after_s: int = 0
    field: str = "server"
    """What the client should look at: `head` or `body` of the request, else it is not to blame."""


def without(pieces: list[bytes], named: frozenset[bytes]) -> list[bytes]:
    """Header pieces `name, ": ", value, CRLF, name, …` less the fields of these names."""
    kept: list[bytes] = []
    for start in range(0, len(pieces), 4):
        if pieces[start].lower() not in named:
            kept += pieces[start : start + 4]
    return kept


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body. Empty data would end the body and must not come here."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def non_negative_int(value: bytes | None, limit: int = 1 << 40) -> int | None:
    """A decimal header value, or `None` when it is absent or not one."""
    if value is None or not value.isdigit() or len(value) > 15:
        return None
    number = int(value)
    return number if number <= limit else None


def non_negative_float(value: bytes | None) -> float | None:
    """A finite header value >= 0, or `None` when it is absent or not one."""
    if value is None or len(value) > 32:
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if 0.0 <= number < 1e12 else None


def int_list(value: bytes | None, limit: int = 64) -> tuple[int, ...]:
    """A header value such as `3,17,4`; what is not a number is left out."""
    if not value:
        return ()
    return tuple(int(part) for part in value.split(b",")[:limit] if part.strip().isdigit())


def refusal_bytes(
    refusal: Refusal,
    target: bytes,
    request_id: bytes,
    *,
    close: bool,
    head_only: bool,
    extra: bytes = b"",
) -> bytes:
    """A whole response, its body in the model server's form: what was wrong, and the reason as one
    word. Below `/v2` one string, as the Open Inference Protocol wants it."""
    field = "head" if refusal.reason == "bad_request" else refusal.field
    body = orjson.dumps(
        {"error": f"{field}: {refusal.message}"}
        if target.startswith(b"/v2")
        else {"error": {"field": field, "message": refusal.message, "reason": refusal.reason}}
    )
    parts = [
        STATUS_LINES[refusal.status],
        b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body),
    ]
    if request_id:
        parts.append(b"%b: %b\r\n" % (REQUEST_ID, request_id))
    if refusal.dropped:
        parts.append(b"%b: %b\r\n" % (DROPPED_REASON, refusal.reason.encode()))
    if refusal.retry_after_s:
        parts.append(b"retry-after: %d\r\n" % refusal.retry_after_s)
    if close:
        parts.append(b"connection: close\r\n")
    parts.append(extra)
    parts.append(b"\r\n")
    if not head_only:
        parts.append(body)
    return b"".join(parts)
