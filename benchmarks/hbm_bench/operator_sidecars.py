"""Sidecars without pods: one watch and one bound token each, and an answer to every new spec.

A process of its own (`python -m hbm_bench.operator_sidecars`), so that thousands of them and the
controller that is measured do not share an interpreter. Reads pods as JSON lines
{namespace, name, token} from standard input up to an empty line, writes `{"connected": N}` once
each has seen its partition, and for each further line what was done so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import random
import ssl
import sys
from collections import Counter
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import aiohttp
import orjson

API: Final = "/apis/hbm-partition.io/v1alpha1/namespaces"
CONNECTING: Final = 48
"""Connections that are made at the same time."""
JITTER: Final = 0.2


class Pod(NamedTuple):
    """Whose sidecar it is."""

    namespace: str
    name: str
    token: str


class Sidecars:
    """All sidecars of one process.

    Args:
        server: https://HOST:PORT.
        ca: file of the cluster's authority.
        report_s: time between two reports of measured values; ± 20 %.
        seed: of the jitter.
    """

    def __init__(self, server: str, ca: str, report_s: float, seed: int) -> None:
        self._server = server
        self._tls = ssl.create_default_context(cafile=ca)
        self._report_s = report_s
        self._chance = random.Random(seed)
        self._connecting = asyncio.Semaphore(CONNECTING)
        self.count: Counter[str] = Counter()

    async def run(self, pods: list[Pod], connected: asyncio.Event) -> None:
        """Until cancelled."""
        waiting = {pod.name + pod.namespace for pod in pods}

        def seen(pod: Pod) -> None:
            waiting.discard(pod.name + pod.namespace)
            if not waiting:
                connected.set()

        connector = aiohttp.TCPConnector(limit=0, ssl=self._tls)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            asyncio.TaskGroup() as tasks,
        ):
            for pod in pods:
                tasks.create_task(self._live(session, pod, functools.partial(seen, pod)))

    async def _live(self, session: aiohttp.ClientSession, pod: Pod, seen: Any) -> None:
        """Watch, answer at once, report now and then."""
        generation = [0]
        report = asyncio.create_task(self._report(session, pod, generation))
        try:
            while True:
                try:
                    await self._watch(session, pod, generation, seen)
                except (aiohttp.ClientError, TimeoutError, OSError):
                    self.count["watch_failures"] += 1
                await asyncio.sleep(self._chance.uniform(0.2, 2.0))
        finally:
            report.cancel()

    async def _watch(
        self, session: aiohttp.ClientSession, pod: Pod, generation: list[int], seen: Any
    ) -> None:
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "fieldSelector": f"metadata.name={pod.name}",
        }
        async with contextlib.AsyncExitStack() as stack:
            async with self._connecting:
                answer = await stack.enter_async_context(
                    session.get(
                        f"{self._server}{API}/{pod.namespace}/hbmpartitions",
                        params=query,
                        headers={"Authorization": f"Bearer {pod.token}"},
                        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
                    )
                )
            if answer.status != 200:
                self.count[f"watch_{answer.status}"] += 1
                return
            async for line in answer.content:
                event = orjson.loads(line)
                if event["type"] not in ("ADDED", "MODIFIED"):
                    continue
                self.count["events"] += 1
                found = event["object"]["metadata"]["generation"]
                if found > generation[0]:
                    generation[0] = found
                    await self._write(session, pod, found, "acknowledged")
                else:
                    self.count["echoes"] += 1
                seen()

    async def _report(
        self, session: aiohttp.ClientSession, pod: Pod, generation: list[int]
    ) -> None:
        while True:
            await asyncio.sleep(self._report_s * self._chance.uniform(1 - JITTER, 1 + JITTER))
            if generation[0]:
                await self._write(session, pod, generation[0], "reported")

    async def _write(
        self, session: aiohttp.ClientSession, pod: Pod, generation: int, what: str
    ) -> None:
        body = orjson.dumps(_status(pod, generation, self._chance.random()))
        for attempt in range(6):
            try:
                async with session.patch(
                    f"{self._server}{API}/{pod.namespace}/hbmpartitions/{pod.name}/status",
                    params={"fieldManager": "hbm-sidecar", "force": "true"},
                    data=body,
                    headers={
                        "Authorization": f"Bearer {pod.token}",
                        "Content-Type": "application/apply-patch+yaml",
                    },
                    timeout=aiohttp.ClientTimeout(total=30),
                ) as answer:
                    await answer.read()
                    self.count[f"status_{answer.status}"] += 1
                    if answer.status == 200:
                        self.count[what] += 1
                    if answer.status < 429 and answer.status != 409:
                        return
            except (aiohttp.ClientError, TimeoutError, OSError):
                self.count["status_failures"] += 1
            await asyncio.sleep(self._chance.uniform(0.1, 0.4) * 2**attempt)


def _status(pod: Pod, generation: int, value: float) -> dict[str, Any]:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "hbm-partition.io/v1alpha1",
        "kind": "HBMPartition",
        "metadata": {"name": pod.name, "namespace": pod.namespace},
        "status": {
            "observedGeneration": generation,
            "alpha": 0.5,
            "target": 0.5,
            "anchor": 0.5,
            "kvHitRatio": round(value, 3),
            "embHitRatio": 0.9,
            "p99Ms": 12.5,
            "moves": 3,
            "lastReportTime": now,
            "sidecar": {"version": "0.1.0", "protocol": 1, "restarts": 0},
            "conditions": [
                {
                    "type": "Applied",
                    "status": "True",
                    "reason": "Applied",
                    "message": "",
                    "observedGeneration": generation,
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                }
            ],
        },
    }


async def _main(server: str, ca: str, report_s: float, seed: int) -> None:
    pods = []
    for line in iter(sys.stdin.readline, "\n"):
        pods.append(Pod(**json.loads(line)))
    sidecars = Sidecars(server, ca, report_s, seed)
    connected = asyncio.Event()
    living = asyncio.create_task(sidecars.run(pods, connected))
    wait = asyncio.create_task(connected.wait())
    await asyncio.wait({living, wait}, return_when=asyncio.FIRST_COMPLETED)
    print(json.dumps({"connected": len(pods)}), flush=True)
    asking = asyncio.create_task(asyncio.to_thread(_answer_questions, sidecars))
    await asyncio.wait({living, asking}, return_when=asyncio.FIRST_COMPLETED)
    living.cancel()
    await asyncio.gather(living, return_exceptions=True)


def _answer_questions(sidecars: Sidecars) -> None:
    """Each further line asks what was done so far."""
    for _ in sys.stdin:
        print(json.dumps(dict(sidecars.count)), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])))
