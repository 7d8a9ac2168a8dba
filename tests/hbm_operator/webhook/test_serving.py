"""Certificates, readiness and the end of the process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hbm_operator.certificates import Pair
from hbm_operator.injector import SkipReason
from hbm_operator.webhook.capabilities import has_native_sidecars
from hbm_operator.webhook.metrics import WebhookMetrics

from tests.hbm_operator.mounted import mount, mount_pair
from tests.hbm_operator.webhook.running import (
    SERVER_NAME,
    Running,
    new_pair,
    review,
    running,
    until,
    webhook_settings,
)

COMMAND = (sys.executable, "-c", "from hbm_operator.cli import app; app()", "webhook")
POD: dict[str, Any] = {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c"}]}}


async def _shown(port: int) -> bytes:
    """The certificate that a new connection is shown, DER."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    shown: bytes = writer.get_extra_info("ssl_object").getpeercert(True)
    writer.transport.abort()
    return shown


async def _until_shown(webhook: Running, pair: Pair) -> None:
    async def shown() -> bool:
        return await _shown(webhook.port) == pair.der()

    await until(shown)


async def test_new_certificate_is_shown_and_open_connections_stay_open(tmp_path: Path) -> None:
    old, new = new_pair(), new_pair(lifetime_s=900.0)
    mount_pair(tmp_path / "tls", old)
    async with running(webhook_settings(tmp_path)) as webhook:
        context = ssl.create_default_context(cadata=old.authority.decode())
        connector = aiohttp.TCPConnector(ssl=context, limit=1)
        async with aiohttp.ClientSession(connector=connector) as session:
            for pair in (old, new):
                mount_pair(tmp_path / "tls", pair)
                await _until_shown(webhook, pair)
                # The client trusts the old authority only: a second handshake would fail.
                async with session.post(
                    f"https://127.0.0.1:{webhook.port}/mutate",
                    json=review(POD),
                    server_hostname=SERVER_NAME,
                ) as response:
                    assert response.status == 200
                    await response.read()
        assert (await webhook.admin("/readyz"))[0] == 200
        _, text = await webhook.admin("/metrics")
        expiry = next(
            float(line.split()[1])
            for line in text.splitlines()
            if line.startswith("hbm_webhook_certificate_expiry_timestamp_seconds ")
        )
        assert 600 < expiry - datetime.now(UTC).timestamp() <= 900
        assert 'hbm_webhook_certificate_loads_total{result="loaded"} 2.0' in text


@pytest.mark.parametrize("damage", ["other key", "garbage", "no key"])
async def test_a_pair_that_does_not_fit_leaves_the_old_one_serving(
    tmp_path: Path, damage: str
) -> None:
    old, new = new_pair(), new_pair()
    mount_pair(tmp_path / "tls", old)
    async with running(webhook_settings(tmp_path)) as webhook:
        files = {"tls.crt": new.certificate, "tls.key": old.key, "ca.crt": new.authority}
        if damage == "garbage":
            files["tls.crt"] = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
        if damage == "no key":
            files["tls.key"] = b""
        mount(tmp_path / "tls", files)

        async def refused() -> bool:
            _, text = await webhook.admin("/metrics")
            return 'hbm_webhook_certificate_loads_total{result="refused"} 1.0' in text

        await until(refused)
        assert await _shown(webhook.port) == old.der()
        assert (await webhook.admin("/readyz"))[0] == 200
        mount_pair(tmp_path / "tls", new)
        await _until_shown(webhook, new)


@pytest.mark.parametrize("with_authority", [True, False])
async def test_ready_is_an_admission_of_its_own(tmp_path: Path, with_authority: bool) -> None:
    mount_pair(tmp_path / "tls", new_pair(), with_authority=with_authority)
    async with running(webhook_settings(tmp_path)) as webhook:
        assert await webhook.admin("/healthz") == (200, "ok\n")
        assert await webhook.admin("/readyz") == (200, "ok\n")
        _, text = await webhook.admin("/metrics")
        assert "hbm_webhook_injections_total{" not in text, "its own admission was counted"
        wrong = new_pair(names=("another.name.svc",))
        mount_pair(tmp_path / "tls", wrong, with_authority=with_authority)
        await _until_shown(webhook, wrong)
        status, text = await webhook.admin("/readyz")
        assert status == 503
        assert SERVER_NAME in text


async def test_ready_where_it_listens_on_all_addresses(tmp_path: Path) -> None:
    mount_pair(tmp_path / "tls", new_pair())
    async with running(webhook_settings(tmp_path, host="")) as webhook:
        assert await webhook.admin("/readyz") == (200, "ok\n")


async def test_expired_certificate_is_not_ready(tmp_path: Path) -> None:
    mount_pair(tmp_path / "tls", new_pair(lifetime_s=-1.0))
    async with running(webhook_settings(tmp_path)) as webhook:
        status, text = await webhook.admin("/readyz")
        assert status == 503
        assert "expired" in text


# -- as a process ---------------------------------------------------------------------------------


def _start(tmp_path: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *COMMAND,
            "--host=127.0.0.1",
            "--port=0",
            "--admin-port=0",
            f"--tls-dir={tmp_path / 'tls'}",
            f"--ready-file={tmp_path / 'ready.json'}",
            "--sidecar-image=sidecar:1",
            "--tls-reload-s=0.1",
            *flags,
        ],
        stderr=subprocess.PIPE,
        text=True,
    )


async def _serving(tmp_path: Path, process: subprocess.Popen[str]) -> Running:
    ready = tmp_path / "ready.json"
    while not (ready.exists() and ready.read_text()):
        assert process.poll() is None
        await asyncio.sleep(0.02)
    return Running(**json.loads(ready.read_text()), stop=asyncio.Event(), task=_nothing())


def _nothing() -> asyncio.Task[None]:
    return asyncio.create_task(asyncio.sleep(0))


async def test_waits_for_its_certificate_and_drains_on_sigterm(tmp_path: Path) -> None:
    pair = new_pair()
    process = _start(tmp_path, "--drain-s=2")
    try:
        assert process.stderr is not None
        while "waiting for a certificate" not in await asyncio.to_thread(process.stderr.readline):
            assert process.poll() is None
        assert not (tmp_path / "ready.json").exists()
        mount_pair(tmp_path / "tls", pair)
        webhook = await _serving(tmp_path, process)
        assert (await webhook.admit(pair, review(POD)))[0] == 200

        process.send_signal(signal.SIGTERM)

        async def not_ready() -> bool:
            return (await webhook.admin("/readyz"))[0] == 503

        await until(not_ready)
        # Not ready any more, but whoever has not heard of it is still answered, and sent away.
        context = ssl.create_default_context(cadata=pair.authority.decode())
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                f"https://127.0.0.1:{webhook.port}/mutate",
                json=review(POD),
                ssl=context,
                server_hostname=SERVER_NAME,
            ) as response,
        ):
            assert response.status == 200
            assert response.headers["Connection"] == "close"
        assert await asyncio.to_thread(process.wait, 60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ["--sidecar-image is needed", "HBM_OPERATOR_SIDECAR_IMAGE"]),
        (("--sidecar-image=x", "--sidecar-memory=lots"), ["--sidecar-memory", "'lots'", "400Mi"]),
        (("--sidecar-image=x", "--sidecar-cpu=0"), ["--sidecar-cpu", "'0'"]),
        (("--sidecar-image=x", "--native-sidecars=yes"), ["--native-sidecars", "'auto'", "yes"]),
        (("--sidecar-image=x", "--port=99999"), ["--port", "65535", "99999"]),
        (("--sidecar-image=x", "--ready-file=/no/such/f"), ["--ready-file", "/no/such"]),
        (("--sidecar-image=x", "--log-level=loud"), ["--log-level", "'debug'", "loud"]),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags: tuple[str, ...], words: list[str]) -> None:
    done = subprocess.run(
        [*COMMAND, "--port=0", "--admin-port=0", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"HBM_OPERATOR_NAMESPACE": "x"},
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("hbm operator webhook: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("major", "minor", "native"),
    [
        ("1", "28", False),
        ("1", "29", True),
        ("1", "29+", True),
        ("1", "35", True),
        ("2", "0", True),
    ],
)
def test_native_sidecars_by_version(major: str, minor: str, native: bool) -> None:
    assert has_native_sidecars(major, minor) is native


def test_metrics_are_documented() -> None:
    table = (Path(__file__).parents[3] / "docs" / "metrics-operator.md").read_text()
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `hbm_webhook_")]
    documented = {
        row[1].strip().strip("`"): (row[2].strip(), row[3].strip().replace(", ", ","))
        for row in rows
    }
    exported = {}
    for collector, series in WebhookMetrics().registry._collector_to_names.items():
        kind = str(getattr(collector, "_type", ""))
        name = f"{getattr(collector, '_name', '')}{'_total' if kind == 'counter' else ''}"
        if name in series and name.startswith("hbm_webhook_"):
            exported[name] = (kind, ",".join(getattr(collector, "_labelnames", ())))
    assert documented == exported


def test_reasons_are_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "metrics-operator.md").read_text()
    assert [reason for reason in SkipReason if f"`{reason}`" not in page] == []
