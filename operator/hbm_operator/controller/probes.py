"""/healthz, /readyz and /metrics of the controller."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Final

from aiohttp import web
from hbm_kube.client import KubeClient
from hbm_kube.errors import KubeError
from hbm_kube.resources import HBM_POLICIES
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from hbm_operator.controller.queue import KeyQueue
from hbm_operator.controller.store import Store
from hbm_operator.controller.uninjected import MISSED
from hbm_operator.controller.watching import WATCHED
from hbm_operator.metrics import ControllerMetrics
from hbm_operator.models.base import ConditionStatus

_PLURALS: Final = frozenset(resource.plural for resource in WATCHED)
ASK_S: Final = 4.0
"""How long a probe waits for the API server."""


class Heartbeats:
    """When each watch was last heard of. Written from another thread."""

    def __init__(self, metrics: ControllerMetrics) -> None:
        self._metrics = metrics
        self._heard: dict[str, float] = {}

    def heard(self, plural: str) -> None:
        """A watch said something, be it a bookmark. Other paths are not expected to go on."""
        if plural not in _PLURALS:
            return
        self._heard[plural] = time.monotonic()
        self._metrics.heard(plural)

    def begin(self) -> None:
        """From here on each watch is expected to speak."""
        for resource in WATCHED:
            self._heard.setdefault(resource.plural, time.monotonic())

    def silent(self, longer_than_s: float) -> list[str]:
        """Resources whose watch has not been heard of for so long."""
        now = time.monotonic()
        return [plural for plural, at in self._heard.items() if now - at > longer_than_s]


class Probes:
    """The admin port's answers."""

    def __init__(
        self,
        kube: KubeClient,
        store: Store,
        queue: KeyQueue,
        heartbeats: Heartbeats,
        metrics: ControllerMetrics,
        *,
        stall_s: float,
    ) -> None:
        self._kube = kube
        self._store = store
        self._queue = queue
        self._heartbeats = heartbeats
        self._metrics = metrics
        self._stall_s = stall_s
        self.working = False
        """Everything has been looked at once."""

    def application(self) -> web.Application:
        """For the admin port."""
        application = web.Application()
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_get("/metrics", self._serve_metrics)
        return application

    async def _healthz(self, _: web.Request) -> web.Response:
        silent = self._heartbeats.silent(self._stall_s)
        if not silent:
            return web.Response(text="ok\n")
        # A new process helps against a watch that is stuck, not against an API server that is away.
        try:
            async with asyncio.timeout(ASK_S):
                await self._kube.list(HBM_POLICIES)
        except (KubeError, TimeoutError):
            return web.Response(text="ok: the API server is away\n")
        return web.Response(status=503, text=self._stalled(silent))

    async def _readyz(self, _: web.Request) -> web.Response:
        if not self.working:
            return web.Response(status=503, text="has not looked at everything yet\n")
        if silent := self._heartbeats.silent(self._stall_s):
            return web.Response(status=503, text=self._stalled(silent))
        return web.Response(text="ok\n")

    def _stalled(self, silent: list[str]) -> str:
        return f"no sign of life for {self._stall_s:g} s from: {', '.join(silent)}\n"

    async def _serve_metrics(self, _: web.Request) -> web.Response:
        self._count()
        body = generate_latest(self._metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _count(self) -> None:
        """Gauges are counted when somebody asks."""
        self._metrics.queue_depth.set(self._queue.depth())
        conditions: Counter[tuple[str, str]] = Counter()
        degraded: Counter[str] = Counter()
        for partition in self._store.partitions:
            for condition in partition.status.conditions:
                conditions[condition.type, condition.status.value] += 1
                if condition.type == "Degraded" and condition.status == ConditionStatus.TRUE:
                    degraded[condition.reason] += 1
        self._metrics.partitions.clear()
        for (type_, status), number in conditions.items():
            self._metrics.partitions.labels(type_, status).set(number)
        self._metrics.degraded.clear()
        for reason, number in degraded.items():
            self._metrics.degraded.labels(reason).set(number)
        skipped = Counter(pod.skip_reason or MISSED for pod in self._store.uninjected)
        self._metrics.not_injected.clear()
        for reason, number in skipped.items():
            self._metrics.not_injected.labels(reason).set(number)
