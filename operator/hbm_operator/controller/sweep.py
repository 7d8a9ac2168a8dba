"""Going over everything: lists against what events may have missed, and clocks against silence."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

import structlog
from hbm_kube.client import KubeClient
from hbm_kube.errors import KubeError
from hbm_kube.resources import HBM_PARTITIONS, HBM_POLICIES, NAMESPACES, PODS
from pydantic import ValidationError

from hbm_operator import names
from hbm_operator.conditions import is_silent
from hbm_operator.controller.queue import Key, KeyQueue, Kind
from hbm_operator.controller.redis_tenants import RedisTenants
from hbm_operator.controller.store import Namespace, Store
from hbm_operator.models.base import ConditionStatus, find_condition
from hbm_operator.models.partition import ConditionType, Reason
from hbm_operator.models.policy import HBMPolicy
from hbm_operator.observed import Partition, Pod

JITTER: Final = 0.1
_BATCH: Final = 200


def read_namespace(namespace: dict[str, Any]) -> Namespace:
    """The parts of a Namespace that are looked at."""
    metadata = namespace["metadata"]
    wish = (metadata.get("labels") or {}).get(names.NAMESPACE_LABEL)
    return Namespace(metadata["name"], wish == "enabled", bool(metadata.get("deletionTimestamp")))


class Resync:
    """Lists everything and brings the store in line with it."""

    def __init__(
        self,
        kube: KubeClient,
        store: Store,
        queue: KeyQueue,
        namespaces: tuple[str, ...],
        wanted_namespaces: Callable[[], set[str]],
    ) -> None:
        self._kube = kube
        self._store = store
        self._queue = queue
        self._namespaces = namespaces
        self._wanted_namespaces = wanted_namespaces
        self._log = structlog.get_logger()

    async def run(self, period_s: float, chance: random.Random) -> None:
        """Again and again, ± 10 %. A list that fails is left to the next time."""
        while True:
            await asyncio.sleep(period_s * chance.uniform(1 - JITTER, 1 + JITTER))
            try:
                await self.once()
            except KubeError as error:
                self._log.warning("resync failed; the next one will do", why=str(error))

    async def once(self) -> None:
        """Policies first: a pod that is looked at without them would be told to hold."""
        await self._namespaces_once()
        for within in self._namespaces or (None,):
            await self._table(self._store.policies, HBM_POLICIES, HBMPolicy.model_validate, within)
            await self._table(self._store.partitions, HBM_PARTITIONS, Partition.of, within)
            await self._table(
                self._store.pods, PODS, Pod.of, within, label_selector=f"{names.INJECTED}=true"
            )
        self.look_at_everything()

    def look_at_everything(self) -> None:
        """Name every key."""
        for namespace in self._wanted_namespaces():
            self._queue.add(Key(Kind.NAMESPACE, namespace))
        for policy in self._store.policies:
            self._queue.add(Key(Kind.POLICY, policy.metadata.namespace, policy.metadata.name))
        for pod in self._store.pods:
            self._queue.add(Key(Kind.PARTITION, pod.namespace, pod.name))

    async def _table(
        self,
        table: Any,
        resource: Any,
        read: Callable[[Any], Any],
        within: str | None,
        **query: str,
    ) -> None:
        listed = await self._kube.list(resource, namespace=within, **query)
        items = []
        for count, item in enumerate(listed.items):
            if count % _BATCH == _BATCH - 1:
                await asyncio.sleep(0)
            try:
                items.append(read(item))
            except (ValidationError, KeyError, ValueError) as error:
                self._log.error("cannot be read", kind=resource.kind, why=str(error))
        table.replace(items, int(listed.resource_version or 0), within)

    async def _namespaces_once(self) -> None:
        listed = await self._kube.list(NAMESPACES)
        found = [read_namespace(item) for item in listed.items]
        self._store.namespaces = {namespace.name: namespace for namespace in found}


class Sweep:
    """Names the partitions whose sidecar fell silent or speaks again, and counts."""

    def __init__(
        self,
        store: Store,
        queue: KeyQueue,
        redis: RedisTenants,
        wanted_namespaces: Callable[[], set[str]],
        *,
        stale_s: float,
        now: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._queue = queue
        self._redis = redis
        self._wanted_namespaces = wanted_namespaces
        self._stale_s = stale_s
        self._now = now
        self._log = structlog.get_logger()

    async def run(self, period_s: float, chance: random.Random) -> None:
        """Again and again."""
        while True:
            await asyncio.sleep(period_s * chance.uniform(1 - JITTER, 1 + JITTER))
            await self.once()

    async def once(self) -> None:
        """One sweep."""
        now = self._now()
        for count, partition in enumerate(self._store.partitions):
            if count % _BATCH == _BATCH - 1:
                await asyncio.sleep(0)
            pod = self._store.pods.get(partition.namespace, partition.name)
            if pod is None or pod.uid != partition.pod_uid:
                continue
            degraded = find_condition(partition.status.conditions, ConditionType.DEGRADED)
            said_silent = degraded is not None and degraded.reason == Reason.SIDECAR_SILENT
            if is_silent(partition, pod, now, self._stale_s) != said_silent or _twin_due(
                partition, degraded
            ):
                self._queue.add(Key(Kind.PARTITION, partition.namespace, partition.name))
        try:
            restarted = await self._redis.restarted()
        except KubeError as error:
            self._log.info("cannot ask after redis", why=str(error))
            restarted = False
        if restarted:
            self._log.info("redis has restarted; its users are set again")
            for namespace in self._wanted_namespaces():
                self._queue.add(Key(Kind.NAMESPACE, namespace))


def _twin_due(partition: Partition, degraded: Any) -> bool:
    """Whether the twin's silence may have become worth a word."""
    status = partition.status
    silent = status.alpha is not None and status.anchor is None
    said = degraded is not None and degraded.reason == Reason.TWIN_STALE
    return silent != said and (silent or degraded.status == ConditionStatus.TRUE)
