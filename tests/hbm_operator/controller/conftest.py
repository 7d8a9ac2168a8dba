"""The controller as a process of its own, on a real API server, in front of it a proxy with faults;
pods, policies and sidecars are played by the tests."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hbm_e2e.api_server import ApiServer
from hbm_e2e.waiting import wait_for
from hbm_kube.client import KubeClient
from hbm_kube.config import KubeConfig
from hbm_kube.errors import NotFound
from hbm_kube.resources import HBM_PARTITIONS, HBM_POLICIES, PODS
from hbm_operator import names

from tests.kube_faults import FaultProxy

TIMEOUT_S = 60.0


class ControllerProcess:
    """`hbm operator controller` with the flags of a test."""

    def __init__(self, folder: Path, kubeconfig: Path, *flags: str) -> None:
        self.log = folder / "controller.log"
        self._ready = folder / "ready.json"
        self._command = [
            *(sys.executable, "-m", "hbm_cli.main", "operator", "controller"),
            *("--kubeconfig", str(kubeconfig), "--ready-file", str(self._ready)),
            *("--admin-port", "0", "--host", "127.0.0.1", *flags),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> ControllerProcess:
        """Started, and by default at work."""
        self._ready.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stderr=log, stdout=log)
        if wait:
            wait_for(self.works, TIMEOUT_S, "the controller to work", because=self.log.read_text)
        return self

    def works(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()
        return self._ready.exists() and bool(self._ready.read_text())

    def kill(self) -> None:
        """kill -9."""
        self.end(signal.SIGKILL)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Returns its exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(30)

    def wait(self) -> int:
        """Until it ends by itself; its exit status."""
        assert self._process is not None
        return self._process.wait(TIMEOUT_S)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a path of the admin port."""
        port = json.loads(self._ready.read_text())["admin_port"]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the series of a metric that have these labels."""
        found = 0.0
        for line in self.get("/metrics")[1].splitlines():
            head, _, value = line.rpartition(" ")
            if re.match(rf"{name}(\{{|$)", head) and all(
                f'{label}="{wanted}"' in head for label, wanted in labels.items()
            ):
                found += float(value)
        return found


class Tenant:
    """One namespace: what users, nodes and sidecars do there."""

    def __init__(self, kube: KubeClient, namespace: str) -> None:
        self.kube = kube
        self.namespace = namespace

    async def pod(
        self, name: str, *, injected: bool = True, phase: str = "Running", **labels: str
    ) -> dict[str, Any]:
        """A pod as the webhook, the scheduler and the kubelet leave it."""
        metadata: dict[str, Any] = {
            "name": name,
            "labels": {names.INJECT_LABEL: "true", "app": "ranker", **labels},
        }
        if injected:
            metadata["labels"][names.INJECTED] = "true"
            metadata["annotations"] = {
                names.STATUS: '{"version":"0.1.0","container":"model","port":9400,"native":true}'
            }
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": {
                "nodeName": "gpu-1",
                "terminationGracePeriodSeconds": 0,
                "containers": [{"name": "model", "image": "model"}],
            },
        }
        made = await self.kube.create(PODS, body, self.namespace)
        await self.phase(name, phase)
        return made

    async def phase(self, name: str, phase: str) -> None:
        await self.kube.patch(
            PODS, name, self.namespace, {"status": {"phase": phase}}, subresource="status"
        )

    async def delete_pod(self, name: str) -> None:
        try:
            await self.kube.delete(PODS, name, self.namespace)
        except NotFound:
            pass

    async def policy(self, name: str = "p", **spec: Any) -> dict[str, Any]:
        return await self.kube.apply(
            HBM_POLICIES,
            {"metadata": {"name": name, "namespace": self.namespace}, "spec": spec},
            field_manager="a-user",
        )

    async def gone(self, name: str) -> None:
        """Returns once the partition is not there. The garbage collector takes up to half a minute
        to learn of new kinds."""

        async def absent() -> bool:
            return await self.partition(name) is None

        await eventually(absent, f"partition {name} to be gone", 2 * TIMEOUT_S)

    async def partition(self, name: str) -> dict[str, Any] | None:
        try:
            return await self.kube.get(HBM_PARTITIONS, name, self.namespace)
        except NotFound:
            return None

    async def acknowledge(
        self, name: str, status: str = "True", reason: str = "Applied", message: str = ""
    ) -> None:
        """What a sidecar writes for the present generation."""
        partition = await self.kube.get(HBM_PARTITIONS, name, self.namespace)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        generation = partition["metadata"]["generation"]
        await self.kube.apply(
            HBM_PARTITIONS,
            {
                "metadata": {"name": name, "namespace": self.namespace},
                "status": {
                    "observedGeneration": generation,
                    "alpha": 0.5,
                    "anchor": 0.5,
                    "lastReportTime": now,
                    "sidecar": {"version": "0.1.0", "protocol": names.PROTOCOL_VERSION},
                    "conditions": [
                        {
                            "type": "Applied",
                            "status": status,
                            "reason": reason,
                            "message": message,
                            "observedGeneration": generation,
                            "lastTransitionTime": now,
                        }
                    ],
                },
            },
            field_manager=names.SIDECAR_MANAGER,
            subresource="status",
        )

    async def until(
        self, name: str, holds: Callable[[dict[str, Any]], Any], what: str
    ) -> dict[str, Any]:
        """The partition once it is there and `holds`."""
        found: dict[str, Any] | None = None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while True:
                    found = await self.partition(name)
                    if found is not None and holds(found):
                        return found
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"waited for {what}; found {json.dumps(found)}") from None

    async def until_policy(
        self, name: str, holds: Callable[[dict[str, Any]], Any], what: str
    ) -> dict[str, Any]:
        """The policy's status once it `holds`."""
        found: dict[str, Any] = {}
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while True:
                    found = await self.kube.get(HBM_POLICIES, name, self.namespace)
                    if "status" in found and holds(found["status"]):
                        return dict(found["status"])
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"waited for {what}; found {json.dumps(found)}") from None


async def eventually(
    holds: Callable[[], Any | Awaitable[Any]], what: str, timeout_s: float = TIMEOUT_S
) -> None:
    """Until something outside of this process holds."""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                found = holds()
                if await found if isinstance(found, Awaitable) else found:
                    return
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"waited {timeout_s:g} s for {what}") from None


def condition(item: dict[str, Any], type_: str) -> tuple[str, str]:
    """(status, reason) of a condition; empty strings where there is none."""
    status = item.get("status", item)
    for found in status.get("conditions", ()):
        if found["type"] == type_:
            return found["status"], found["reason"]
    return "", ""


def current(item: dict[str, Any], type_: str) -> tuple[str, str]:
    """The same, if it is about the present generation."""
    for found in item.get("status", {}).get("conditions", ()):
        if found["type"] == type_ and (
            found["observedGeneration"] == item["metadata"]["generation"]
        ):
            return found["status"], found["reason"]
    return "", ""


@pytest.fixture
async def tenant(crds: ApiServer, namespace: str) -> AsyncIterator[Tenant]:
    async with KubeClient(KubeConfig.from_kubeconfig(crds.kubeconfig)) as kube:
        yield Tenant(kube, namespace)


@pytest.fixture
def proxy(crds: ApiServer) -> Iterator[FaultProxy]:
    with FaultProxy(crds) as proxy:
        yield proxy


@pytest.fixture
def controller(
    crds: ApiServer, namespace: str, tmp_path: Path
) -> Iterator[Callable[..., ControllerProcess]]:
    """Starts a controller of this namespace; `through` a proxy where one is given."""
    started: list[ControllerProcess] = []

    def start(
        *flags: str, through: FaultProxy | None = None, wait: bool = True
    ) -> ControllerProcess:
        kubeconfig = crds.kubeconfig if through is None else through.kubeconfig(tmp_path / "faulty")
        process = ControllerProcess(
            tmp_path, kubeconfig, "--namespace", namespace, "--watch-namespaces", namespace, *flags
        )
        started.append(process)
        return process.start(wait)

    yield start
    for process in started:
        if process.running:
            process.kill()
        if os.environ.get("HBM_SHOW_LOGS"):
            print(process.log.read_text())
