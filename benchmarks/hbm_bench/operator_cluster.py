"""What stands around the operator in its benchmark: rights, pods, tokens, a watch, processes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from hbm_kube.client import KubeClient
from hbm_kube.resources import PODS, SERVICE_ACCOUNTS, Resource
from hbm_operator import names

WAIT_S: Final = 600.0
AT_ONCE: Final = 24
"""Requests in flight while a cluster is furnished."""
_CLUSTER_ROLES: Final = Resource(
    "rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", namespaced=False
)
_CLUSTER_BINDINGS: Final = Resource(
    "rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False
)


def cpu_s(pid: int | None) -> float:
    """User and system time of a process so far; 0 where there is none."""
    if pid is None:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Child:
    """A child with a log; killed at the end."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log.open("wb")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
        )

    def memory_mb(self, field: str) -> float:
        """VmRSS or VmHWM."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) / 1024
        return 0.0

    def cpu_s(self) -> float:
        """User and system time so far."""
        return cpu_s(self.process.pid)

    def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    async def hear(self) -> dict[str, Any]:
        """The next line that it writes."""
        assert self.process.stdout is not None
        line = await asyncio.to_thread(self.process.stdout.readline)
        if not line:
            raise RuntimeError(f"a process of the benchmark has ended; see {self._log.name}")
        return dict(json.loads(line))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


class Seen:
    """What a watch of all partitions says."""

    def __init__(self) -> None:
        self.partitions: set[tuple[str, str]] = set()
        self.applied: dict[tuple[str, str], int] = {}
        """Partition -> generation of the policy that its sidecar follows."""
        self.when: dict[tuple[str, str, int], float] = {}
        """(namespace, name, generation of the policy) -> first seen applied."""
        self.events = 0
        self._changed = asyncio.Event()

    def take(self, item: dict[str, Any]) -> None:
        self.events += 1
        metadata, spec = item["metadata"], item["spec"]
        key = metadata["namespace"], metadata["name"]
        self.partitions.add(key)
        policy = (spec.get("policyRef") or {}).get("generation")
        for condition in (item.get("status") or {}).get("conditions") or ():
            current = condition["observedGeneration"] == metadata["generation"]
            if condition["type"] == "Applied" and policy is not None and current:
                self.applied[key] = policy
                self.when.setdefault((*key, policy), time.monotonic())
        self._changed.set()

    async def until(self, holds: Callable[[], bool], what: str) -> float:
        """Seconds until `holds`."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(WAIT_S):
                while not holds():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise RuntimeError(f"waited {WAIT_S:g} s for {what}") from None
        return time.monotonic() - began


async def give_rights(kube: KubeClient) -> None:
    """The sidecars' role, and a controller that is no administrator: those are exempt from
    flow control."""
    group = "rbac.authorization.k8s.io"
    sidecar = {
        "metadata": {"name": "hbm-sidecar"},
        "rules": [
            {
                "apiGroups": [names.GROUP],
                "resources": ["hbmpartitions"],
                "verbs": ["get", "list", "watch"],
            },
            {
                "apiGroups": [names.GROUP],
                "resources": ["hbmpartitions/status"],
                "verbs": ["patch"],
            },
        ],
    }
    controller = {
        "metadata": {"name": "bench-controller"},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"apiGroup": group, "kind": "User", "name": "hbm-controller"}],
    }
    await kube.apply(_CLUSTER_ROLES, sidecar, field_manager="bench")
    await kube.apply(_CLUSTER_BINDINGS, controller, field_manager="bench")


async def make_pods(kube: KubeClient, fleet: str, first: int, end: int) -> None:
    """Pods FLEET-first to FLEET-(end-1), running."""

    async def make(number: int) -> None:
        await kube.create(PODS, _pod(fleet, number), fleet)
        await kube.patch(
            PODS,
            f"{fleet}-{number}",
            fleet,
            {"status": {"phase": "Running"}},
            subresource="status",
        )

    await _all(make(number) for number in range(first, end))


async def bound_tokens(kube: KubeClient, fleet: str, wanted: list[str]) -> list[str]:
    """A token per pod, bound to it, as the kubelet would ask for it."""
    pods = {
        pod["metadata"]["name"]: pod["metadata"]["uid"]
        for pod in (await kube.list(PODS, fleet)).items
    }

    async def token(name: str) -> str:
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "expirationSeconds": 7200,
                "boundObjectRef": {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "name": name,
                    "uid": pods[name],
                },
            },
        }
        answer = await kube.create(
            SERVICE_ACCOUNTS, request, fleet, name="default", subresource="token"
        )
        return str(answer["status"]["token"])

    return await _all(token(name) for name in wanted)


async def _all(works: Iterable[Any]) -> list[Any]:
    """Results in order; a bounded number at a time."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(work: Any) -> Any:
        async with slots:
            return await work

    return list(await asyncio.gather(*(one(work) for work in works)))


def _pod(fleet: str, number: int) -> dict[str, Any]:
    """As the webhook and the scheduler leave it."""
    name = f"{fleet}-{number}"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": {
                names.INJECT_LABEL: "true",
                names.INJECTED: "true",
                "app": fleet,
                "pod": name,
            },
            "annotations": {
                names.STATUS: '{"version":"0.1.0","container":"model","port":9400,"native":true}'
            },
        },
        "spec": {
            "nodeName": f"node-{number % 500}",
            "serviceAccountName": "default",
            "automountServiceAccountToken": False,
            "containers": [{"name": "model", "image": "model:1"}],
        },
    }
