"""One Redis user per namespace, limited to that namespace's keys.

The truth about a user's password is the Secret `hbm-redis` of its namespace; Redis knows hashes
only. For the embedded Redis the hashes also stand in `users.acl` of the admin Secret, with which
Redis starts; what was added since reaches a running Redis by `ACL SETUSER`, again after each of its
restarts. An external Redis is told the same way, or its user is handed on as it is.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import secrets
from collections.abc import Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote, urlsplit

import structlog
from hbm_kube.client import KubeClient
from hbm_kube.errors import NotFound
from hbm_kube.resources import SECRETS
from redis import asyncio as redis
from redis.exceptions import RedisError

from hbm_operator import names
from hbm_operator.controller.settings import ControllerSettings
from hbm_operator.metrics import ControllerMetrics

ADMIN: Final = "hbm-admin"
COMMANDS: Final = (
    *("hset", "hgetall", "set", "get", "mget", "del", "pexpire"),
    *("zadd", "zrem", "zrangebyscore", "zremrangebyscore"),
    *("multi", "exec", "discard", "ping", "select", "client|setname"),
)
"""What sidecar and router use; none of them tells of other keys or other clients."""
TIMEOUT_S: Final = 5.0


class RedisUnavailable(Exception):
    """Redis does not answer, or refuses its administrator."""


class _Access(NamedTuple):
    """Where Redis is and who administers it."""

    address: str
    username: str
    password: str
    ca: str
    """PEM; empty: no TLS."""

    def url(self, username: str, password: str) -> str:
        scheme = "rediss" if self.ca else "redis"
        user = f"{quote(username, safe='')}:{quote(password, safe='')}"
        return f"{scheme}://{user}@{self.address}/0"


def user_of(namespace: str) -> str:
    """Name of the namespace's Redis user."""
    return f"ns-{namespace}"


def rules_of(namespace: str, password: str) -> list[str]:
    """Rules of the namespace's user, as ACL SETUSER takes them."""
    return [
        "reset",
        "on",
        f"#{_hashed(password)}",
        "resetchannels",  # Redis 6 begins with all of them
        f"~hbm:{namespace}:*",
        f"&hbm:{namespace}:*",
        "-@all",
        *(f"+{command}" for command in COMMANDS),
    ]


def _hashed(password: str) -> str:
    return hashlib.sha256(password.encode()).hexdigest()


def _line(namespace: str, password: str) -> str:
    # A file of users begins each with no rights: `reset` is not allowed there.
    return " ".join(("user", user_of(namespace), *rules_of(namespace, password)[1:]))


def _admin_lines(password: str) -> list[str]:
    return ["user default off", f"user {ADMIN} on #{_hashed(password)} ~* &* +@all"]


class RedisTenants:
    """Keeps users and Secrets in line. `ensure` raises `RedisUnavailable` after the Secrets are
    written: a Redis that starts later knows the user from its file."""

    def __init__(
        self, kube: KubeClient, settings: ControllerSettings, metrics: ControllerMetrics
    ) -> None:
        self._kube = kube
        self._settings = settings
        self._metrics = metrics
        self._log = structlog.get_logger()
        self._lock = asyncio.Lock()
        self._told: dict[str, str] = {}
        """Namespace -> hash that this run of Redis was told."""
        self._run_id = ""
        self._client: redis.Redis | None = None
        self._client_of: _Access | None = None

    @property
    def enabled(self) -> bool:
        """Whether there is a Redis at all."""
        return bool(self._settings.redis_secret or self._settings.redis_external_secret)

    async def prepare(self) -> None:
        """Make the embedded Redis' admin Secret; its pod waits for it."""
        if self._settings.redis_secret:
            async with self._lock:
                await self._embedded()

    async def ensure(self, namespace: str) -> None:
        """The namespace's user and Secret are there and agree.

        Raises:
            RedisUnavailable: Redis could not be told; try again.
            KubeError: a Secret could not be read or written.
        """
        if not self.enabled:
            return
        async with self._lock:
            access, users = await self._access()
            if self._settings.redis_shared_user:
                wanted = {"url": access.url(access.username, access.password)}
            else:
                password = await self._password(namespace, access) or secrets.token_urlsafe(24)
                wanted = {"url": access.url(user_of(namespace), password)}
                if users is not None:
                    await self._write_down(users, namespace, password)
            if access.ca:
                wanted["ca.crt"] = access.ca
            await self._hand_out(namespace, wanted)
            if not self._settings.redis_shared_user:
                await self._tell(access, namespace, password)
            self._metrics.tenants.set(len(self._told))

    async def restarted(self) -> bool:
        """Whether Redis has started anew since it was told of users: all must be told again."""
        if not self.enabled or self._settings.redis_shared_user:
            return False
        async with self._lock:
            try:
                access, _ = await self._access()
                return await self._notice_restart(access)
            except RedisUnavailable:
                return False  # it will be noticed when it answers

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    # -- Secrets ---------------------------------------------------------------------------------

    async def _access(self) -> tuple[_Access, dict[str, Any] | None]:
        """How to reach Redis; for the embedded one also its admin Secret."""
        if self._settings.redis_secret:
            secret = await self._embedded()
            password = _read(secret, "password")
            return _Access(self._settings.redis_address, ADMIN, password, ""), secret
        name = self._settings.redis_external_secret
        try:
            secret = await self._kube.get(SECRETS, name, self._settings.namespace)
        except NotFound as error:
            raise RedisUnavailable(
                f"Secret {self._settings.namespace}/{name} with the external Redis is not there"
            ) from error
        access = _Access(
            *(_read(secret, key) for key in ("address", "username", "password", "ca.crt"))
        )
        if not access.address:
            raise RedisUnavailable(f"Secret {name} has no `address`; write HOST:PORT there")
        return access._replace(username=access.username or "default"), None

    async def _embedded(self) -> dict[str, Any]:
        """The admin Secret, made where it is missing or unreadable."""
        name, namespace = self._settings.redis_secret, self._settings.namespace
        try:
            secret = await self._kube.get(SECRETS, name, namespace)
        except NotFound:
            secret = {}
        password = _read(secret, "password")
        users = _read(secret, "users.acl").splitlines()
        if password and users[:2] == _admin_lines(password):
            return secret
        password = password or secrets.token_urlsafe(32)
        kept = [line for line in users if line.startswith("user ns-")]
        return await self._write_admin(
            {"password": password, "users.acl": _joined([*_admin_lines(password), *kept])}
        )

    async def _write_admin(self, content: Mapping[str, str]) -> dict[str, Any]:
        return await self._write(self._settings.redis_secret, self._settings.namespace, content)

    async def _write(self, name: str, namespace: str, content: Mapping[str, str]) -> dict[str, Any]:
        body = {
            "metadata": {
                "name": name,
                "namespace": namespace,
                "labels": dict(names.COMPONENT_LABELS),
            },
            "type": "Opaque",
            "data": {
                key: base64.b64encode(value.encode()).decode() for key, value in content.items()
            },
        }
        return await self._kube.apply(SECRETS, body, field_manager=names.CONTROLLER_MANAGER)

    async def _password(self, namespace: str, access: _Access) -> str | None:
        """The one in the namespace's Secret, if it is a password of the namespace's user."""
        try:
            secret = await self._kube.get(SECRETS, names.REDIS_SECRET, namespace)
        except NotFound:
            return None
        try:
            parts = urlsplit(_read(secret, "url"))
        except ValueError:
            return None
        if unquote(parts.username or "") != user_of(namespace) or not parts.password:
            return None
        password = unquote(parts.password)
        # Whoever can write that Secret shall not thereby choose an easy one, or other rules.
        return password if re.fullmatch(r"[A-Za-z0-9_-]{24,128}", password) else None

    async def _write_down(self, secret: dict[str, Any], namespace: str, password: str) -> None:
        lines = _read(secret, "users.acl").splitlines()
        own = f"user {user_of(namespace)} "
        wanted = _line(namespace, password)
        if wanted in lines:
            return
        others = [line for line in lines if not line.startswith(own)]
        await self._write_admin(
            {
                "password": _read(secret, "password"),
                "users.acl": _joined([*others, wanted]),
            }
        )

    async def _hand_out(self, namespace: str, wanted: dict[str, str]) -> None:
        try:
            found = await self._kube.get(SECRETS, names.REDIS_SECRET, namespace)
        except NotFound:
            found = {}
        if {key: _read(found, key) for key in found.get("data") or {}} == wanted:
            return
        await self._write(names.REDIS_SECRET, namespace, wanted)

    # -- Redis -----------------------------------------------------------------------------------

    async def _tell(self, access: _Access, namespace: str, password: str) -> None:
        await self._notice_restart(access)
        if self._told.get(namespace) == _hashed(password):
            return
        try:
            await self._connected(access).execute_command(  # type: ignore[no-untyped-call]
                "ACL", "SETUSER", user_of(namespace), *rules_of(namespace, password)
            )
        except (RedisError, OSError, TimeoutError) as error:
            raise self._unavailable(access, error) from error
        self._told[namespace] = _hashed(password)
        self._log.info("redis user set", namespace=namespace)

    async def _notice_restart(self, access: _Access) -> bool:
        try:
            run_id = str((await self._connected(access).info("server"))["run_id"])
        except (RedisError, OSError, TimeoutError) as error:
            raise self._unavailable(access, error) from error
        self._up(1)
        if run_id == self._run_id:
            return False
        restarted = bool(self._run_id)
        self._run_id = run_id
        self._told.clear()
        return restarted

    def _up(self, up: int) -> None:
        mode = "embedded" if self._settings.redis_secret else "external"
        self._metrics.redis_up.labels(mode).set(up)

    def _unavailable(self, access: _Access, error: Exception) -> RedisUnavailable:
        self._up(0)
        return RedisUnavailable(f"Redis at {access.address}: {error or type(error).__name__}")

    def _connected(self, access: _Access) -> redis.Redis:
        if self._client is None or access != self._client_of:
            options: dict[str, Any] = {"ssl_ca_data": access.ca} if access.ca else {}
            self._client = redis.Redis.from_url(
                access.url(access.username, access.password),
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                decode_responses=True,
                **options,
            )
            self._client_of = access
        return self._client


def _read(secret: Mapping[str, Any], key: str) -> str:
    """A value of a Secret; empty where it is missing or no text."""
    try:
        return base64.b64decode((secret.get("data") or {}).get(key) or "").decode()
    except ValueError:
        return ""


def _joined(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
