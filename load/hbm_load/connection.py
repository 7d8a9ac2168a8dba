"""One HTTP/1.1 client connection: httptools parses, one request is in flight at a time."""

from __future__ import annotations

import asyncio
from typing import NamedTuple, cast

import httptools

from hbm_load.body import HttpRequest


class Response(NamedTuple):
    """A whole response; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class ConnectionLost(Exception):
    """The peer closed, or sent what is not HTTP, before the response was whole."""


class Connection(asyncio.Protocol):
    """Sends a request and waits for its response. Not reusable after an error."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._waiter: asyncio.Future[Response] | None = None
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._keep_alive = True
        self.idle_since_s = 0.0

    @property
    def usable(self) -> bool:
        """Whether another request may be sent."""
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and self._keep_alive
            and self._waiter is None
        )

    async def exchange(self, request: HttpRequest) -> Response:
        """The response to `request`. Raises `ConnectionLost`; cancelling closes the connection."""
        if not self.usable or self._transport is None:
            raise ConnectionLost("connection is closed")
        waiter: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._waiter = waiter
        self._headers, self._body = {}, []
        self._parser = httptools.HttpResponseParser(self)
        self._transport.writelines([request.head, request.body])
        try:
            return await waiter
        except asyncio.CancelledError:
            # A late answer to this request must not be taken for that to the next one.
            self.close()
            raise
        finally:
            self._waiter = None

    def close(self) -> None:
        """Closes at once, without waiting for the peer."""
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses, so there is nothing to assert.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            self._fail("data without a request")
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail("closed by the peer" if exc is None else f"closed: {exc}")

    def _fail(self, reason: str) -> None:
        self._keep_alive = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ConnectionLost(reason))
        self.close()

    # httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        parser, waiter = self._parser, self._waiter
        if parser is None or waiter is None or waiter.done():
            return
        status = parser.get_status_code()
        if status < 200:  # 100 Continue and its like: the real response follows
            self._headers, self._body = {}, []
            return
        if not parser.should_keep_alive():
            self._keep_alive = False
        waiter.set_result(Response(status, self._headers, b"".join(self._body)))


class ConnectionPool:
    """Connections to one address; the one used last is reused first."""

    _MAX_IDLE_S = 4.0
    """Below the keep-alive time of servers, so that a request seldom meets a closing one."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()

    async def exchange(self, request: HttpRequest) -> Response:
        """Sends over an idle or a new connection. Raises OSError or `ConnectionLost`."""
        loop = asyncio.get_running_loop()
        connection = self._take(loop.time())
        if connection is None:
            _, connection = await loop.create_connection(Connection, self._host, self._port)
            self._all.add(connection)
        try:
            response = await connection.exchange(request)
        except BaseException:
            self._all.discard(connection)
            connection.close()
            raise
        connection.idle_since_s = loop.time()
        self._idle.append(connection)
        return response

    def close(self) -> None:
        """Closes every connection."""
        for connection in self._all:
            connection.close()
        self._idle.clear()
        self._all.clear()

    def _take(self, now_s: float) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and now_s - connection.idle_since_s < self._MAX_IDLE_S:
                return connection
            self._all.discard(connection)
            connection.close()
        return None
