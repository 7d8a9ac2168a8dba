"""Keeps the webhook's certificate: reads what there is, does the next step, and so on for ever."""

from __future__ import annotations

import asyncio
import base64
import random
import ssl
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

import structlog
from hbm_kube.client import KubeClient
from hbm_kube.errors import Conflict, KubeError, NotFound
from hbm_kube.resources import MUTATING_WEBHOOKS, PODS, SECRETS, SERVICES

from hbm_operator import names
from hbm_operator.certificates.issue import Pair, issue
from hbm_operator.certificates.rotation import (
    Held,
    Step,
    View,
    bundle,
    is_crowded,
    next_step,
    published_bundles,
)

_ASK_S: Final = 3.0
"""Time for a replica to show its certificate."""


@dataclass(frozen=True, kw_only=True)
class KeeperSettings:
    """Which objects, and how fast."""

    namespace: str
    """Of the Secret, the Service and the webhook's pods."""
    secret: str
    service: str
    configuration: str
    """Name of the MutatingWebhookConfiguration."""
    lifetime_s: float = 90 * 86_400.0
    """Of a certificate; it is replaced after two thirds of it."""
    settle_s: float = 10.0
    """How long a caBundle has stood until every API server counts as knowing it."""
    poll_s: float = 10.0
    """Time between two looks."""
    extra_names: tuple[str, ...] = ()
    """Names and addresses besides those of the Service."""

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that the certificate is good for."""
        own = f"{self.service}.{self.namespace}.svc"
        return (own, f"{own}.cluster.local", *self.extra_names)


class CertificateKeeper:
    """Level-based: several may run at once, and each may be killed at any moment.

    Every write carries the version of what it was decided from, and the configuration is read
    before the Secret, so that a decision never rests on a Secret older than the bundle.

    Args:
        kube: opened client.
        settings: names and times.
        clock: aware time.
    """

    def __init__(
        self, kube: KubeClient, settings: KeeperSettings, clock: Callable[[], datetime]
    ) -> None:
        self._kube = kube
        self._settings = settings
        self._clock = clock
        self._published: tuple[bytes, ...] = ()
        """The bundles as last seen, and since when (loop time) they have been so."""
        self._published_at = 0.0
        self._log = structlog.get_logger()

    async def run(self) -> None:
        """For ever. API failures are logged and waited out."""
        while True:
            try:
                step = await self.step()
                pause_s = self._settings.poll_s
                if step is not Step.NONE:
                    pause_s = min(1.0, pause_s)
            except Conflict:
                pause_s = random.uniform(0.0, self._settings.poll_s)  # somebody else was first
            except KubeError as error:
                self._log.warning("certificate not looked after", problem=str(error))
                pause_s = random.uniform(0.5, 1.0) * self._settings.poll_s
            await asyncio.sleep(pause_s)

    async def step(self) -> Step:
        """Looks once and does what is next. Returns what it did.

        Raises:
            KubeError: the API refused, or did not answer.
        """
        try:
            configuration = await self._kube.get(MUTATING_WEBHOOKS, self._settings.configuration)
        except NotFound:
            # Not installed yet, or being uninstalled: nobody needs a certificate.
            return Step.NONE
        secret = await self._secret()
        held = None if secret is None else Held.of(secret.get("data") or {})
        view = await self._view(configuration, held)
        step = next_step(held, view)
        if held is None or secret is None:
            await self._create(configuration, view)
        elif step is Step.STAGE:
            pair = await self._issue(view)
            await self._write_secret(secret, configuration, replace(held, staged=pair))
        elif step is Step.PUBLISH:
            wanted = held.wanted_bundle(b"".join(view.published), view.now)
            await self._write_bundle(configuration, wanted)
        elif step is Step.PROMOTE:
            await self._write_secret(secret, configuration, held.promoted(view.now))
        elif step is Step.FORGET and held.previous:
            await self._write_secret(secret, configuration, replace(held, previous=b""))
        elif step is Step.FORGET:
            await self._write_bundle(configuration, bundle([held.current.authority], view.now))
        elif not _owned(secret, configuration):
            await self._write_secret(secret, configuration, held)
        if step is not Step.NONE:
            self._log.info("webhook certificate", step=str(step))
        return step

    # -- looking ---------------------------------------------------------------------------------

    async def _secret(self) -> dict[str, Any] | None:
        try:
            return await self._kube.get(SECRETS, self._settings.secret, self._settings.namespace)
        except NotFound:
            return None

    async def _view(self, configuration: dict[str, Any], held: Held | None) -> View:
        settings, now = self._settings, asyncio.get_running_loop().time()
        published = published_bundles(configuration)
        if published != self._published:
            self._published, self._published_at = published, now
        view = View(
            published=published,
            settled=now - self._published_at >= settings.settle_s,
            all_serve_current=None,
            now=self._clock(),
            names=settings.names,
            lifetime_s=settings.lifetime_s,
        )
        if held is not None and held.staged is None and is_crowded(held, view):
            return replace(view, all_serve_current=await self._all_serve(held.current))
        return view

    async def _all_serve(self, pair: Pair) -> bool:
        """Whether there are replicas and each of them shows this pair's certificate."""
        try:
            wanted = pair.der()
        except ValueError:
            return False
        shown = await asyncio.gather(
            *(self._shown(host, port) for host, port in await self._replicas())
        )
        return bool(shown) and all(one == wanted for one in shown)

    async def _replicas(self) -> list[tuple[str, int]]:
        """Address and port of every running pod behind the Service, ready or not."""
        namespace = self._settings.namespace
        try:
            service = await self._kube.get(SERVICES, self._settings.service, namespace)
        except NotFound:
            return []
        selector = service["spec"].get("selector")
        if not selector:
            return []
        labels = ",".join(f"{key}={value}" for key, value in sorted(selector.items()))
        pods = await self._kube.list(PODS, namespace, label_selector=labels)
        target = service["spec"]["ports"][0].get("targetPort", 443)
        return [
            (pod["status"]["podIP"], _port(pod, target))
            for pod in pods.items
            if pod.get("status", {}).get("phase") == "Running"
            and pod["status"].get("podIP")
            and not pod["metadata"].get("deletionTimestamp")
        ]

    async def _shown(self, host: str, port: int) -> bytes | None:
        """The certificate that a replica shows, DER; None if it shows none."""
        # What it shows is compared with what it should show: no authority is needed for that.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        try:
            async with asyncio.timeout(_ASK_S):
                _, writer = await asyncio.open_connection(
                    host, port, ssl=context, server_hostname=self._settings.names[0]
                )
        except (TimeoutError, OSError):
            return None
        connection: ssl.SSLObject = writer.get_extra_info("ssl_object")
        shown = connection.getpeercert(binary_form=True)
        writer.transport.abort()
        return shown

    # -- writing ---------------------------------------------------------------------------------

    async def _issue(self, view: View) -> Pair:
        return await asyncio.to_thread(issue, view.names, view.lifetime_s, view.now)

    async def _create(self, configuration: dict[str, Any], view: View) -> None:
        pair = await self._issue(view)
        before = bundle(view.published, view.now)
        if before:
            # The Secret is lost, but replicas still serve what it held.
            wanted = bundle([before, pair.authority], view.now)
            await self._write_bundle(configuration, wanted)
            await asyncio.sleep(self._settings.settle_s)
        data = {key: value for key, value in Held(pair, None, before).to_data().items() if value}
        await self._kube.create(
            SECRETS,
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "type": "kubernetes.io/tls",
                "metadata": {
                    "name": self._settings.secret,
                    "namespace": self._settings.namespace,
                    "labels": dict(names.COMPONENT_LABELS),
                    "ownerReferences": _owners(configuration),
                },
                "data": data,
            },
            self._settings.namespace,
        )

    async def _write_secret(
        self, secret: dict[str, Any], configuration: dict[str, Any], held: Held
    ) -> None:
        metadata = {
            "resourceVersion": secret["metadata"]["resourceVersion"],
            "ownerReferences": _owners(configuration),
        }
        await self._kube.patch(
            SECRETS,
            self._settings.secret,
            self._settings.namespace,
            {"metadata": metadata, "data": held.to_data()},
        )

    async def _write_bundle(self, configuration: dict[str, Any], wanted: bytes) -> None:
        encoded = base64.b64encode(wanted).decode()
        webhooks = [
            {**webhook, "clientConfig": {**webhook["clientConfig"], "caBundle": encoded}}
            for webhook in configuration["webhooks"]
        ]
        version = configuration["metadata"]["resourceVersion"]
        await self._kube.patch(
            MUTATING_WEBHOOKS,
            self._settings.configuration,
            None,
            # A merge patch replaces the list; the version makes sure that nothing is lost by it.
            {"metadata": {"resourceVersion": version}, "webhooks": webhooks},
        )


def _owners(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    """The Secret goes with the configuration when the operator is uninstalled."""
    return [
        {
            "apiVersion": MUTATING_WEBHOOKS.api_version,
            "kind": MUTATING_WEBHOOKS.kind,
            "name": configuration["metadata"]["name"],
            "uid": configuration["metadata"]["uid"],
        }
    ]


def _owned(secret: dict[str, Any], configuration: dict[str, Any]) -> bool:
    owners = secret["metadata"].get("ownerReferences") or ()
    return [owner["uid"] for owner in owners] == [configuration["metadata"]["uid"]]


def _port(pod: dict[str, Any], target: int | str) -> int:
    """The number of a Service's target port in a pod."""
    if isinstance(target, int):
        return target
    for container in pod["spec"]["containers"]:
        for port in container.get("ports") or ():
            if port.get("name") == target:
                return int(port["containerPort"])
    return 0  # nobody listens there, so the replica counts as unknown
