"""The client's side of the proxy: one keep-alive connection, requests parsed as they stream in.

Requests may be pipelined; they are answered one after the other. Reading pauses while a body has
nowhere to go and while earlier responses are out, so that a connection never holds more than a
bounded number of bytes.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, cast

import httptools

from hbm_router.exchange import Exchange
from hbm_router.request import RequestHead
from hbm_router.wire import Refusal

if TYPE_CHECKING:
    from hbm_router.dataplane import Dataplane

MAX_PIPELINED: Final = 64
LINGER_S: Final = 2.0
"""How long bytes that nobody wants are still read, so that a reset does not eat the answer."""


class _Phase(Enum):
    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    LINGER = auto()


class ClientConnection(asyncio.Protocol):
    """One client connection."""

    __slots__ = (
        "_current",
        "_deadline_s",
        "_head",
        "_head_bytes",
        "_parser",
        "_paused_for",
        "_phase",
        "_plane",
        "_queue",
        "_receiving",
        "_refeed",
        "_stalled_s",
        "_stop_parsing",
        "lost",
        "peer",
        "reading_paused",
        "transport",
        "writing_paused",
    )

    _FOR_CONNECTION = 1
    _FOR_UPSTREAM = 2
    _FOR_PIPELINE = 4

    def __init__(self, plane: Dataplane) -> None:
        self._plane = plane
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.peer = b""
        self.lost = False
        self.reading_paused = False
        self.writing_paused = False
        self._paused_for = 0
        self._parser: Any = httptools.HttpRequestParser(self)
        self._phase = _Phase.HEAD
        self._head = RequestHead()
        self._head_bytes = 0
        self._receiving: Exchange | None = None
        self._current: Exchange | None = None
        self._queue: deque[Exchange] = deque()
        self._deadline_s = 0.0
        self._stalled_s = 0.0
        self._stop_parsing = False
        self._refeed = False

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peername = transport.get_extra_info("peername")
        if isinstance(peername, tuple):
            self.peer = str(peername[0]).encode("latin-1", "replace")
        self._deadline_s = self._plane.now_s() + self._plane.settings.head_timeout_s
        refusal = self._plane.connected(self)
        if refusal is not None:
            self._reject(refusal)

    def data_received(self, data: bytes) -> None:
        if self._phase is _Phase.LINGER or self._stop_parsing:
            return
        now_s = self._plane.now_s()
        if self._phase is _Phase.IDLE:
            self._phase = _Phase.HEAD
            self._deadline_s = now_s + self._plane.settings.head_timeout_s
        if self._phase is _Phase.HEAD:
            self._head_bytes += len(data)
        self._feed(data)
        if (
            self._phase is _Phase.HEAD
            and not self._stop_parsing
            and self._head_bytes > self._plane.settings.max_head_bytes
        ):
            self._head_too_large()
        if self._receiving is not None:
            self._receiving.flush_request(now_s)
        self._advance()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._queue.clear()
        self._plane.disconnected(self)
        current, self._current = self._current, None
        self._receiving = None
        if current is not None:
            current.cancel()

    def pause_writing(self) -> None:
        self.writing_paused = True
        self._stalled_s = self._plane.now_s()
        if self._current is not None:
            self._current.client_paused()

    def resume_writing(self) -> None:
        self.writing_paused = False
        if self._current is not None:
            self._current.client_resumed()
        self._advance()

    # -- parsing

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            cause = error.__context__
            if cause is not None and not isinstance(cause, httptools.HttpParserError):
                raise cause from None
            if not self._stop_parsing:
                self._malformed(str(error))

    def _ignore_upgrade(self, rest: bytes) -> None:
        """The parser stops where another protocol would begin. We offer none (RFC 9110, 7.8):
        the same head without the offer is parsed in its place, then what followed it."""
        head = self._head
        if head.method == b"CONNECT" or self._stop_parsing:
            self._refeed = False
            if not self._stop_parsing:
                self._head_complete()
            self._stop_parsing = True
            return
        self._parser = httptools.HttpRequestParser(self)
        self._head = RequestHead()
        again = head.without_upgrade()
        self._refeed = False
        self._feed(again)
        if rest and not self._stop_parsing:
            self._feed(rest)

    def on_message_begin(self) -> None:
        if self._stop_parsing:
            return
        self._head = RequestHead()
        if self._phase is not _Phase.HEAD:
            self._phase = _Phase.HEAD
            self._head_bytes = 1
            self._deadline_s = self._plane.now_s() + self._plane.settings.head_timeout_s

    def on_url(self, url: bytes) -> None:
        self._head.target += url
        self._head.size_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase is not _Phase.HEAD or self._stop_parsing:
            return  # a trailer: ends here (RFC 9110, 6.5.1)
        head, settings = self._head, self._plane.settings
        head.add(name, value)
        if head.size_bytes > settings.max_head_bytes or len(head.fields) > settings.max_headers:
            self._head_too_large()

    def on_headers_complete(self) -> None:
        if self._stop_parsing:
            return
        head = self._head
        head.method = self._parser.get_method()
        head.version = self._parser.get_http_version().encode()
        if self._parser.should_upgrade():
            self._refeed = True
            return
        self._head_complete()

    def _head_complete(self) -> None:
        head, plane = self._head, self._plane
        refusal = head.finish(plane.rng, plane.settings.max_body_bytes)
        exchange = Exchange(self, plane, head)
        exchange.refusal = refusal
        exchange.keep_alive = refusal is None and bool(self._parser.should_keep_alive())
        self._receiving = exchange
        self._phase = _Phase.BODY
        self._deadline_s = plane.now_s() + plane.settings.request_timeout_s
        if self._current is None:
            self._current = exchange
        else:
            self._queue.append(exchange)
            if len(self._queue) >= MAX_PIPELINED:
                exchange.keep_alive = False
                self._stop_parsing = not head.has_body
                if head.has_body:
                    exchange.refusal = Refusal(
                        400, "bad_request", f"more than {MAX_PIPELINED} requests are pipelined"
                    )
                    self._stop_parsing = True

    def on_body(self, data: bytes) -> None:
        if self._receiving is not None and not self._stop_parsing:
            self._receiving.body(data)

    def on_message_complete(self) -> None:
        if self._refeed or self._receiving is None:
            return
        exchange, self._receiving = self._receiving, None
        exchange.body_complete()
        if not exchange.keep_alive:
            self._stop_parsing = True
        self._phase = _Phase.IDLE
        self._head_bytes = 0
        self._deadline_s = self._plane.now_s() + self._plane.settings.keep_alive_s
        if exchange is self._current and exchange.started:
            exchange.flush_request(self._plane.now_s())

    def _head_too_large(self) -> None:
        limits = self._plane.settings
        self._reject(
            Refusal(
                431,
                "bad_request",
                f"the request head exceeds {limits.max_head_bytes} bytes "
                f"or {limits.max_headers} fields",
            )
        )

    def _malformed(self, detail: str) -> None:
        refusal = Refusal(400, "bad_request", f"the request is not valid HTTP: {detail}")
        receiving = self._receiving
        if receiving is None or self._phase is _Phase.HEAD:
            self._reject(refusal)
            return
        # The head was good, its body is not: that exchange is what fails.
        self._stop_parsing = True
        receiving.keep_alive = False
        if receiving.started and not receiving.answered:
            receiving.fail(refusal)
        elif receiving.started:
            self.abort()
        else:
            receiving.refusal = refusal

    def _reject(self, refusal: Refusal) -> None:
        """Answers bytes that never became a request, after the answers that are still due."""
        self._stop_parsing = True
        exchange = Exchange(self, self._plane, self._head)
        exchange.refusal = refusal
        exchange.keep_alive = False
        self._receiving = None
        if self._current is None:
            self._current = exchange
        else:
            self._queue.append(exchange)
        if self._phase is _Phase.HEAD and self._current is exchange:
            self._advance()

    # -- order of responses

    def _advance(self) -> None:
        """Starts the next exchange when its turn has come."""
        current = self._current
        if current is not None and not current.started and not self.writing_paused:
            current.start()
        # Bytes beyond a request that waits for its turn may wait in the socket.
        self._pause(self._FOR_PIPELINE, bool(self._queue))

    def exchange_done(self, exchange: Exchange) -> None:
        """The response is written (or there is no one to write it to)."""
        if self.lost or exchange is not self._current:
            return
        self._current = None
        self._pause(self._FOR_CONNECTION | self._FOR_UPSTREAM, False)
        if not exchange.keep_alive:
            self._queue.clear()
            self._close(linger=not exchange.request_complete or self._receiving is not None)
            return
        if self._queue:
            self._current = self._queue.popleft()
            asyncio.get_running_loop().call_soon(self._advance)
        elif self._plane.draining and self._phase is _Phase.IDLE:
            self._close(linger=False)

    def _close(self, *, linger: bool) -> None:
        self._stop_parsing = True
        self._receiving = None
        if self.transport.is_closing():
            return
        if not linger or not self.transport.can_write_eof():
            self.transport.close()
            return
        self._phase = _Phase.LINGER
        self._deadline_s = self._plane.now_s() + LINGER_S
        self._paused_for = 0
        self._apply_pause()
        self.transport.write_eof()

    def close_if_idle(self) -> None:
        """While draining: a connection without a request is closed at once."""
        if self._current is None and not self._head_bytes and self._phase is not _Phase.LINGER:
            self._close(linger=False)

    def abort(self) -> None:
        """Cuts the connection at once, unsent bytes included."""
        self.transport.abort()

    def cut_off(self, *, reset: bool) -> None:
        """Ends the connection amid a response. A body whose length or chunks the client knows is
        seen to be incomplete when the connection ends; any other only by a reset."""
        self._current = None
        self._stop_parsing = True
        if reset:
            self.transport.abort()
        elif not self.transport.is_closing():
            self.transport.close()

    def write(self, data: bytes) -> None:
        """Bytes of the current response."""
        if not self.lost:
            self.transport.write(data)

    # -- flow control and time

    def pause_reading_for_connection(self) -> None:
        """A large body arrives before there is a connection to the backend."""
        self._pause(self._FOR_CONNECTION, True)

    def resume_reading_for_connection(self) -> None:
        self._pause(self._FOR_CONNECTION, False)

    def pause_reading_for_upstream(self) -> None:
        """The backend reads slower than the client writes."""
        self._pause(self._FOR_UPSTREAM, True)

    def resume_reading_for_upstream(self) -> None:
        self._pause(self._FOR_UPSTREAM, False)

    def _pause(self, reason: int, wanted: bool) -> None:
        paused_for = self._paused_for | reason if wanted else self._paused_for & ~reason
        if paused_for != self._paused_for:
            self._paused_for = paused_for
            self._apply_pause()

    def _apply_pause(self) -> None:
        wanted = self._paused_for != 0
        if wanted == self.reading_paused or self.lost or self.transport.is_closing():
            return
        self.reading_paused = wanted
        if wanted:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def sweep(self, now_s: float) -> None:
        """Ends what takes too long: a slow head, a stalled body, an idle or unread connection."""
        settings = self._plane.settings
        if self.writing_paused and now_s - self._stalled_s > settings.write_stall_s:
            self.abort()
            return
        current = self._current
        if current is not None:
            overdue = self._receiving is current and now_s > self._deadline_s
            current.check_time(now_s, overdue=overdue)
            return
        if now_s <= self._deadline_s:
            return
        if self._phase is _Phase.HEAD and self._head_bytes:
            self._reject(
                Refusal(
                    408,
                    "request_timeout",
                    f"the request head took more than {settings.head_timeout_s} s",
                    field="head",
                )
            )
        elif self._phase is _Phase.LINGER:
            self.abort()
        else:
            self.transport.close()
