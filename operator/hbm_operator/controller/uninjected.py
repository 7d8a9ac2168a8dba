"""Pods that ask for the sidecar and run without it: the webhook was away, or had a reason.

They lack the label that the other watch selects by, so they have watches of their own: one for the
pods that ask themselves, and one per namespace that asks for all its GPU pods.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Final

import structlog
from hbm_kube.client import KubeClient, WatchEvent
from hbm_kube.resources import PODS
from pydantic import ValidationError

from hbm_operator import names
from hbm_operator.controller.store import Store
from hbm_operator.injector.target import has_gpu
from hbm_operator.observed import Pod

_BY_LABEL: Final = f"{names.INJECT_LABEL}=true,{names.INJECTED}!=true"
_BY_NAMESPACE: Final = f"{names.INJECT_LABEL}!=false,{names.INJECTED}!=true"
MISSED: Final = "webhook-missed"
"""Stands for a skip reason where there is none: the webhook was not asked, or did not answer."""


class UninjectedPods:
    """Keeps `Store.uninjected` up to date.

    Args:
        kube: client.
        store: its table `uninjected` is filled.
        namespaces: to look after; empty: all.
        gpu_resources: extended resources that stand for a GPU.
    """

    def __init__(
        self,
        kube: KubeClient,
        store: Store,
        *,
        namespaces: tuple[str, ...],
        gpu_resources: tuple[str, ...],
    ) -> None:
        self._kube = kube
        self._store = store
        self._namespaces = namespaces
        self._gpu_resources = gpu_resources
        self._opted_in: dict[str, asyncio.Task[None]] = {}
        self._wishes = asyncio.Event()
        self._log = structlog.get_logger()

    def namespace_changed(self) -> None:
        """A namespace's wish may be another one; looked at soon."""
        self._wishes.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for namespace in self._namespaces or (None,):
                tasks.create_task(self._watch(namespace, _BY_LABEL))
            while True:
                self._follow(tasks)
                await self._wishes.wait()
                self._wishes.clear()

    def _follow(self, tasks: asyncio.TaskGroup) -> None:
        wanted = {
            namespace.name
            for namespace in self._store.namespaces.values()
            if namespace.opted_in
            and not namespace.terminating
            and (not self._namespaces or namespace.name in self._namespaces)
        }
        for name in self._opted_in.keys() - wanted:
            self._opted_in.pop(name).cancel()
            for pod in list(self._store.uninjected.within(name).values()):
                if pod.labels.get(names.INJECT_LABEL) != "true":
                    self._store.uninjected.remove(pod)
        for name in wanted - self._opted_in.keys():
            self._opted_in[name] = tasks.create_task(self._watch(name, _BY_NAMESPACE))

    async def _watch(self, namespace: str | None, selector: str) -> None:
        async with aclosing(
            self._kube.watch(PODS, namespace=namespace, label_selector=selector)
        ) as events:
            async for event in events:
                if event.type in ("ADDED", "MODIFIED", "DELETED"):
                    self._take(event)

    def _take(self, event: WatchEvent) -> None:
        try:
            pod = Pod.of(event.object)
        except (ValidationError, KeyError, ValueError) as error:
            self._log.warning("a pod that cannot be read", why=str(error))
            return
        asks = pod.labels.get(names.INJECT_LABEL) == "true" or has_gpu(
            event.object.get("spec") or {}, self._gpu_resources
        )
        if event.type == "DELETED" or pod.terminating or pod.finished or pod.injected or not asks:
            self._store.uninjected.remove(pod)
        else:
            self._store.uninjected.put(pod)
