"""Admissions per second of one webhook replica, as an open loop over TLS."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import aiohttp
import numpy as np
from hbm_e2e.waiting import wait_for
from hbm_operator.certificates import issue

from hbm_bench.operator_cluster import cpu_s

RATE: Final = 200.0
CONNECTIONS: Final = 16
"""As an API server has: it keeps a few connections to a webhook."""


def measure(folder: Path, seconds: float) -> dict[str, Any]:
    """Latency from the time an admission was due to its answer, ms."""
    pair = issue(("localhost",), 86_400.0, datetime.now(UTC))
    tls = folder / "tls"
    tls.mkdir(parents=True, exist_ok=True)
    (tls / "tls.crt").write_bytes(pair.certificate)
    (tls / "tls.key").write_bytes(pair.key)
    (tls / "ca.crt").write_bytes(pair.authority)
    ready = folder / "webhook.json"
    command = [
        *(sys.executable, "-m", "hbm_cli.main", "operator", "webhook", "--host", "127.0.0.1"),
        *("--port", "0", "--admin-port", "0", "--tls-dir", str(tls), "--ready-file", str(ready)),
        *("--sidecar-image", "sidecar:bench", "--native-sidecars", "true"),
    ]
    with (folder / "webhook.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(
            lambda: ready.exists() and ready.read_text(),
            60,
            "the webhook to serve",
            because=(folder / "webhook.log").read_text,
        )
        ports = json.loads(ready.read_text())
        context = ssl.create_default_context(cadata=pair.authority.decode())
        before = cpu_s(process.pid)
        latencies = asyncio.run(_load(ports["port"], context, seconds))
        cpu_ms = (cpu_s(process.pid) - before) * 1000 / len(latencies)
        rss_mb = _rss_mb(process.pid)
    finally:
        process.kill()
        process.wait()
    return {
        "admissions": len(latencies),
        "per_second": RATE,
        "p50_ms": float(np.percentile(latencies, 50)),
        "p99_ms": float(np.percentile(latencies, 99)),
        "cpu_ms_each": cpu_ms,
        "rss_mb": rss_mb,
    }


def _rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


async def _load(port: int, tls: ssl.SSLContext, seconds: float) -> list[float]:
    connector = aiohttp.TCPConnector(limit=CONNECTIONS, ssl=tls)
    latencies: list[float] = []

    async def admit(session: aiohttp.ClientSession, due: float) -> None:
        async with session.post(f"https://localhost:{port}/mutate", data=_review()) as answer:
            body = await answer.json(content_type=None)
        assert "patch" in body["response"], f"not injected: {body}"
        latencies.append((time.perf_counter() - due) * 1000)

    async with aiohttp.ClientSession(
        connector=connector, headers={"Content-Type": "application/json"}
    ) as session:
        for _ in range(50):  # connections and code paths are warm before it counts
            await admit(session, time.perf_counter())
        latencies.clear()
        begin = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for number in range(int(seconds * RATE)):
                due = begin + number / RATE
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.create_task(admit(session, due))
    return latencies


def _review() -> bytes:
    container = {
        "name": "model",
        "image": "model:1",
        "env": [{"name": f"VARIABLE_{number}", "value": str(number)} for number in range(80)],
        "resources": {"limits": {"nvidia.com/gpu": "1"}, "requests": {"cpu": "4"}},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": "ranker-",
            "labels": {"app": "ranker", "hbm-partition.io/inject": "true"},
        },
        "spec": {"containers": [container], "volumes": [{"name": "tmp", "emptyDir": {}}]},
    }
    return json.dumps(
        {
            "apiVersion": "admission.k8s.io/v1",
            "kind": "AdmissionReview",
            "request": {
                "uid": str(uuid.uuid4()),
                "kind": {"group": "", "version": "v1", "kind": "Pod"},
                "resource": {"group": "", "version": "v1", "resource": "pods"},
                "operation": "CREATE",
                "namespace": "bench",
                "dryRun": False,
                "object": pod,
            },
        }
    ).encode()
