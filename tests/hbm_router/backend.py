"""A real HTTP server in the test's process that answers as a test wants."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable

import h11


@dataclasses.dataclass
class Received:
    """A request as a backend got it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: int

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key == name]
        return values[0] if values else None


Answer = Callable[[Received, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bool | None]]


def response(
    body: bytes = b"ok", status: int = 200, *, length: bool = True, **headers: str
) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever"]
    if length:
        lines.append(f"content-length: {len(body)}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Backend:
    """A real HTTP server in this process. `answer` may replace its behaviour; it returns True to
    close the connection."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = 0
        self.received: list[Received] = []
        self.answer: Answer = self._echo
        self.connections = 0
        self.open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in list(self.open):
            writer.transport.abort()

    @property
    def requests(self) -> list[Received]:
        """What was received, health checks left out."""
        return [request for request in self.received if request.target != "/v2/health/ready"]

    async def _echo(
        self, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        body = json.dumps(
            {"node": self.name, "target": request.target, "bytes": len(request.body)}
        ).encode()
        if request.method == "HEAD":
            writer.write(response(body).split(b"\r\n\r\n")[0] + b"\r\n\r\n")
        else:
            writer.write(response(body, content_type="application/json"))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        number = self.connections
        self.open.add(writer)
        try:
            while (request := await self._read(reader, number)) is not None:
                self.received.append(request)
                if await self.answer(request, reader, writer):
                    break
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._tasks.discard(task)
            self.open.discard(writer)
            writer.close()

    @staticmethod
    async def _read(reader: asyncio.StreamReader, number: int) -> Received | None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                data = await reader.read(1 << 16)
                if not data:
                    return None
                connection.receive_data(data)
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                assert connection.trailing_data == (b"", False), "bytes beyond one request"
                return Received(
                    head.method.decode(),
                    head.target.decode(),
                    [(key.decode(), value.decode()) for key, value in head.headers],
                    bytes(body),
                    number,
                )
            else:
                return None


def backend_flag(nodes: list[Backend]) -> str:
    return ",".join(f"{node.name}=http://127.0.0.1:{node.port}" for node in nodes)
