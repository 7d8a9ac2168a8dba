"""A loopback port of this machine that leads to one address inside the cluster's network.

Connections are only ever made inwards. Run as `python -m hbm_e2e.doorway`: listens first, then
moves into the network namespace and dials from there.
"""

import asyncio
import ctypes
import os
import socket
import sys
from pathlib import Path

from hbm_e2e.daemon import Daemon
from hbm_e2e.network import Place
from hbm_e2e.places import PACKAGE_ROOT
from hbm_e2e.ports import free_ports
from hbm_e2e.waiting import wait_for

CLONE_NEWNET = 0x40000000
CHUNK_BYTES = 1 << 16


class Doorway:
    """The door as a daemon; `port` is the same each time it is opened for a cluster's folder."""

    def __init__(self, folder: Path, place: Place, address: str, port: int) -> None:
        self._port_file = folder / "run" / f"doorway-{address}-{port}.port"
        self.port = self._known_port() or free_ports(1)[0]
        self.daemon = Daemon(
            f"doorway-{address}-{port}",
            [
                *(sys.executable, "-m", "hbm_e2e.doorway"),
                *(str(self.port), place.path, address, str(port)),
            ],
            folder,
        )

    def open(self) -> int:
        """The loopback port, once it accepts."""
        self._port_file.parent.mkdir(parents=True, exist_ok=True)
        self._port_file.write_text(str(self.port))
        self.daemon.start(environ={"PYTHONPATH": str(PACKAGE_ROOT)})
        wait_for(self._accepts, 10, f"{self.daemon.name} to open", because=self.daemon.last_words)
        return self.port

    def _known_port(self) -> int | None:
        try:
            return int(self._port_file.read_text())
        except (OSError, ValueError):
            return None

    def _accepts(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True


def _move_into(namespace: str) -> None:
    descriptor = os.open(namespace, os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(descriptor)


async def _carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while chunk := await source.read(CHUNK_BYTES):
            sink.write(chunk)
            await sink.drain()
        if sink.can_write_eof():
            sink.write_eof()
    except OSError:
        sink.transport.abort()


async def _serve(listener: socket.socket, address: str, port: int) -> None:
    async def pass_through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection(address, port)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(_carry(reader, inner_writer), _carry(inner_reader, writer))
        inner_writer.close()
        writer.close()

    server = await asyncio.start_server(pass_through, sock=listener)
    await server.serve_forever()


def main() -> None:
    own_port, namespace, address, port = sys.argv[1:]
    listener = socket.create_server(("127.0.0.1", int(own_port)), backlog=256)
    _move_into(namespace)
    asyncio.run(_serve(listener, address, int(port)))


if __name__ == "__main__":
    main()
