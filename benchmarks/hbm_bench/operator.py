"""The operator at scale: a real API server and etcd, no nodes, as many sidecars as pods.

The controller runs as its own process and never answers for a sidecar: each pod has a client with
the pod's own bound token that watches its partition and acknowledges (`operator_sidecars`). Times
are what a user sees: from sending a policy to its last `Applied` in a watch.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
import numpy as np
from hbm_e2e.api_server import ApiServer
from hbm_e2e.waiting import wait_for
from hbm_kube.client import KubeClient
from hbm_kube.config import KubeConfig
from hbm_kube.resources import HBM_PARTITIONS, HBM_POLICIES, NAMESPACES, SERVICE_ACCOUNTS
from hbm_operator.models.crd import definitions

from hbm_bench import operator_webhook
from hbm_bench.operator_cluster import (
    WAIT_S,
    Child,
    Seen,
    bound_tokens,
    cpu_s,
    give_rights,
    make_pods,
)

CHANGES_PER_S: Final = 100.0
REPORT_S: Final = 30.0
"""As sidecars do whose values change all the time."""


class Size(NamedTuple):
    """How many pods of which kind."""

    cold: int
    """Pods that are there when the controller starts."""
    each: int
    """Pods with a policy each, for single changes."""
    fifty: int
    """Pods of a small fleet under one policy."""
    changes: int
    """Single changes, a policy each."""
    steady_s: float
    """How long nothing happens but reports."""
    admissions_s: float
    quiet_s: float
    """Without a write for so long, the controller has nothing left to write: for figures that count
    longer than it puts off a write for."""


QUICK: Final = Size(10, 5, 5, changes=40, steady_s=3.0, admissions_s=1.0, quiet_s=0.5)
FULL: Final = Size(2000, 200, 50, changes=2000, steady_s=60.0, admissions_s=20.0, quiet_s=4.0)


class Pace(NamedTuple):
    """How fast things happen by themselves."""

    changes_per_s: float
    report_s: float


def thresholds() -> dict[str, float]:
    """Figure -> the most that it may be."""
    text = (resources.files("hbm_bench") / "operator_thresholds.json").read_text()
    return {str(key): float(value) for key, value in json.loads(text).items()}


def run(
    *,
    quick: bool,
    seed: int,
    partitions: int = 5000,
    changes_per_s: float = CHANGES_PER_S,
    report_s: float = REPORT_S,
) -> dict[str, Any]:
    """All figures, and which goals they meet.

    Args:
        quick: tens of pods; a smoke run.
        seed: of jitters and of the order of changes.
        partitions: pods in all, in the full run.
        changes_per_s: rate of the single changes; the goal's is the default.
        report_s: time between two reports of a sidecar; quick runs report more often.
    """
    size = QUICK if quick else FULL._replace(cold=min(2000, partitions - 300))
    total = 30 if quick else partitions
    with tempfile.TemporaryDirectory(prefix="hbm-bench-operator-") as folder:
        with ApiServer(Path(folder) / "k8s", controllers=False) as server:
            pace = Pace(changes_per_s, 2.0 if quick else report_s)
            bench = _Bench(server, Path(folder), size, total, pace, seed)
            figures = asyncio.run(bench.run())
        figures["webhook"] = operator_webhook.measure(Path(folder), size.admissions_s)
    figures["goals"] = {
        name: {"most": most, "found": found, "met": found <= most}
        for name, most in thresholds().items()
        if (found := _pick(figures, name)) is not None
    }
    return figures


def _pick(figures: dict[str, Any], path: str) -> float | None:
    value: Any = figures
    for part in path.split("."):
        value = value.get(part, {})
    return float(value) if isinstance(value, int | float) else None


class _Bench:
    def __init__(
        self,
        server: ApiServer,
        folder: Path,
        size: Size,
        total: int,
        pace: Pace,
        seed: int,
    ) -> None:
        self._server = server
        self._folder = folder
        self._size = size
        self._total = total
        self._pace = pace
        self._chance = random.Random(seed)
        self._seed = seed
        self._seen = Seen()
        self._sidecars: list[Child] = []
        self._admin_port = 0
        self._controller: Child | None = None
        many = total - size.each - size.fifty
        self._fleets = {"each": size.each, "fifty": size.fifty, "many": many}

    async def run(self) -> dict[str, Any]:
        kube = KubeClient(KubeConfig.from_kubeconfig(self._server.kubeconfig), concurrency=24)
        async with kube:
            try:
                async with self._watched(kube):
                    return await self._figures(kube)
            finally:
                for process in (*self._sidecars, self._controller):
                    if process is not None:
                        process.end()

    async def _figures(self, kube: KubeClient) -> dict[str, Any]:
        size, many = self._size, self._fleets["many"]
        cold = min(size.cold, many)
        figures: dict[str, Any] = {"partitions": self._total, "report_s": self._pace.report_s}
        await make_pods(kube, "many", 0, cold)
        figures["cold_start"] = await self._cold_start(cold)
        await self._connect(kube, "many", range(cold), "cold")
        rest = range(cold, many)
        await make_pods(kube, "many", cold, many)
        for fleet in ("each", "fifty"):
            await make_pods(kube, fleet, 0, self._fleets[fleet])
        await self._seen.until(
            lambda: len(self._seen.partitions) == self._total, "all partitions to be there"
        )
        if rest:
            await self._connect(kube, "many", rest, "rest")
        for fleet in ("each", "fifty"):
            await self._connect(kube, fleet, range(self._fleets[fleet]), fleet)

        figures["policy_over_50_pods"] = await self._roll_out(kube, "fifty")
        figures["policy_over_many_pods"] = await self._roll_out(kube, "many")
        figures["one_spec"] = await self._single_changes(kube)
        figures["steady"] = await self._steady()
        assert self._controller is not None
        figures["controller"] = {
            "rss_mb": self._controller.memory_mb("VmRSS"),
            "rss_peak_mb": self._controller.memory_mb("VmHWM"),
            "cpu_s": self._controller.cpu_s(),
        }
        return figures

    # -- what is there ---------------------------------------------------------------------------

    @asynccontextmanager
    async def _watched(self, kube: KubeClient) -> AsyncIterator[None]:
        self._server.kubectl.apply(*definitions().values(), server_side=True)
        crds = [f"crd/{one['metadata']['name']}" for one in definitions().values()]
        self._server.kubectl("wait", "--for=condition=Established", *crds)
        await give_rights(kube)
        for fleet in self._fleets:
            await kube.create(
                NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": fleet}}
            )
            account = {
                "apiVersion": "v1",
                "kind": "ServiceAccount",
                "metadata": {"name": "default"},
            }
            await kube.create(SERVICE_ACCOUNTS, account, fleet)

        async def watch() -> None:
            async with aclosing(kube.watch(HBM_PARTITIONS)) as events:
                async for event in events:
                    if event.type in ("ADDED", "MODIFIED"):
                        self._seen.take(event.object)

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _connect(self, kube: KubeClient, fleet: str, numbers: range, label: str) -> None:
        """Sidecars of these pods, each with its own bound token; returns once all are there."""
        wanted = [f"{fleet}-{number}" for number in numbers]
        tokens = await bound_tokens(kube, fleet, wanted)
        process = Child(
            [
                *(sys.executable, "-m", "hbm_bench.operator_sidecars", self._server.url),
                *(str(self._server.ca_certificate), str(self._pace.report_s), str(self._seed)),
            ],
            self._folder / f"sidecars-{label}.log",
        )
        self._sidecars.append(process)
        lines = [
            json.dumps({"namespace": fleet, "name": name, "token": one})
            for name, one in zip(wanted, tokens, strict=True)
        ]
        await asyncio.to_thread(process.tell, "\n".join(lines) + "\n\n")
        async with asyncio.timeout(WAIT_S):
            await process.hear()

    # -- what is measured ------------------------------------------------------------------------

    async def _cold_start(self, pods: int) -> dict[str, Any]:
        """From the start of the process, interpreter included, to the last partition."""
        pki = self._server.control_plane.pki
        identity = pki.issue("hbm-controller", "/CN=hbm-controller")
        kubeconfig = pki.kubeconfig(
            self._folder / "controller.kubeconfig", self._server.url, identity
        )
        ready = self._folder / "controller.json"
        began = time.monotonic()
        self._controller = Child(
            [
                *(sys.executable, "-m", "hbm_cli.main", "operator", "controller"),
                *("--kubeconfig", str(kubeconfig), "--ready-file", str(ready)),
                *("--host", "127.0.0.1", "--admin-port", "0", "--log-level", "warning"),
                # As in the chart: three reports may be missed.
                *("--stale-s", str(max(90.0, 3 * self._pace.report_s))),
            ],
            self._folder / "controller.log",
        )
        await self._seen.until(
            lambda: len(self._seen.partitions) == pods, "the first partitions to be there"
        )
        seconds = time.monotonic() - began
        wait_for(lambda: ready.exists() and ready.read_text(), 60, "the controller's admin port")
        self._admin_port = json.loads(ready.read_text())["admin_port"]
        return {"pods": pods, "seconds": seconds}

    async def _roll_out(self, kube: KubeClient, fleet: str) -> dict[str, Any]:
        """A new policy, then an edit of it: from sending the edit to the last `Applied`."""
        pods = self._fleets[fleet]
        policy = await self._send(kube, fleet, "all", 0.3)
        await self._seen.until(
            lambda: self._followers(fleet, policy) == pods, f"{fleet} to follow the policy"
        )
        before = await self._settled()
        began = time.monotonic()
        policy = await self._send(kube, fleet, "all", 0.4)
        await self._seen.until(
            lambda: self._followers(fleet, policy) == pods, f"{fleet} to follow the edit"
        )
        seconds = time.monotonic() - began
        after = await self._counters()
        return {"pods": pods, "seconds": seconds} | _difference(before, after, per=pods)

    def _followers(self, fleet: str, generation: int) -> int:
        return sum(
            found == generation
            for (namespace, _), found in self._seen.applied.items()
            if namespace == fleet
        )

    async def _send(self, kube: KubeClient, fleet: str, name: str, fixed: float) -> int:
        """Apply a policy; its generation."""
        spec: dict[str, Any] = {"mode": "Fixed", "alpha": {"fixed": round(fixed, 4)}}
        if fleet == "each":
            spec["selector"] = {"matchLabels": {"pod": name}}
        body = {"metadata": {"name": name, "namespace": fleet}, "spec": spec}
        answer = await kube.apply(HBM_POLICIES, body, field_manager="a-user")
        return int(answer["metadata"]["generation"])

    async def _single_changes(self, kube: KubeClient) -> dict[str, Any]:
        """A policy per pod, one changed at a time: from when it was due to `Applied`."""
        pods = self._fleets["each"]
        for number in range(pods):
            await self._send(kube, "each", f"each-{number}", 0.2)
        await self._seen.until(lambda: self._followers("each", 1) == pods, "each to follow its own")
        before = await self._settled()
        sent: dict[tuple[str, str, int], float] = {}

        async def change(number: int, turn: int, due: float) -> None:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            name = f"each-{number}"
            # Timed from when it was due: a late start is the system's own delay.
            generation = await self._send(kube, "each", name, 0.2 + 0.5 * (turn % 500 + 1) / 501)
            sent["each", name, generation] = due

        begin = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for turn in range(self._size.changes):
                tasks.create_task(
                    change(turn % pods, turn, begin + turn / self._pace.changes_per_s)
                )
        spread_s = time.monotonic() - begin
        latest: dict[tuple[str, str], int] = {}
        for namespace, name, generation in sent:
            key = namespace, name
            latest[key] = max(generation, latest.get(key, 0))
        await self._seen.until(
            lambda: all(self._seen.applied.get(key) == g for key, g in latest.items()),
            "the last changes to be applied",
        )
        after = await self._counters()
        # One that was overtaken by the next before it was applied was never seen.
        waits = [self._seen.when[key] - at for key, at in sent.items() if key in self._seen.when]
        return {
            "changes": len(sent),
            "per_second": self._pace.changes_per_s,
            "seen": len(waits),
            "sent_per_second": len(sent) / spread_s,
            "applied_p50_s": float(np.percentile(waits, 50)),
            "applied_p99_s": float(np.percentile(waits, 99)),
        } | _difference(before, after, per=len(sent))

    async def _steady(self) -> dict[str, Any]:
        """Nothing happens but reports: what each object costs an hour."""
        before, told = await self._settled(), await self._told()
        await asyncio.sleep(self._size.steady_s)
        after, told_after = await self._counters(), await self._told()
        hours = self._size.steady_s / 3600 * self._total
        reports = told_after.get("reported", 0) - told.get("reported", 0)
        return {
            "seconds": self._size.steady_s,
            "controller_cores": (after["cpu_s"] - before["cpu_s"]) / self._size.steady_s,
            "api_server_cores": (after["api_server_cpu_s"] - before["api_server_cpu_s"])
            / self._size.steady_s,
            "reports_per_object_hour": reports / hours,
            "echoes_per_object_hour": (told_after.get("echoes", 0) - told.get("echoes", 0)) / hours,
            "sidecars_429": sum(v for k, v in told_after.items() if k.endswith("_429")),
        } | {
            f"{name}_per_object_hour": (after[name] - before[name]) / hours
            for name in ("writes", "reconciles", "status_429")
        }

    async def _told(self) -> dict[str, int]:
        """What all sidecars have done so far."""
        total: dict[str, int] = {}
        for process in self._sidecars:
            process.tell("\n")
            for name, value in (await process.hear()).items():
                total[name] = total.get(name, 0) + value
        return total

    async def _settled(self) -> dict[str, float]:
        """The counters once the controller has written all that it has to."""
        counters = await self._counters()
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            await asyncio.sleep(self._size.quiet_s)
            before, counters = counters, await self._counters()
            if before["writes"] == counters["writes"]:
                return counters
        raise RuntimeError(f"the controller goes on writing after {WAIT_S:g} s")

    async def _counters(self) -> dict[str, float]:
        """The controller's own counters, and its CPU time."""
        assert self._controller is not None
        url = f"http://127.0.0.1:{self._admin_port}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            text = await answer.text()
        counters = {"writes": 0.0, "reconciles": 0.0, "status_429": 0.0}
        counters["cpu_s"] = self._controller.cpu_s()
        counters["api_server_cpu_s"] = cpu_s(self._server.control_plane.api_server.pid)
        for line in text.splitlines():
            head, _, value = line.rpartition(" ")
            if head.startswith("hbm_operator_reconcile_total{"):
                counters["reconciles"] += float(value)
            if head.startswith("hbm_operator_api_requests_total{"):
                if any(f'verb="{verb}"' in head for verb in ("apply", "create", "patch", "delete")):
                    counters["writes"] += float(value)
                if 'code="429"' in head:
                    counters["status_429"] += float(value)
        return counters


def _difference(before: dict[str, float], after: dict[str, float], per: int) -> dict[str, float]:
    return {
        "writes_each": (after["writes"] - before["writes"]) / per,
        "reconciles_each": (after["reconciles"] - before["reconciles"]) / per,
        "cpu_ms_each": (after["cpu_s"] - before["cpu_s"]) * 1000 / per,
        "api_server_cpu_ms_each": (after["api_server_cpu_s"] - before["api_server_cpu_s"])
        * 1000
        / per,
        "status_429": after["status_429"] - before["status_429"],
    }
