"""Pooled HTTP/1.1 connections to one backend.

One request is in flight per connection; idle connections form a stack, so that the warmest is
used next and the rest age out. They are closed before the backend's own keep-alive would close
them: that race is the main reason for retries. Bytes that arrive while no request is out void
the connection.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import httptools

if TYPE_CHECKING:
    from hbm_router.fleet import Node

MAX_RESPONSE_HEAD_BYTES: Final = 256 << 10
MAX_RESPONSE_FIELDS: Final = 1000
MAX_IDLE_PER_BACKEND: Final = 1024


class ResponseSink(Protocol):
    """Who gets the response: one exchange."""

    def response_head(self, status: int, phrase: bytes, fields: list[tuple[bytes, bytes]]) -> bool:
        """A final head; `True` when no body follows whatever the fields say (HEAD)."""

    def response_interim(self, status: int, fields: list[tuple[bytes, bytes]]) -> None:
        """A 1xx head other than 100 and 101."""

    def response_body(self, data: bytes) -> None:
        """Decoded body bytes."""

    def response_complete(self, *, reusable: bool) -> None:
        """The response ended as its framing says; `reusable`: so may the connection be."""

    def response_broken(self, reason: str, message: str) -> None:
        """What came is not HTTP; the connection is being closed."""

    def response_flush(self) -> None:
        """All bytes received so far have been delivered."""

    def upstream_lost(self, error: Exception | None) -> None:
        """The connection ended before the response did."""

    def upstream_full(self) -> None:
        """Stop feeding the request."""

    def upstream_drained(self) -> None:
        """Feed it again."""

    def connected(self, connection: UpstreamConnection) -> None:
        """A new connection is ready."""

    def connect_failed(self, error: Exception) -> None:
        """None could be made."""


class UpstreamConnection(asyncio.Protocol):
    """One connection; `sink` is set while a request is in flight on it."""

    __slots__ = (
        "_body_until_end",
        "_complete",
        "_extra",
        "_fields",
        "_head_bytes",
        "_in_head",
        "_interim",
        "_keep_alive",
        "_parser",
        "_phrase",
        "got_bytes",
        "idle_since_s",
        "pool",
        "served",
        "sink",
        "transport",
        "write_paused",
    )

    def __init__(self, pool: UpstreamPool) -> None:
        self.pool = pool
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.sink: ResponseSink | None = None
        self.served = 0
        self.idle_since_s = 0.0
        self.got_bytes = False
        self.write_paused = False
        self._parser: Any = httptools.HttpResponseParser(self)
        self._fields: list[tuple[bytes, bytes]] = []
        self._phrase = b""
        self._head_bytes = 0
        self._in_head = True
        self._interim = False
        self._body_until_end = False
        self._keep_alive = False
        self._complete = False
        self._extra = False

    def begin(self, sink: ResponseSink, data: bytes) -> None:
        """Sends the first bytes of a request whose response goes to `sink`."""
        self.sink = sink
        self.got_bytes = False
        self._head_bytes = 0
        self._body_until_end = False
        self.transport.write(data)

    def done(self, *, reusable: bool) -> None:
        """The exchange is over: back into the pool, or closed."""
        self.sink = None
        self.served += 1
        if reusable and not self.transport.is_closing() and not self.write_paused:
            self.pool.put(self)
        else:
            self.pool.forget(self)
            self.transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        sink = self.sink
        if sink is None:
            self.pool.forget(self)
            self.transport.abort()
            return
        self.got_bytes = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._broken("backend_garbage", "the backend switched protocols unasked")
            return
        except httptools.HttpParserError as error:
            cause = error.__context__
            if cause is not None and not isinstance(cause, httptools.HttpParserError):
                raise cause from None
            self._broken("backend_garbage", f"the backend's answer is not HTTP: {error}")
            return
        if self.sink is not sink:
            return
        if self._complete:
            self._complete = False
            sink.response_complete(reusable=self._keep_alive and not self._extra)
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_RESPONSE_HEAD_BYTES:
                self._broken(
                    "backend_head_too_large",
                    f"the backend's headers exceed {MAX_RESPONSE_HEAD_BYTES} bytes",
                )
                return
        sink.response_flush()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.pool.forget(self)
        sink, self.sink = self.sink, None
        if sink is None:
            return
        if self._body_until_end and exc is None:
            sink.response_complete(reusable=False)
        else:
            sink.upstream_lost(exc)

    def pause_writing(self) -> None:
        self.write_paused = True
        if self.sink is not None:
            self.sink.upstream_full()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.sink is not None:
            self.sink.upstream_drained()

    # -- httptools callbacks

    def on_message_begin(self) -> None:
        if self._complete:
            self._extra = True  # a second answer to one request: do not trust this connection
            return
        self._fields = []
        self._phrase = b""
        self._in_head = True

    def on_status(self, phrase: bytes) -> None:
        self._phrase += phrase

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: ends here (RFC 9110, 6.5.1)
        self._head_bytes += len(name) + len(value)
        if len(self._fields) >= MAX_RESPONSE_FIELDS or self._head_bytes > MAX_RESPONSE_HEAD_BYTES:
            self._broken("backend_head_too_large", "the backend's headers are too large")
            return
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        sink = self.sink
        if sink is None or self._complete:
            return
        status = self._parser.get_status_code()
        self._interim = 100 <= status < 200
        if self._interim:
            if status not in (100, 101):
                sink.response_interim(status, self._fields)
            return
        self._in_head = False
        framed = status in (204, 304)
        for name, _ in self._fields:
            if name.lower() in (b"content-length", b"transfer-encoding"):
                framed = True
                break
        self._body_until_end = not framed
        self._keep_alive = framed and bool(self._parser.should_keep_alive())
        if sink.response_head(status, self._phrase, self._fields):
            # The parser would wait for the body that a HEAD response announces but does not have.
            self._keep_alive = False
            self._complete = True

    def on_body(self, data: bytes) -> None:
        if self.sink is not None and not self._complete:
            self.sink.response_body(data)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
            return
        self._in_head = True
        self._head_bytes = 0
        self._complete = True

    def _broken(self, reason: str, message: str) -> None:
        sink, self.sink = self.sink, None
        self.pool.forget(self)
        self.transport.abort()
        if sink is not None:
            sink.response_broken(reason, message)


class UpstreamPool:
    """All connections to one backend."""

    def __init__(
        self, node: Node, connect_timeout_s: float, idle_s: float, clock: Callable[[], float]
    ) -> None:
        self.node = node
        self._clock = clock
        self._host = node.backend.host
        self._port = node.backend.port
        self._connect_timeout_s = connect_timeout_s
        self._idle_s = idle_s
        self._idle: list[UpstreamConnection] = []
        self._open: set[UpstreamConnection] = set()
        self._connecting: set[asyncio.Task[None]] = set()

    @property
    def idle_connections(self) -> int:
        """Connections that wait for a request."""
        return len(self._idle)

    @property
    def open_connections(self) -> int:
        """All connections, busy or idle."""
        return len(self._open)

    def take(self, now_s: float) -> UpstreamConnection | None:
        """The most recently used idle connection, or `None`."""
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.transport.is_closing():
                continue
            if now_s - connection.idle_since_s > self._idle_s:
                self.forget(connection)
                connection.transport.abort()
                continue
            return connection
        return None

    def connect(self, sink: ResponseSink) -> asyncio.Task[None]:
        """Starts a new connection for `sink`; cancel the task when it is not wanted any more."""
        task = asyncio.get_running_loop().create_task(self._connect(sink))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return task

    async def _connect(self, sink: ResponseSink) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: UpstreamConnection(self), self._host, self._port
                )
        except (OSError, UnicodeError) as error:  # a host name may be no name at all
            sink.connect_failed(error)
            return
        self._open.add(connection)
        sink.connected(connection)

    def put(self, connection: UpstreamConnection) -> None:
        """Takes back a connection whose response is complete."""
        if self.node.index < 0 or len(self._idle) >= MAX_IDLE_PER_BACKEND:
            self.forget(connection)
            connection.transport.abort()
            return
        connection.idle_since_s = self._clock()
        self._idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        """The connection is gone or going."""
        self._open.discard(connection)
        if connection.sink is None and connection in self._idle:
            self._idle.remove(connection)

    def sweep(self, now_s: float) -> None:
        """Closes idle connections that have waited too long (the oldest lie at the bottom)."""
        keep = 0
        for connection in self._idle:
            if now_s - connection.idle_since_s <= self._idle_s:
                break
            keep += 1
        expired, self._idle = self._idle[:keep], self._idle[keep:]
        for connection in expired:
            self._open.discard(connection)
            connection.transport.abort()

    def close(self) -> None:
        """Closes what is idle; busy connections close when their exchange ends."""
        expired, self._idle = self._idle, []
        for connection in expired:
            self._open.discard(connection)
            connection.transport.abort()

    def abort(self) -> None:
        """Closes everything."""
        for task in list(self._connecting):
            task.cancel()
        self.close()
        for connection in list(self._open):
            connection.transport.abort()
