"""Which Redis the heartbeats go to: one that is given, or one whose address stands in a file."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final

from hbm_kube.redis_secret import RedisSecret

from hbm_sidecar.metrics import SidecarMetrics
from hbm_sidecar.publisher import Publisher

LOOK_S: Final = 1.0
"""How often the file is looked at."""
LEAVE_S: Final = 1.0


class RedisLink:
    """Keeps at most one `Publisher` beating: the one of the address in force.

    Args:
        url: the address; empty: none.
        secret: where the address stands instead; None: nowhere.
        make_publisher: a publisher for an address. Raises ValueError for one that is none.
    """

    def __init__(
        self,
        url: str,
        secret: RedisSecret | None,
        make_publisher: Callable[[str], Publisher],
        metrics: SidecarMetrics,
        log: Any,
    ) -> None:
        self.publisher: Publisher | None = None
        self.problem = ""
        """Why there is no publisher although there should be one."""
        self._url = url
        self._secret = secret
        self._make_publisher = make_publisher
        self._metrics = metrics
        self._log = log
        self._beating: asyncio.Task[None] | None = None

    @property
    def wanted(self) -> bool:
        """Whether there is, or may come, an address."""
        return bool(self._url) or self._secret is not None

    async def run(self) -> None:
        """Beat, and follow the address, until cancelled; then `leave` is to be called."""
        if not self.wanted:
            return
        if self._url:
            self._turn_to(self._url)
        while True:
            if self._secret is not None:
                await self._follow(self._secret)
            if self._beating is not None and self._beating.done():
                self._beating.result()
            await asyncio.sleep(LOOK_S)

    async def leave(self) -> None:
        """Stop beating and take the node out of the router's sight."""
        beating, publisher = self._beating, self.publisher
        self._beating = self.publisher = None
        if beating is not None:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
        if publisher is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(publisher.leave(), LEAVE_S)

    async def _follow(self, secret: RedisSecret) -> None:
        changed = secret.poll()
        if secret.problem != self.problem:
            self.problem = secret.problem
            if self.problem:
                self._log.warning("no new address of Redis", why=self.problem)
        if not changed or secret.url is None:
            return
        if self.publisher is not None:
            self._log.info("the address of Redis has changed", file=str(secret.path))
            await self.leave()
        self._turn_to(secret.url)

    def _turn_to(self, url: str) -> None:
        try:
            self.publisher = self._make_publisher(url)
        except ValueError as error:
            self.problem = f"not an address of Redis: {type(error).__name__}"
            self._log.warning("no new address of Redis", why=self.problem)
            return
        self._metrics.redis_configured.set(1)
        self._beating = asyncio.create_task(self.publisher.run())
