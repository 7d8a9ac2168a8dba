"""What the API refuses, by what a caller can do about it."""

from __future__ import annotations

from typing import Any, Final

import orjson

MAX_MESSAGE: Final = 512


class KubeConfigError(Exception):
    """Server or credentials cannot be found; the text says what is missing."""


class KubeError(Exception):
    """A request that failed.

    Attributes:
        code: HTTP status; 0 where no answer came.
        reason: `reason` of the Status that came back, such as AlreadyExists; may be empty.
        retry_after_s: what the server asks to wait, seconds; None where it does not say.
    """

    def __init__(
        self,
        message: str,
        *,
        code: int = 0,
        reason: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.retry_after_s = retry_after_s


class Unauthorized(KubeError):
    """401: the token is not, or no longer, one that the server knows."""


class Forbidden(KubeError):
    """403: not allowed by RBAC, by an admission policy, or by a quota."""


class NotFound(KubeError):
    """404: no such object, or no such resource (its CRD is not installed)."""


class Conflict(KubeError):
    """409: exists already, another owner of the field, or a precondition that does not hold."""


class Gone(KubeError):
    """410: that resource version, or that page of a list, is no longer kept."""


class Invalid(KubeError):
    """400, 413, 415, 422: the server does not accept such an object or request."""


class TooManyRequests(KubeError):
    """429: nothing was done; the server says when to come again."""


class Unavailable(KubeError):
    """5xx, no connection, no answer in time, or an answer that is cut short."""


_BY_CODE: Final[dict[int, type[KubeError]]] = {
    400: Invalid,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    413: Invalid,
    415: Invalid,
    422: Invalid,
    429: TooManyRequests,
}


def from_answer(code: int, body: bytes, what: str, retry_after: str | None = None) -> KubeError:
    """The error that an answer means.

    Args:
        code: HTTP status.
        body: a Status object in JSON, or whatever a proxy in between has said.
        what: the request, for the message.
        retry_after: the header of that name; only seconds are understood.
    """
    try:
        status = orjson.loads(body)
    except orjson.JSONDecodeError:
        status = {"message": body[:MAX_MESSAGE].decode(errors="replace").strip()}
    return from_status(status if isinstance(status, dict) else {}, code, what, retry_after)


def from_status(
    status: dict[str, Any], code: int, what: str, retry_after: str | None = None
) -> KubeError:
    """The error that a Status object means. `code`: in case it names none itself."""
    found = status.get("code")
    code = found if isinstance(found, int) else code
    kind = _BY_CODE.get(code, Unavailable if code >= 500 else KubeError)
    message = str(status.get("message") or "no reason given")[:MAX_MESSAGE]
    return kind(
        f"{what}: {code} {message}",
        code=code,
        reason=str(status.get("reason") or ""),
        retry_after_s=_seconds(status, retry_after),
    )


def _seconds(status: dict[str, Any], header: str | None) -> float | None:
    details = status.get("details")
    said = details.get("retryAfterSeconds") if isinstance(details, dict) else None
    try:
        seconds = float(header if header is not None else said)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return seconds if 0.0 <= seconds < float("inf") else None
