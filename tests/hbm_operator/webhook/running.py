"""A webhook in this process, and a client that trusts what the API server is to trust."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import jsonpatch
from hbm_operator.certificates import Pair, issue
from hbm_operator.webhook.server import WebhookServer
from hbm_operator.webhook.settings import WebhookSettings

SERVER_NAME = "hbm-webhook.hbm-system.svc"
NAMES = (SERVER_NAME, "127.0.0.1")


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Waits for a condition; the test's own time limit ends a wait in vain."""
    while True:
        if await holds():
            return
        await asyncio.sleep(0.01)


def new_pair(lifetime_s: float = 600.0, names: tuple[str, ...] = NAMES) -> Pair:
    """A pair as the operator itself issues it."""
    return issue(names, lifetime_s, datetime.now(UTC))


def webhook_settings(tmp_path: Path, **changes: Any) -> WebhookSettings:
    """Free ports on loopback, fast reload, no drain."""
    given: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "admin_port": 0,
        "tls_dir": tmp_path / "tls",
        "tls_reload_s": 0.05,
        "drain_s": 0.0,
        "ready_file": tmp_path / "ready.json",
        "sidecar_image": "hbm-partition/sidecar:0.1.0",
        "native_sidecars": "true",
    }
    return WebhookSettings(**{**given, **changes})


def review(pod: dict[str, Any], *, uid: str = "u1", **request: Any) -> dict[str, Any]:
    """An AdmissionReview as the API server sends it for a new pod."""
    return {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": uid,
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "namespace": "shop",
            "operation": "CREATE",
            "object": pod,
            "oldObject": None,
            "dryRun": False,
            **request,
        },
    }


def patched(pod: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
    """The pod as the API server makes it from an answer."""
    if "patch" not in response:
        return pod
    assert response["patchType"] == "JSONPatch"
    result: dict[str, Any] = jsonpatch.apply_patch(
        pod, json.loads(base64.b64decode(response["patch"]))
    )
    return result


@dataclass
class Running:
    """A webhook that serves."""

    port: int
    admin_port: int
    stop: asyncio.Event
    task: asyncio.Task[None]

    async def admit(
        self, pair: Pair, body: Any, path: str = "/mutate"
    ) -> tuple[int, dict[str, Any] | str]:
        """Status and response of one admission; a text where it is no JSON."""
        context = ssl.create_default_context(cadata=pair.authority.decode())
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                f"https://127.0.0.1:{self.port}{path}",
                data=data,
                ssl=context,
                server_hostname=SERVER_NAME,
            ) as response,
        ):
            if response.content_type == "application/json":
                answer = await response.json()
                assert answer["kind"] == "AdmissionReview"
                return response.status, answer["response"]
            return response.status, await response.text()

    async def admin(self, path: str) -> tuple[int, str]:
        """Status and text of the admin port."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.admin_port}{path}") as response,
        ):
            return response.status, await response.text()


@asynccontextmanager
async def running(settings: WebhookSettings) -> AsyncGenerator[Running, None]:
    """Serves until the block ends; certificates must be mounted by then."""
    stop = asyncio.Event()
    task = asyncio.create_task(WebhookServer(settings, native=True).run(stop))
    ready = settings.ready_file
    assert ready is not None
    while not (ready.exists() and ready.read_text()):
        assert not task.done(), task.exception()
        await asyncio.sleep(0.01)
    try:
        yield Running(**json.loads(ready.read_text()), stop=stop, task=task)
    finally:
        stop.set()
        await task
