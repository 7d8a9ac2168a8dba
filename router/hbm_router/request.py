"""A request's head: what the client sent, whether it is acceptable, and what goes upstream.

llhttp already refuses what smuggling is made of (Content-Length beside Transfer-Encoding, repeated
or signed lengths, folded fields, bare line feeds, blanks before colons). What it leaves to its user
is checked here.
"""

from __future__ import annotations

import random
from typing import Final

import httptools

from hbm_router import wire
from hbm_router.wire import Refusal

MAX_TARGET_BYTES: Final = 16 << 10
MAX_REQUEST_ID_BYTES: Final = 256
IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE"})


class RequestHead:
    """Collects a head from parser callbacks; `finish` says what is wrong with it, if anything."""

    __slots__ = (
        "_codings",
        "_connection",
        "_forwarded_for",
        "_hosts",
        "chunked",
        "content_length",
        "expect_continue",
        "fields",
        "known",
        "method",
        "request_id",
        "size_bytes",
        "target",
        "version",
    )

    def __init__(self) -> None:
        self.method = b""
        self.target = b""
        self.version = b"1.1"
        self.fields: list[tuple[bytes, bytes]] = []
        """End-to-end fields in the order and spelling of the client, without the framing."""
        self.known: dict[bytes, bytes] = {}
        """The fields that routing looks at, by lower-case name; the first of repeated ones."""
        self.content_length: int | None = None
        self.chunked = False
        self.expect_continue = False
        self.request_id = b""
        self.size_bytes = 0
        self._codings: list[bytes] = []
        self._connection: list[bytes] = []
        self._hosts: list[bytes] = []
        self._forwarded_for: list[bytes] = []

    @property
    def has_body(self) -> bool:
        """Whether body bytes follow the head."""
        return self.chunked or bool(self.content_length)

    def add(self, name: bytes, value: bytes) -> None:
        """One header field as parsed."""
        self.size_bytes += len(name) + len(value) + 4
        key = name.lower()
        action = wire.REQUEST_FIELDS.get(key)
        if action is None:
            self.fields.append((name, value))
        elif action == wire.ROUTES:
            self.known.setdefault(key, value)
            self.fields.append((name, value))
        elif action == wire.HOST:
            self._hosts.append(value)
            self.fields.append((name, value))
        elif action == wire.LENGTH:
            self.content_length = int(value)
        elif action == wire.CONNECTION:
            self._connection.append(value)
        elif action == wire.CODING:
            self._codings.append(value)
            self.chunked = True
        elif action == wire.EXPECT:
            self.expect_continue = True
            self.known[key] = value
        elif action == wire.FORWARDED:
            self._forwarded_for.append(value)

    def finish(self, rng: random.Random, max_body_bytes: int) -> Refusal | None:
        """Checks the head, completes it (request id, origin-form target)."""
        given = self.known.get(wire.REQUEST_ID)
        if given and len(given) <= MAX_REQUEST_ID_BYTES:
            self.request_id = given
        elif given:
            return Refusal(
                400, "bad_request", f"X-Request-ID has {len(given)} bytes; at most 256 are allowed"
            )
        else:
            self.request_id = b"%032x" % rng.getrandbits(128)
            self.fields = [pair for pair in self.fields if pair[0].lower() != wire.REQUEST_ID]
            self.fields.append((wire.REQUEST_ID, self.request_id))
        if self.method == b"CONNECT":
            return Refusal(405, "bad_request", "CONNECT is not offered here")
        if len(self.target) > MAX_TARGET_BYTES:
            return Refusal(414, "bad_request", f"the request target exceeds {MAX_TARGET_BYTES} B")
        if self.version not in (b"1.1", b"1.0"):
            return Refusal(505, "bad_request", "only HTTP/1.0 and HTTP/1.1 are spoken here")
        if len(self._hosts) > 1 or (self.version == b"1.1" and not self._hosts):
            return Refusal(
                400, "bad_request", f"{len(self._hosts)} Host fields; exactly one is needed"
            )
        if self.chunked and self.version == b"1.0":
            return Refusal(400, "bad_request", "HTTP/1.0 has no Transfer-Encoding")
        if self.chunked and b", ".join(self._codings).strip().lower() != b"chunked":
            return Refusal(501, "bad_request", "the only transfer coding known here is chunked")
        expectation = self.known.get(b"expect", b"100-continue")
        if expectation.lower() != b"100-continue":
            return Refusal(417, "bad_request", "the only expectation known here is 100-continue")
        if max_body_bytes and (self.content_length or 0) > max_body_bytes:
            return Refusal(
                413,
                "body_too_large",
                f"the body has {self.content_length} bytes; at most {max_body_bytes} are allowed",
                field="body",
            )
        if not self.target.startswith(b"/") and self.target != b"*":
            return self._take_absolute_target()
        return None

    def _take_absolute_target(self) -> Refusal | None:
        """`GET http://host/path` becomes `GET /path`, and its host wins (RFC 9112, 3.2.2)."""
        try:
            parts = httptools.parse_url(self.target)
        except httptools.HttpParserError:
            parts = None
        if parts is None or parts.schema not in (b"http", b"https") or not parts.host:
            return Refusal(400, "bad_request", "the request target must start with '/'")
        host = parts.host if parts.port is None else b"%b:%d" % (parts.host, parts.port)
        self.target = (parts.path or b"/") + (b"?" + parts.query if parts.query else b"")
        self.fields = [pair for pair in self.fields if pair[0].lower() != b"host"]
        self.fields.insert(0, (b"Host", host))
        return None

    def upstream_head(self, peer: bytes) -> bytes:
        """The head as the backend gets it: always HTTP/1.1, framing written by us.

        `peer` is the client's address, appended to X-Forwarded-For.
        """
        fields = self.fields
        if self._connection:
            named = {
                token.strip().lower() for value in self._connection for token in value.split(b",")
            } - {b"close", b"keep-alive", b"", wire.REQUEST_ID, b"host"}
            if named:
                fields = [pair for pair in fields if pair[0].lower() not in named]
        parts = [b"%b %b HTTP/1.1\r\n" % (self.method, self.target)]
        for name, value in fields:
            parts += (name, b": ", value, b"\r\n")
        if peer:
            self._forwarded_for.append(peer)
            parts.append(b"x-forwarded-for: %b\r\n" % b", ".join(self._forwarded_for))
        if not self._hosts and self.version == b"1.0":
            parts.append(b"host: \r\n")
        if self.chunked:
            parts.append(b"transfer-encoding: chunked\r\n\r\n")
        elif self.content_length is not None:
            parts.append(b"content-length: %d\r\n\r\n" % self.content_length)
        else:
            parts.append(b"\r\n")
        return b"".join(parts)

    def without_upgrade(self) -> bytes:
        """The head as it came, less the offer to switch protocols."""
        fields = list(self.fields)
        fields += [(b"x-forwarded-for", value) for value in self._forwarded_for]
        fields += [(b"transfer-encoding", value) for value in self._codings]
        if self.content_length is not None:
            fields.append((b"content-length", b"%d" % self.content_length))
        if self.expect_continue:
            fields.append((b"expect", self.known[b"expect"]))
        kept = [
            token.strip()
            for value in self._connection
            for token in value.split(b",")
            if token.strip().lower() not in (b"upgrade", b"http2-settings", b"")
        ]
        if kept:
            fields.append((b"connection", b", ".join(kept)))
        lines = b"".join([b"%b: %b\r\n" % pair for pair in fields])
        return b"%b %b HTTP/%b\r\n%b\r\n" % (self.method, self.target, self.version, lines)
