"""Errors of the model server: wrong configuration, wrong requests, refused requests."""

from __future__ import annotations


class ServingError(Exception):
    """Base of all errors of this package."""


class ConfigError(ServingError):
    """The configuration cannot be served; the message names the field and says what to change."""


class RequestError(ServingError):
    """A request the client must change: answered with `status` and a body that names `field`."""

    def __init__(self, field: str, message: str, status: int = 422) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
        self.status = status

    @property
    def reason(self) -> str:
        """The kind of problem as one word, the router's words."""
        return {408: "request_timeout", 413: "body_too_large"}.get(self.status, "bad_request")


class Refused(ServingError):
    """A sound request that is not computed now: answered with 503 and `Retry-After`."""

    def __init__(self, reason: str, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s
