"""The controller as a process: its parts put together, its beginning and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import time
from datetime import UTC, datetime
from typing import Any, Final

import structlog
from aiohttp import web
from hbm_kube.client import KubeClient
from hbm_kube.config import KubeConfig
from hbm_kube.errors import Conflict, Forbidden, KubeError, NotFound
from hbm_kube.resources import HBM_PARTITIONS, HBM_POLICIES, NAMESPACES, PODS, Resource
from pydantic import ValidationError

from hbm_operator import names
from hbm_operator.controller.events import EventRecorder
from hbm_operator.controller.namespaces import NamespaceReconciler
from hbm_operator.controller.partitions import PartitionReconciler
from hbm_operator.controller.policies import PolicyReconciler
from hbm_operator.controller.probes import Heartbeats, Probes
from hbm_operator.controller.queue import Key, KeyQueue, Kind
from hbm_operator.controller.reactions import Reactions
from hbm_operator.controller.redis_tenants import RedisTenants, RedisUnavailable
from hbm_operator.controller.settings import Certificates, ControllerSettings
from hbm_operator.controller.store import Store
from hbm_operator.controller.sweep import Resync, Sweep, read_namespace
from hbm_operator.controller.uninjected import UninjectedPods
from hbm_operator.controller.watching import Watching
from hbm_operator.metrics import ControllerMetrics
from hbm_operator.models.policy import HBMPolicy
from hbm_operator.observed import Partition, Pod

ASK_AGAIN_S: Final = 1.0


class ResourcesMissing(Exception):
    """The custom resources are not installed."""


def _now() -> datetime:
    return datetime.now(UTC)


class Controller:
    """All parts, one client, one store, one queue."""

    def __init__(self, settings: ControllerSettings, config: KubeConfig) -> None:
        self._settings = settings
        self._log = structlog.get_logger()
        self._chance = random.Random()
        self._metrics = metrics = ControllerMetrics()
        self._kube = kube = KubeClient(
            config,
            on_request=self._count_request,
            concurrency=settings.concurrency,
            timeout_s=settings.request_timeout_s,
            user_agent="hbm-controller",
        )
        self._store = store = Store()
        self._queue = queue = KeyQueue(
            self._look,
            concurrency=settings.concurrency,
            chance=self._chance,
            on_error=self._failed,
        )
        self._events = events = EventRecorder(kube, metrics)
        self._redis = RedisTenants(kube, settings, metrics)
        partitions = PartitionReconciler(kube, store, events, stale_s=settings.stale_s, now=_now)
        namespaces = NamespaceReconciler(
            kube,
            store,
            self._redis,
            sidecar_cluster_role=settings.sidecar_cluster_role,
            route_namespaces=settings.route_namespaces,
        )
        self._reconcilers = {
            Kind.PARTITION: partitions.reconcile,
            Kind.POLICY: PolicyReconciler(kube, store, now=_now).reconcile,
            Kind.NAMESPACE: namespaces.reconcile,
        }
        Reactions(store, queue, events, partitions)
        within = settings.watch_namespaces
        self._uninjected = UninjectedPods(
            kube, store, namespaces=within, gpu_resources=settings.gpu_resources
        )
        self._resync = Resync(kube, store, queue, within, namespaces.wanted)
        self._sweep = Sweep(
            store, queue, self._redis, namespaces.wanted, stale_s=settings.stale_s, now=_now
        )
        self._heartbeats = Heartbeats(metrics)
        self._probes = Probes(
            kube, store, queue, self._heartbeats, metrics, stall_s=settings.stall_s
        )
        self._watching = Watching(config, within, self._take, self._heartbeats.heard)

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT.

        Raises:
            ResourcesMissing: the custom resources did not appear in time.
            WatchEnded: nothing can be watched any more.
        """
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with self._kube, contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._redis.close)
            port = await self._serve(stack)
            main = asyncio.create_task(self._work(port))
            ending = asyncio.create_task(stop.wait())
            await asyncio.wait({main, ending}, return_when=asyncio.FIRST_COMPLETED)
            for task in (main, ending):
                task.cancel()
            results = await asyncio.gather(main, ending, return_exceptions=True)
        if not stop.is_set() and isinstance(results[0], BaseException):
            raise _first(results[0])
        self._log.info("controller ends")

    async def _work(self, port: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            if self._settings.certs is Certificates.SELF_SIGNED:
                tasks.create_task(self._keep_certificate())  # needs nothing of what follows
            await self._wait_for_resources()
            await self._begin()
            self._heartbeats.begin()
            for part in (
                self._queue.run(),
                self._watching.run(),
                self._uninjected.run(),
                self._events.run(),
                self._resync.run(self._settings.resync_s, self._chance),
                self._sweep.run(self._settings.sweep_s, self._chance),
            ):
                tasks.create_task(part)
            self._probes.working = True
            self._metrics.started.set(time.time())
            self._log.info(
                "controller works",
                pods=len(self._store.pods),
                partitions=len(self._store.partitions),
                policies=len(self._store.policies),
            )
            if self._settings.ready_file is not None:
                self._settings.ready_file.write_text(json.dumps({"admin_port": port}))

    async def _keep_certificate(self) -> None:
        from hbm_operator.certificates import CertificateKeeper, KeeperSettings

        settings = self._settings
        pace_s = min(10.0, settings.certificate_lifetime_s / 30)
        keeper = KeeperSettings(
            namespace=settings.namespace,
            secret=settings.tls_secret,
            service=settings.webhook_service,
            configuration=settings.webhook_configuration,
            lifetime_s=settings.certificate_lifetime_s,
            settle_s=pace_s,
            poll_s=pace_s,
        )
        await CertificateKeeper(self._kube, keeper, _now).run()

    # -- the beginning ---------------------------------------------------------------------------

    async def _serve(self, stack: contextlib.AsyncExitStack) -> int:
        runner = web.AppRunner(self._probes.application(), access_log=None)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, self._settings.host or None, self._settings.admin_port)
        await site.start()
        return int(runner.addresses[0][1])

    async def _wait_for_resources(self) -> None:
        """Until both custom resources are served; what else is wrong is waited out."""
        deadline = time.monotonic() + self._settings.crd_wait_s
        within = self._settings.watch_namespaces[0] if self._settings.watch_namespaces else None
        told = False
        while True:
            try:
                for resource in (HBM_POLICIES, HBM_PARTITIONS):
                    await self._kube.list(resource, namespace=within)
                return
            except (NotFound, Forbidden) as error:
                if time.monotonic() >= deadline:
                    raise ResourcesMissing(
                        f"{error}. Waited {self._settings.crd_wait_s:g} s for the custom resources "
                        f"of {names.GROUP}; install the CRDs (kubectl apply -f crds/, or the chart "
                        "with crds.install=true)"
                    ) from error
                if not told:
                    self._log.warning("custom resources cannot be listed yet", why=str(error))
                told = True
            except KubeError as error:
                self._log.warning("the API server does not answer", why=str(error))
            await asyncio.sleep(ASK_AGAIN_S)

    async def _begin(self) -> None:
        """Look at everything once: nothing is decided before everything is known."""
        while True:
            try:
                await self._redis.prepare()
                await self._resync.once()
                return
            except KubeError as error:
                self._log.warning("cannot look at everything yet", why=str(error))
            await asyncio.sleep(ASK_AGAIN_S)

    # -- events ----------------------------------------------------------------------------------

    def _take(self, resource: Resource, kind: str, item: dict[str, Any]) -> None:
        """Take one event over."""
        store, deleted = self._store, kind == "DELETED"
        try:
            if resource == PODS:
                pod = Pod.of(item)
                _ = store.pods.remove(pod) if deleted or not pod.injected else store.pods.put(pod)
            elif resource == HBM_PARTITIONS:
                partition = Partition.of(item)
                table = store.partitions
                _ = table.remove(partition) if deleted else table.put(partition)
            elif resource == HBM_POLICIES:
                policy = HBMPolicy.model_validate(item)
                _ = store.policies.remove(policy) if deleted else store.policies.put(policy)
            elif resource == NAMESPACES:
                namespace = read_namespace(item)
                if deleted:
                    store.namespaces.pop(namespace.name, None)
                else:
                    store.namespaces[namespace.name] = namespace
                self._uninjected.namespace_changed()
        except (ValidationError, KeyError, ValueError) as error:
            self._log.error("cannot be read", kind=resource.kind, why=str(error))

    # -- the queue -------------------------------------------------------------------------------

    async def _look(self, key: Key) -> float | None:
        began = time.monotonic()
        result = "error"
        try:
            again = await self._reconcilers[key.kind](key)
            result = "ok" if again is None else "again"
            return again
        except Conflict:
            result = "conflict"
            raise
        finally:
            self._metrics.reconciles.labels(key.kind.value, result).inc()
            self._metrics.duration.labels(key.kind.value).observe(time.monotonic() - began)

    def _failed(self, key: Key, error: Exception) -> None:
        where = {"kind": key.kind.value, "namespace": key.namespace, "name": key.name}
        if isinstance(error, Conflict):
            self._log.debug("has changed meanwhile", why=str(error), **where)
        elif isinstance(error, KubeError | RedisUnavailable):
            self._log.warning("not done yet; trying again", why=str(error), **where)
        else:
            self._log.error("failed; trying again", exc_info=error, **where)

    def _count_request(self, verb: str, resource: Resource, code: int, seconds: float) -> None:
        self._metrics.api_requests.labels(verb, resource.plural, str(code)).inc()
        self._metrics.api_duration.labels(verb).observe(seconds)


def _first(error: BaseException) -> BaseException:
    """What went wrong first, out of the group that a group of tasks raises."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def control(settings: ControllerSettings) -> None:
    """Runs the controller until SIGTERM or SIGINT. Raises as `Controller.run` does, and
    `KubeConfigError` where no API server can be found."""
    config = (
        KubeConfig.from_kubeconfig(settings.kubeconfig)
        if settings.kubeconfig is not None
        else KubeConfig.in_cluster()
    )
    await Controller(settings, config).run()


def check(settings: ControllerSettings) -> None:
    """What can be known to be wrong before anything starts.

    Raises:
        OSError: the admin port cannot be listened on, or the ready file cannot be written.
    """
    try:
        with socket.create_server((settings.host, settings.admin_port)):
            pass
    except OSError as error:
        raise OSError(
            f"--admin-port: {settings.admin_port} cannot be listened on ({error.strerror})"
        ) from error
    if settings.ready_file is not None and not os.access(settings.ready_file.parent, os.W_OK):
        raise OSError(f"--ready-file: {settings.ready_file.parent} cannot be written")
