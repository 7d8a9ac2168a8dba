"""Kubernetes events: each fact once, written behind the work and never in its way."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final, NamedTuple

import structlog
from hbm_kube.client import KubeClient
from hbm_kube.errors import Conflict, KubeError
from hbm_kube.resources import EVENTS

from hbm_operator import names
from hbm_operator.metrics import ControllerMetrics
from hbm_operator.observed import Reference

REMEMBERED: Final = 10_000
REPEAT_AFTER_S: Final = 3600.0
"""The API server forgets events after an hour."""
WAITING: Final = 2_000


class EventType(StrEnum):
    """Normal, or worth a look."""

    NORMAL = "Normal"
    WARNING = "Warning"


class _Fact(NamedTuple):
    about: Reference
    type: EventType
    reason: str
    message: str

    @property
    def name(self) -> str:
        """The same fact has the same name, also after a restart."""
        text = "\0".join((self.about.uid, self.reason, self.message))
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return f"{self.about.name[:200]}.{digest}"


class EventRecorder:
    """Takes facts at any speed and writes them one after the other; the oldest wait longest, what
    does not fit is counted and left out."""

    def __init__(self, kube: KubeClient, metrics: ControllerMetrics) -> None:
        self._kube = kube
        self._metrics = metrics
        self._said: OrderedDict[str, float] = OrderedDict()
        self._waiting: asyncio.Queue[_Fact] = asyncio.Queue(WAITING)
        self._log = structlog.get_logger()

    def record(
        self, about: Reference, reason: str, message: str, type_: EventType = EventType.NORMAL
    ) -> None:
        """Say it once an hour at most."""
        fact = _Fact(about, type_, reason, message[:1024])
        now = time.monotonic()
        if now - self._said.get(fact.name, float("-inf")) < REPEAT_AFTER_S:
            self._metrics.events.labels("repeated").inc()
            return
        self._said[fact.name] = now
        self._said.move_to_end(fact.name)
        if len(self._said) > REMEMBERED:
            self._said.popitem(last=False)
        try:
            self._waiting.put_nowait(fact)
        except asyncio.QueueFull:
            self._metrics.events.labels("dropped").inc()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            fact = await self._waiting.get()
            try:
                await self._kube.create(EVENTS, _body(fact), fact.about.namespace)
                self._metrics.events.labels("written").inc()
            except Conflict:
                self._metrics.events.labels("repeated").inc()
            except KubeError as error:
                # An event is a courtesy: the same fact stands in a condition.
                self._metrics.events.labels("failed").inc()
                self._log.info("event not written", reason=fact.reason, why=str(error))


def _body(fact: _Fact) -> dict[str, Any]:
    about = fact.about
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": fact.name, "namespace": about.namespace},
        "involvedObject": {
            "apiVersion": about.api_version,
            "kind": about.kind,
            "namespace": about.namespace,
            "name": about.name,
            "uid": about.uid,
        },
        "type": fact.type.value,
        "reason": fact.reason,
        "message": fact.message,
        "source": {"component": names.CONTROLLER_MANAGER},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
