"""The keeper against a real API server: installation, rotation under load, crashes, faults."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hbm_e2e.api_server import ApiServer
from hbm_kube.client import KubeClient
from hbm_kube.config import KubeConfig
from hbm_kube.resources import MUTATING_WEBHOOKS, NAMESPACES, PODS, SECRETS
from hbm_operator import names
from hbm_operator.certificates import CertificateKeeper, KeeperSettings, issue

from tests.hbm_operator.certificates.fleet import (
    SECRET,
    fleet,
    install_configuration,
    keeper_settings,
    read_bundles,
    read_secret,
    remove_configuration,
)
from tests.kube_faults import FaultProxy

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(900)]


def _now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
async def kube(api_server: ApiServer) -> AsyncIterator[KubeClient]:
    async with KubeClient(KubeConfig.from_kubeconfig(api_server.kubeconfig)) as client:
        yield client


@pytest.fixture
def installed(api_server: ApiServer, namespace: str) -> Iterator[KeeperSettings]:
    """The configuration as the chart leaves it: no caBundle, no Secret, no replicas."""
    install_configuration(api_server, namespace, ["https://127.0.0.1:1"] * 2)
    yield keeper_settings(namespace)
    remove_configuration(api_server, namespace)


@contextlib.asynccontextmanager
async def _keeping(kube: KubeClient, settings: KeeperSettings) -> AsyncIterator[None]:
    task = asyncio.create_task(CertificateKeeper(kube, settings, _now).run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _until(holds: Callable[[], Awaitable[object]]) -> None:
    while True:
        if await holds():
            return
        await asyncio.sleep(0.05)


async def _at_rest(kube: KubeClient, namespace: str) -> bool:
    """One pair, and every webhook trusts its authority alone."""
    secret = await read_secret(kube, namespace)
    bundles = await read_bundles(kube, namespace)
    return set(secret) == {"tls.crt", "tls.key", "ca.crt"} and bundles == [secret["ca.crt"]] * 2


async def test_two_keepers_install_one_pair_and_then_leave_it_alone(
    api_server: ApiServer, kube: KubeClient, installed: KeeperSettings
) -> None:
    namespace = installed.namespace
    async with _keeping(kube, installed), _keeping(kube, installed):
        await _until(lambda: _at_rest(kube, namespace))
        secret = await kube.get(SECRETS, SECRET, namespace)
        configuration = await kube.get(MUTATING_WEBHOOKS, installed.configuration)
        [owner] = secret["metadata"]["ownerReferences"]
        assert owner["uid"] == configuration["metadata"]["uid"]
        assert secret["type"] == "kubernetes.io/tls"

        # The chart is rendered and applied once more, by both ways of helm.
        install_configuration(api_server, namespace, ["https://127.0.0.1:1"] * 2)
        for _ in range(3):
            keeper = CertificateKeeper(kube, installed, _now)
            assert str(await keeper.step()) == "none"
        again = await kube.get(MUTATING_WEBHOOKS, installed.configuration)
        assert again["metadata"]["resourceVersion"] == configuration["metadata"]["resourceVersion"]
        unchanged = await kube.get(SECRETS, SECRET, namespace)
        assert unchanged["metadata"]["resourceVersion"] == secret["metadata"]["resourceVersion"]


async def test_without_a_configuration_nothing_is_made_and_the_secret_goes_with_it(
    api_server: ApiServer, kube: KubeClient, installed: KeeperSettings
) -> None:
    async with _keeping(kube, installed):
        await _until(lambda: _at_rest(kube, installed.namespace))
        remove_configuration(api_server, installed.namespace)

        async def gone() -> bool:
            return not await read_secret(kube, installed.namespace)

        await _until(gone)
        assert str(await CertificateKeeper(kube, installed, _now).step()) == "none"
        assert await gone()


async def test_an_overwritten_pair_is_replaced_and_stays_trusted(
    kube: KubeClient, installed: KeeperSettings
) -> None:
    namespace = installed.namespace
    async with _keeping(kube, installed):
        await _until(lambda: _at_rest(kube, namespace))
        before = await read_secret(kube, namespace)
        await kube.patch(SECRETS, SECRET, namespace, {"data": {"tls.key": "AAAA"}})

        async def replaced() -> bool:
            secret = await read_secret(kube, namespace)
            return secret["tls.crt"] != before["tls.crt"] and "next-tls.crt" not in secret

        await _until(replaced)
        secret = await read_secret(kube, namespace)
        for bundle in await read_bundles(kube, namespace):
            assert secret["ca.crt"] in bundle
            # Replicas go on serving what was overwritten, until they see the new pair.
            assert before["ca.crt"] in bundle


@pytest.mark.parametrize("other", ["removed", "of another"])
async def test_a_bundle_that_somebody_changed_trusts_the_pair_again(
    kube: KubeClient, installed: KeeperSettings, other: str
) -> None:
    namespace = installed.namespace
    authority = issue(("x",), 600.0, _now()).authority if other == "of another" else b""
    value = base64.b64encode(authority).decode()
    async with _keeping(kube, installed):
        await _until(lambda: _at_rest(kube, namespace))
        before = await read_secret(kube, namespace)
        path = "/webhooks/1/clientConfig/caBundle"
        operation = {"op": "replace", "path": path, "value": value}
        await kube.patch(MUTATING_WEBHOOKS, installed.configuration, None, [operation])

        async def trusted() -> bool:
            return all(before["ca.crt"] in one for one in await read_bundles(kube, namespace))

        await _until(trusted)
        assert await read_secret(kube, namespace) == before


async def test_a_lost_secret_leaves_its_authority_trusted(
    kube: KubeClient, installed: KeeperSettings
) -> None:
    namespace = installed.namespace
    async with _keeping(kube, installed):
        await _until(lambda: _at_rest(kube, namespace))
        before = await read_secret(kube, namespace)
        await kube.delete(SECRETS, SECRET, namespace)

        async def again() -> bool:
            return (await read_secret(kube, namespace)).get("tls.crt", b"") not in (
                b"",
                before["tls.crt"],
            )

        await _until(again)
        secret = await read_secret(kube, namespace)
        for bundle in await read_bundles(kube, namespace):
            assert before["ca.crt"] in bundle
            assert secret["ca.crt"] in bundle


@pytest.mark.parametrize("fault", ["409", "429", "500", "timeout", "dropped", "answer lost"])
async def test_converges_whatever_the_api_does(
    api_server: ApiServer, kube: KubeClient, installed: KeeperSettings, fault: str
) -> None:
    """Each kind of request fails at least once on the way."""
    with FaultProxy(api_server) as proxy:
        for method, path in (
            ("GET", "/mutatingwebhookconfigurations/"),
            ("GET", "/secrets/"),
            ("POST", "/secrets"),
            ("PATCH", "/mutatingwebhookconfigurations/"),
        ):
            if fault == "timeout":
                proxy.hang(method=method, path=path)
            elif fault in ("dropped", "answer lost"):
                proxy.drop(method=method, path=path, after=fault == "answer lost")
            else:
                proxy.answer(int(fault), method=method, path=path)
        async with (
            KubeClient(proxy.config(), timeout_s=1.0, backoff_s=0.05) as faulty,
            _keeping(faulty, installed),
        ):
            await _until(lambda: _at_rest(kube, installed.namespace))
        for method in ("GET", "POST", "PATCH"):
            assert proxy.count(method) > 0


async def test_no_pod_is_missed_while_certificates_rotate_and_keepers_die(
    api_server: ApiServer, kube: KubeClient, namespace: str, tmp_path: Path
) -> None:
    """Certificates of half a minute, two keepers at once of which one is killed all the time, pods
    that are created all the time through both entries."""
    settings = keeper_settings(namespace, lifetime_s=36.0, settle_s=1.0, poll_s=0.2)
    await kube.patch(
        NAMESPACES,
        namespace,
        None,
        {"metadata": {"labels": {names.NAMESPACE_LABEL: "enabled"}}},
    )

    kills = 0

    async def keep_and_kill() -> None:
        nonlocal kills
        while True:
            async with _keeping(kube, settings):
                await asyncio.sleep(random.uniform(0.05, 3.0))
            kills += 1

    created: list[dict[str, Any]] = []
    served: set[bytes] = set()

    async def create(number: int) -> None:
        by_pod = number % 2 == 0
        container: dict[str, Any] = {"name": "server", "image": "ranker:1"}
        if not by_pod:
            container["resources"] = {"limits": {"nvidia.com/gpu": 1}}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"p-{number}",
                "labels": {names.INJECT_LABEL: "true"} if by_pod else {},
            },
            "spec": {"containers": [container]},
        }
        created.append(await kube.create(PODS, pod, namespace))

    def injected(pod: dict[str, Any]) -> bool:
        return pod["metadata"]["labels"].get(names.INJECTED) == "true"

    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(_keeping(kube, settings))
        killing = asyncio.create_task(keep_and_kill())
        stack.callback(killing.cancel)
        await stack.enter_async_context(fleet(api_server, kube, namespace, tmp_path))
        number = 0
        # The first pods show that the API server knows the webhook at all.
        while len([pod for pod in created[-2:] if injected(pod)]) < 2:
            await create(number)
            number += 1
        created.clear()
        while len(served) < 3 or not await _at_rest(kube, namespace):
            await create(number)
            number += 1
            secret = await read_secret(kube, namespace)
            served.add(secret["tls.crt"])
            assert not killing.done()
            await asyncio.sleep(0.05)
    missed = [pod["metadata"]["name"] for pod in created if not injected(pod)]
    assert missed == [], f"{len(missed)} of {len(created)} after {kills} kills"
