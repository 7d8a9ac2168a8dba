"""One request on its way through: from its head to the last byte of the response.

States: waiting (for a connection, or for the backend's answer) -> answering -> done. Whatever
happens, `_settle` runs exactly once: it takes the request off its node's load.

A second try is made at most once, only before the client got any byte, only within the retry
budget, only while the request bytes sent so far are still at hand, and only where sending them
twice does no harm: nothing reached the first node (no connection), or a kept-alive connection was
closed under us before any response byte, or the request changes nothing on the server (an
idempotent method, or a POST to a path of `pure_paths`).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from hbm_router import wire
from hbm_router.choice import Choice, Facts
from hbm_router.fleet import Node, Ticket
from hbm_router.request import IDEMPOTENT, RequestHead
from hbm_router.wire import Refusal

if TYPE_CHECKING:
    from hbm_router.client import ClientConnection
    from hbm_router.dataplane import Dataplane
    from hbm_router.upstream import UpstreamConnection

CLIENT_GONE: Final = 499
"""Status in the metrics of a request whose client left (nginx's convention)."""


class Exchange:
    """Joins one request of a client connection with one response of a backend."""

    __slots__ = (
        "_body",
        "_body_bytes",
        "_choice",
        "_close_delimited",
        "_connecting",
        "_facts",
        "_head_bytes",
        "_kept",
        "_out",
        "_plane",
        "_rechunk",
        "_replayable",
        "_sent_s",
        "_started_ns",
        "_status",
        "_ticket",
        "_to_send",
        "_tried",
        "_upstream",
        "answered",
        "client",
        "done",
        "head",
        "keep_alive",
        "progress_s",
        "refusal",
        "request_complete",
        "started",
    )

    def __init__(self, client: ClientConnection, plane: Dataplane, head: RequestHead) -> None:
        self.client = client
        self.head = head
        self.keep_alive = True
        """Whether the client connection may serve another request after this one."""
        self.refusal: Refusal | None = None
        """An answer decided while the head was read."""
        self.started = False
        self.answered = False
        """A final response head has been written to the client."""
        self.done = False
        self.request_complete = False
        self.progress_s = 0.0
        self._plane = plane
        self._facts: Facts | None = None
        self._choice: Choice | None = None
        self._ticket: Ticket | None = None
        self._upstream: UpstreamConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._head_bytes = b""
        self._body: list[bytes] = []  # kept for a second try, or until there is a connection
        self._to_send: list[bytes] = []  # not yet written to the connection
        self._body_bytes = 0
        self._kept = True
        self._replayable = True
        self._tried: Node | None = None
        self._rechunk = False
        self._close_delimited = False
        self._out: list[bytes] = []
        self._started_ns = 0
        self._sent_s = 0.0
        self._status = 0

    # -- the client's side

    def start(self) -> None:
        """The head is complete and all earlier responses of this connection are out."""
        self.started = True
        self._started_ns = time.perf_counter_ns()
        plane = self._plane
        self.progress_s = plane.now_s()
        refusal = self.refusal or plane.refuse()
        if refusal is not None:
            self.fail(refusal)
            return
        self._facts = plane.facts(self.head)
        self._head_bytes = self.head.upstream_head(self.client.peer)
        choice = plane.choose(self._facts, None)
        if isinstance(choice, Refusal):
            self.fail(choice)
            return
        if self.head.expect_continue and not self.request_complete:
            self.client.write(wire.CONTINUE)
        self._dispatch(choice)

    def body(self, data: bytes) -> None:
        """Body bytes of the client."""
        if self.done:
            return
        self._body_bytes += len(data)
        limit = self._plane.settings.max_body_bytes
        if limit and self._body_bytes > limit:
            refusal = Refusal(
                413,
                "body_too_large",
                f"the body exceeds the limit of {limit} bytes",
                field="body",
            )
            if self.started:
                self._give_up(refusal)
            elif self.refusal is None:
                self.refusal = refusal
            return
        self._keep_body(wire.chunk(data) if self.head.chunked else data)

    def body_complete(self) -> None:
        """The request has ended."""
        self.request_complete = True
        if not self.done and self.head.chunked:
            self._keep_body(wire.LAST_CHUNK)

    def _keep_body(self, framed: bytes) -> None:
        if self._kept:
            self._body.append(framed)
            if self._body_bytes > self._plane.settings.replay_bytes:
                self._replayable = False
                if self._upstream is None:
                    self.client.pause_reading_for_connection()
                else:
                    self._body.clear()
                    self._kept = False
        if self._upstream is not None:
            self._to_send.append(framed)

    def flush_request(self, now_s: float) -> None:
        """Everything the client sent so far has been delivered here."""
        self.progress_s = now_s
        if self._to_send and self._upstream is not None:
            data = b"".join(self._to_send)
            self._to_send.clear()
            self._upstream.transport.write(data)

    def cancel(self) -> None:
        """The client is gone."""
        if self.done:
            return
        self.keep_alive = False
        self._drop_upstream()
        self._finish(CLIENT_GONE)

    def client_paused(self) -> None:
        """The client reads slower than the backend writes."""
        if self._upstream is not None and not self._upstream.transport.is_closing():
            self._upstream.transport.pause_reading()

    def client_resumed(self) -> None:
        """It has caught up."""
        self.progress_s = self._plane.now_s()
        if self._upstream is not None and not self._upstream.transport.is_closing():
            self._upstream.transport.resume_reading()

    # -- choosing and connecting

    def _dispatch(self, choice: Choice, *, fresh: bool = False) -> None:
        assert self._facts is not None
        plane = self._plane
        self._choice = choice
        self._ticket = plane.admit(choice, self._facts)
        pool = plane.pool(choice.node)
        connection = None if fresh else pool.take(self.progress_s)
        if connection is None:
            self._connecting = pool.connect(self)
        else:
            self._bind(connection)

    def connected(self, connection: UpstreamConnection) -> None:
        self._connecting = None
        if self.done:
            connection.done(reusable=True)
            return
        assert self._choice is not None
        self._plane.outlier.reached(self._choice.node)
        self._bind(connection)

    def connect_failed(self, error: Exception) -> None:
        self._connecting = None
        if self.done:
            return
        assert self._choice is not None
        node = self._choice.node
        timed_out = isinstance(error, TimeoutError)
        if timed_out:
            self._plane.outlier.failed(node)
        else:
            self._plane.outlier.unreachable(node)
        if self._retry("connect"):
            return
        if timed_out:
            message = f"backend {node.name} did not accept a connection in time"
            self.fail(Refusal(504, "connect_timeout", message))
        else:
            message = f"backend {node.name} cannot be reached: {error}"
            self.fail(Refusal(502, "connect_failed", message))

    def _bind(self, connection: UpstreamConnection) -> None:
        self._upstream = connection
        self._sent_s = self.progress_s = self._plane.now_s()
        connection.begin(self, b"".join([self._head_bytes, *self._body]))
        self._to_send.clear()
        if not self._replayable:
            self._body.clear()
            self._kept = False
        self.client.resume_reading_for_connection()

    # -- the backend's side

    def response_interim(self, status: int, fields: list[tuple[bytes, bytes]]) -> None:
        if self.done or self.head.version != b"1.1" or status not in wire.STATUS_LINES:
            return
        head = [wire.STATUS_LINES[status]]
        head += [b"%b: %b\r\n" % pair for pair in fields if pair[0].lower() not in wire.HOP_BY_HOP]
        self._out.append(b"".join(head) + b"\r\n")

    def response_head(self, status: int, phrase: bytes, fields: list[tuple[bytes, bytes]]) -> bool:
        if self.done:
            return True
        choice, plane = self._choice, self._plane
        assert choice is not None
        assert self._facts is not None
        now_s = plane.now_s()
        plane.metrics.upstream_ttfb_s.observe(now_s - self._sent_s)
        self.progress_s = now_s
        self.answered = True
        self._status = status
        self._body.clear()
        self._kept = False
        if not self.request_complete:
            self.keep_alive = False
        if plane.draining:
            self.keep_alive = False

        lines = [wire.STATUS_LINES.get(status) or b"HTTP/1.1 %d %b\r\n" % (status, phrase)]
        told: dict[bytes, bytes] = {}
        named: frozenset[bytes] = frozenset()
        framed = request_id_seen = False
        for name, value in fields:
            key = name.lower()
            action = wire.RESPONSE_FIELDS.get(key)
            if action is not None:
                if action == wire.TELLS:
                    told[key] = value
                elif action == wire.LENGTH:
                    framed = True
                elif action == wire.ID:
                    request_id_seen = True
                else:
                    if action == wire.CONNECTION:
                        named |= {token.strip().lower() for token in value.split(b",")}
                    continue
            lines += (name, b": ", value, b"\r\n")
        named -= {b"close", b"keep-alive", b"content-length", b"upgrade", b"", wire.REQUEST_ID}
        if named:
            lines[1:] = wire.without(lines[1:], named)
        no_body = self.head.method == b"HEAD" or status in (204, 304)
        self._rechunk = self._close_delimited = False
        if not framed and not no_body:
            if self.head.version == b"1.1":
                self._rechunk = True
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self._close_delimited = True
                self.keep_alive = False
        if not request_id_seen:
            lines.append(b"%b: %b\r\n" % (wire.REQUEST_ID, self.head.request_id))
        lines.append(choice.header_lines(retried=self._tried is not None))
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        elif self.head.version == b"1.0":
            lines.append(b"connection: keep-alive\r\n")
        lines.append(b"\r\n")
        self._out.append(b"".join(lines))
        plane.learn(choice, self._facts, self.head, status, told)
        return self.head.method == b"HEAD"

    def response_body(self, data: bytes) -> None:
        if not self.done:
            self._out.append(wire.chunk(data) if self._rechunk else data)

    def response_flush(self) -> None:
        if self._out and not self.done:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
            self._out.clear()
            self.progress_s = self._plane.now_s()
            self.client.write(data)

    def response_complete(self, *, reusable: bool) -> None:
        if self.done:
            return
        if self._rechunk:
            self._out.append(wire.LAST_CHUNK)
        self.response_flush()
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            if self.client.writing_paused and not upstream.transport.is_closing():
                upstream.transport.resume_reading()
            upstream.done(reusable=reusable and self.request_complete)
        self._finish(self._status)

    def response_broken(self, reason: str, message: str) -> None:
        assert self._choice is not None
        self._upstream = None
        self._plane.outlier.failed(self._choice.node)
        self._give_up(Refusal(502, reason, f"{message} (backend {self._choice.node.name})"))

    def upstream_lost(self, error: Exception | None) -> None:
        if self.done:
            return
        assert self._choice is not None
        node, connection = self._choice.node, self._upstream
        self._upstream = None
        assert connection is not None
        if self.answered:
            self._plane.outlier.failed(node)
            self._cut_short("backend_closed")
            return
        if connection.served == 0:
            # A kept-alive connection may be closed at any time; a new one should not be.
            self._plane.outlier.failed(node)
        harmless = (
            connection.served > 0
            or self.head.method in IDEMPOTENT
            or self.head.target.startswith(self._plane.pure_paths)
        )
        if not connection.got_bytes and harmless and self._retry("closed", fresh=True):
            return
        detail = f": {error}" if error else ""
        self.fail(
            Refusal(
                502,
                "backend_closed",
                f"backend {node.name} closed the connection before it answered{detail}",
            )
        )

    def upstream_full(self) -> None:
        self.client.pause_reading_for_upstream()

    def upstream_drained(self) -> None:
        self.progress_s = self._plane.now_s()
        self.client.resume_reading_for_upstream()

    # -- ends

    def _retry(self, reason: str, *, fresh: bool = False) -> bool:
        """Tries once more, elsewhere; with `fresh` on a new connection to the same node if there
        is no other. `False`: it may not, or cannot."""
        assert self._choice is not None
        assert self._facts is not None
        if self._tried is not None or not self._replayable or self.client.lost:
            return False
        plane, failed = self._plane, self._choice.node
        choice = plane.choose(self._facts, failed)
        if isinstance(choice, Refusal):
            if not fresh or failed.index < 0:
                return False
            choice = plane.choose(self._facts, None)
            if isinstance(choice, Refusal):
                return False
        if not plane.retry_budget.spend():
            plane.metrics.retries_denied.inc()
            return False
        plane.metrics.retries.labels(reason).inc()
        self._settle()
        self._tried = failed
        self._to_send.clear()
        self._dispatch(choice, fresh=fresh)
        return True

    def fail(self, refusal: Refusal) -> None:
        """Answers with an error of our own; the response must not have begun."""
        if self.done:
            return
        self._drop_upstream()
        if not self.request_complete or self._plane.draining:
            self.keep_alive = False
        self.answered = True
        self._plane.metrics.refused(refusal)
        self.client.write(
            wire.refusal_bytes(
                refusal,
                self.head.target,
                self.head.request_id,
                close=not self.keep_alive,
                head_only=self.head.method == b"HEAD",
                extra=self._choice.header_lines(retried=self._tried is not None)
                if self._choice is not None
                else b"",
            )
        )
        self._finish(refusal.status)

    def check_time(self, now_s: float, *, overdue: bool) -> None:
        """Called by the sweeper: gives up on whoever has been silent for too long.

        `overdue`: the client has had its time for the whole request.
        """
        if self.done or not self.started:
            return
        settings = self._plane.settings
        silent_s = now_s - self.progress_s
        if not self.request_complete and (overdue or not self.client.reading_paused):
            if overdue or silent_s > settings.body_timeout_s:
                self._give_up(
                    Refusal(408, "request_timeout", "the request body stopped coming", field="body")
                )
        elif silent_s > settings.response_timeout_s and not self.client.writing_paused:
            assert self._choice is not None
            node = self._choice.node
            self._plane.outlier.failed(node)
            self._give_up(
                Refusal(
                    504,
                    "backend_timeout",
                    f"backend {node.name} was silent for {settings.response_timeout_s} s",
                )
            )

    def _give_up(self, refusal: Refusal) -> None:
        if self.answered:
            self._cut_short(refusal.reason)
        else:
            self.fail(refusal)

    def _cut_short(self, reason: str) -> None:
        """The response has begun and cannot be completed: the client must see that."""
        self._plane.metrics.cut_short.labels(reason).inc()
        self.keep_alive = False
        self._drop_upstream()
        self.response_flush()
        self._finish(self._status, answered=False)
        self.client.cut_off(reset=self._close_delimited)

    def _drop_upstream(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.done(reusable=False)

    def _settle(self) -> None:
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self._plane.release(ticket)

    def _finish(self, status: int, *, answered: bool = True) -> None:
        self.done = True
        self._settle()
        self._body.clear()
        self._to_send.clear()
        self._plane.metrics.finished(status, (time.perf_counter_ns() - self._started_ns) * 1e-9)
        if answered:
            self.client.exchange_done(self)
