"""Active health checks: one small GET per node and interval, on connections of their own."""

from __future__ import annotations

import asyncio
from typing import Final

from hbm_router.config import RouterSettings
from hbm_router.fleet import Fleet, Node
from hbm_router.outlier import OutlierDetector

MAX_CONCURRENT: Final = 64


class Prober:
    """Asks every node for `probe_path`. Below 500 is healthy: a backend without that path answers
    404 and is alive."""

    def __init__(self, settings: RouterSettings, fleet: Fleet, outlier: OutlierDetector) -> None:
        self._settings = settings
        self._fleet = fleet
        self._outlier = outlier
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)

    async def run(self) -> None:
        """Checks all nodes each interval, until cancelled."""
        interval_s = self._settings.probe_interval_s
        if interval_s == 0:
            return
        while True:
            await asyncio.gather(*(self._probe(node) for node in list(self._fleet.nodes)))
            await asyncio.sleep(interval_s)

    async def _probe(self, node: Node) -> None:
        async with self._slots:
            try:
                async with asyncio.timeout(self._settings.probe_timeout_s):
                    status = await self._ask(node)
            except TimeoutError:
                self._outlier.probed(node, reachable=True, good=False)
            except (OSError, UnicodeError):
                self._outlier.probed(node, reachable=False, good=False)
            else:
                self._outlier.probed(node, reachable=True, good=200 <= status < 500)

    async def _ask(self, node: Node) -> int:
        """The status of the answer; 0 when it is not HTTP."""
        backend = node.backend
        reader, writer = await asyncio.open_connection(backend.host, backend.port)
        try:
            writer.write(
                f"GET {self._settings.probe_path} HTTP/1.1\r\nhost: {backend.host}\r\n"
                "user-agent: hbm-router\r\nconnection: close\r\n\r\n".encode()
            )
            line = await reader.readline()
        except (ConnectionError, ValueError):  # reset amid the answer, or a line without end
            return 0
        finally:
            writer.transport.abort()
        parts = line.split(b" ", 2)
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].strip().isdigit():
            return 0
        return int(parts[1])
