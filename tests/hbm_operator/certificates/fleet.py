"""Two replicas of the webhook behind a Service, as far as an API server without nodes goes.

The replicas are real processes on loopback addresses, and pods say that they run there. A stand-in
for the kubelet shows them the Secret, later than it changes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from hbm_e2e.api_server import ApiServer
from hbm_kube.client import KubeClient
from hbm_kube.errors import NotFound
from hbm_kube.resources import MUTATING_WEBHOOKS, PODS, SECRETS, SERVICES
from hbm_operator.certificates import KeeperSettings

from tests.hbm_operator.mounted import mount
from tests.hbm_operator.webhook.configuration import configuration

HOSTS = ("127.0.0.1", "127.0.0.2")
SECRET, SERVICE = "hbm-webhook-tls", "hbm-webhook"
_COMMAND = (sys.executable, "-c", "from hbm_operator.cli import app; app()", "webhook")
_MOUNT_DELAY_S = 1.5
"""At most; a kubelet takes a minute of a certificate's ninety days."""


def keeper_settings(namespace: str, **changes: Any) -> KeeperSettings:
    """Quick looks, and a certificate that outlives any other test."""
    given: dict[str, Any] = {
        "namespace": namespace,
        "secret": SECRET,
        "service": SERVICE,
        "configuration": f"hbm-{namespace}",
        "lifetime_s": 600.0,
        "settle_s": 0.3,
        "poll_s": 0.1,
        "extra_names": HOSTS,
    }
    return KeeperSettings(**{**given, **changes})


def install_configuration(api_server: ApiServer, namespace: str, addresses: list[str]) -> None:
    """The webhook's configuration without a caBundle; one address per entry."""
    content = configuration(f"hbm-{namespace}", "", [namespace], None)
    for webhook, address in zip(content["webhooks"], addresses, strict=True):
        webhook["clientConfig"]["url"] = address + webhook["clientConfig"]["url"]
    api_server.kubectl.apply(content, server_side=True)


def remove_configuration(api_server: ApiServer, namespace: str) -> None:
    """Pods of the namespace are no longer sent."""
    kind = "mutatingwebhookconfiguration"
    api_server.kubectl("delete", kind, f"hbm-{namespace}", "--ignore-not-found")


async def read_secret(kube: KubeClient, namespace: str) -> dict[str, bytes]:
    """Decoded content of the Secret; empty without one."""
    try:
        secret = await kube.get(SECRETS, SECRET, namespace)
    except NotFound:
        return {}
    return {key: base64.b64decode(value) for key, value in secret["data"].items()}


async def read_bundles(kube: KubeClient, namespace: str) -> list[bytes]:
    """The caBundle of each entry."""
    found = await kube.get(MUTATING_WEBHOOKS, f"hbm-{namespace}")
    return [
        base64.b64decode(webhook["clientConfig"].get("caBundle", ""))
        for webhook in found["webhooks"]
    ]


def _start(tmp_path: Path, namespace: str, host: str) -> subprocess.Popen[bytes]:
    folder = tmp_path / host
    folder.mkdir()
    return subprocess.Popen(
        [
            *_COMMAND,
            f"--namespace={namespace}",
            f"--webhook-service={SERVICE}",
            f"--host={host}",
            "--port=0",
            "--admin-port=0",
            "--drain-s=0",
            f"--tls-dir={folder / 'tls'}",
            "--tls-reload-s=0.2",
            f"--ready-file={folder / 'ready.json'}",
            "--sidecar-image=hbm-partition/sidecar:0.1.0",
            "--log-level=warning",
        ]
    )


async def _show_secret(kube: KubeClient, namespace: str, directory: Path) -> None:
    """What the kubelet does for one replica."""
    shown: dict[str, bytes] = {}
    while True:
        content = await read_secret(kube, namespace)
        if content and content != shown:
            if shown:
                await asyncio.sleep(random.uniform(0.0, _MOUNT_DELAY_S))
            mount(directory, content)
            shown = content
        await asyncio.sleep(0.1)


async def _announce(kube: KubeClient, namespace: str, number: int, port: int) -> None:
    """The pod of a replica, running at its address."""
    name, labels = f"webhook-{number}", {"app": "webhook"}
    ports = [{"name": "webhook", "containerPort": port}]
    await kube.create(
        PODS,
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels},
            "spec": {"containers": [{"name": "webhook", "image": "operator:1", "ports": ports}]},
        },
        namespace,
    )
    status = {"phase": "Running", "podIP": HOSTS[number], "podIPs": [{"ip": HOSTS[number]}]}
    await kube.patch(PODS, name, namespace, {"status": status}, subresource="status")


@asynccontextmanager
async def fleet(
    api_server: ApiServer, kube: KubeClient, namespace: str, tmp_path: Path
) -> AsyncGenerator[None, None]:
    """Both replicas serve, the configuration points to them, and the Service selects their pods.

    A keeper must run already: replicas wait for their certificate.
    """
    await kube.create(
        SERVICES,
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": SERVICE},
            "spec": {
                "selector": {"app": "webhook"},
                "ports": [{"port": 443, "targetPort": "webhook"}],
            },
        },
        namespace,
    )
    processes = [_start(tmp_path, namespace, host) for host in HOSTS]
    kubelet = [
        asyncio.create_task(_show_secret(kube, namespace, tmp_path / host / "tls"))
        for host in HOSTS
    ]
    try:
        install_configuration(api_server, namespace, ["https://waiting.invalid"] * 2)
        addresses = []
        for number, host in enumerate(HOSTS):
            ready = tmp_path / host / "ready.json"
            while not (ready.exists() and ready.read_text()):
                assert processes[number].poll() is None
                await asyncio.sleep(0.05)
            port = json.loads(ready.read_text())["port"]
            await _announce(kube, namespace, number, port)
            addresses.append(f"https://{host}:{port}")
        # As a second render of the chart: the caBundle is nobody's but the keeper's.
        install_configuration(api_server, namespace, addresses)
        yield
    finally:
        remove_configuration(api_server, namespace)
        for task in kubelet:
            task.cancel()
        for process in processes:
            process.kill()
            process.wait()
