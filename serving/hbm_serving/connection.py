"""uvicorn's HTTP connection with bounds on what comes before a body: size and time of the head."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hbm_serving.http import error_body

HEAD_BYTES = 1 << 16
HEAD_S = 10.0


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes connections whose request head is too long (431) or does not end in time (408).

    Without this a client could hold a connection, and feed its buffers, for ever: a body is
    bounded by the handlers, but no handler runs before the head is complete.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._in_head = True
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        # A head that ended inside `data` has reset the count; what is left is an unfinished one.
        if self._in_head and self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"the request head exceeds {HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        if self._head_timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._forget_timer()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._too_slow)

    def _forget_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(408, f"the request head was not complete after {HEAD_S:g} s")

    def send_400_response(self, msg: str) -> None:
        """Bytes that are no HTTP at all are answered in our form too."""
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        body = error_body("head", message, "request_timeout" if status == 408 else "bad_request")
        reason = {400: "Bad Request", 408: "Request Timeout"}.get(
            status, "Request Header Fields Too Large"
        )
        self.transport.write(
            f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
            + body
        )
        self.transport.close()
