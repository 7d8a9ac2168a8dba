"""HTTP from the client's side: raw bytes out, responses read by another parser than the
router's."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import h11

from tests.hbm_router.waiting import DEADLINE_S


@dataclasses.dataclass
class Reply:
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    interim: list[int] = dataclasses.field(default_factory=list)

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, f"{name} is there {len(values)} times"
        return values[0] if values else None

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One client connection; writes raw bytes, reads responses with h11 (another parser than the
    router's)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._left = b""

    @classmethod
    async def connect(cls, port: int, limit: int = 1 << 16) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=limit))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def reply(self, method: str = "GET") -> Reply:
        """Reads the next response."""
        connection = h11.Connection(h11.CLIENT)
        connection.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        connection.send(h11.EndOfMessage())
        if self._left:
            connection.receive_data(self._left)
        head: h11.Response | None = None
        body = bytearray()
        interim: list[int] = []
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                async with asyncio.timeout(DEADLINE_S):
                    data = await self.reader.read(65536)
                if not data and head is None:
                    raise ConnectionResetError("the connection was closed without a response")
                connection.receive_data(data)
            elif isinstance(event, h11.InformationalResponse):
                interim.append(event.status_code)
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                assert head is not None
                self._left = connection.trailing_data[0]
                headers = [(key.decode(), value.decode()) for key, value in head.headers]
                return Reply(head.status_code, headers, bytes(body), interim)

    async def ask(self, data: bytes, method: str = "GET") -> Reply:
        self.send(data)
        return await self.reply(method)

    async def closed(self) -> bytes:
        """Waits for the end of the connection; returns what was still sent."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                return self._left + await self.reader.read(-1)
            except ConnectionError:
                return self._left

    def abort(self) -> None:
        self.writer.transport.abort()


def post(
    path: str = "/v1/rank", user: str | None = None, body: bytes = b"{}", **headers: str
) -> bytes:
    """A POST with a Content-Length; `x_request_id="a"` becomes `x-request-id: a`."""
    lines = [f"POST {path} HTTP/1.1", "Host: router", f"Content-Length: {len(body)}"]
    if user is not None:
        lines.append(f"X-User-ID: {user}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def get(path: str = "/", **headers: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: router"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@contextlib.asynccontextmanager
async def connection(port: int) -> AsyncIterator[Client]:
    client = await Client.connect(port)
    try:
        yield client
    finally:
        client.abort()
