"""Heartbeats and digests to Redis. The rest of the sidecar never waits for it.

A heartbeat is one transaction: node hash, membership, and the digest blob when it is due; all three
name the same sequence. Keys expire after `ttl_s`: a sidecar that dies takes its node out of the
router's sight. When the *server* is dead there is no heartbeat either, so the same thing happens;
the keys are left to expire because a server that merely stalled comes back within that time. A
sidecar that is stopped in order removes its keys at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import redis.asyncio as redis
from hbm_pool.contracts import digest as codec
from hbm_pool.contracts.digest import NodeState
from redis.exceptions import RedisError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from hbm_sidecar.metrics import SidecarMetrics

BACKOFF_LAST_S: Final = 5.0
FORGET_AFTER_MS: Final = 600_000
"""Members of the node set without a heartbeat for so long are swept out."""
SWEEP_EVERY: Final = 240


class Beat(NamedTuple):
    """What one heartbeat carries."""

    state: NodeState
    digest: bytes | None
    """None: the digest stored before stays."""


class Publisher:
    """Sends what `make_beat(whole)` returns, every `period_s`, until cancelled.

    `make_beat` is called for each attempt, so that what is stored is never older than the attempt;
    it returns None while there is nothing to say (no server, or a dead one). `whole` asks for the
    digest whether it changed or not.
    """

    def __init__(
        self,
        url: str,
        namespace: str,
        name: str,
        period_s: float,
        ttl_s: float,
        make_beat: Callable[[bool], Beat | None],
        metrics: SidecarMetrics,
        log: Any,
    ) -> None:
        self._client = redis.Redis.from_url(
            url, socket_timeout=2.0, socket_connect_timeout=2.0, single_connection_client=True
        )
        self._keys = (
            codec.nodes_key(namespace),
            codec.node_key(namespace, name),
            codec.digest_key_name(namespace, name),
        )
        self._name = name
        self._period_s = period_s
        self._ttl_ms = int(ttl_s * 1000)
        self._make_beat = make_beat
        self._metrics = metrics
        self._log = log
        self._whole = True
        self._beats = 0
        self.up = False
        self.last_error = ""

    async def run(self) -> None:
        """Beat until cancelled. Redis down: jittered back-off, then the whole digest."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            retrying = AsyncRetrying(
                wait=wait_random_exponential(multiplier=self._period_s, max=BACKOFF_LAST_S),
                retry=retry_if_exception_type((RedisError, OSError, TimeoutError)),
                before_sleep=self._failed,
            )
            async for attempt in retrying:
                with attempt:
                    await self._beat()
            due = max(due + self._period_s, loop.time())
            await asyncio.sleep(due - loop.time())

    async def leave(self) -> None:
        """Take the node out of the router's sight now; silent when Redis is away."""
        node, blob = self._keys[1], self._keys[2]
        try:
            async with self._client.pipeline(transaction=True) as pipe:
                pipe.delete(node, blob)
                pipe.zrem(self._keys[0], self._name)
                await pipe.execute()
        except (RedisError, OSError, TimeoutError) as error:
            self._log.info("keys left to expire", why=str(error))
        finally:
            await self._client.aclose()

    async def _beat(self) -> None:
        beat = self._make_beat(self._whole)
        if beat is None:
            return
        try:
            fields: dict[Any, Any] = dict(codec.node_to_hash(beat.state))
        except codec.NodeStateError as error:
            self._metrics.redis_errors.inc()
            if str(error) != self.last_error:
                self._log.warning(
                    "heartbeat left out: the telemetry makes no sense", why=str(error)
                )
            self.last_error = str(error)
            return
        nodes, node, blob = self._keys
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.hset(node, mapping=fields)
            pipe.pexpire(node, self._ttl_ms)
            pipe.zadd(nodes, {self._name: beat.state.heartbeat_unix_ms})
            if self._beats % SWEEP_EVERY == 0:
                pipe.zremrangebyscore(nodes, 0, beat.state.heartbeat_unix_ms - FORGET_AFTER_MS)
            if beat.digest is None:
                pipe.pexpire(blob, self._ttl_ms)
            else:
                pipe.set(blob, beat.digest, px=self._ttl_ms)
            replies = await pipe.execute()
        # A blob that was not there to be kept alive (Redis restarted empty) is sent whole next.
        self._whole = not replies[-1]
        self._beats += 1
        self._metrics.heartbeats.inc()
        if beat.digest is not None:
            self._metrics.digests.inc()
            self._metrics.digest_bytes.set(len(beat.digest))
        if not self.up:
            self.up, self.last_error = True, ""
            self._metrics.redis_up.set(1)
            self._log.info("heartbeats are stored", node=self._name)

    def _failed(self, retry: RetryCallState) -> None:
        error = retry.outcome.exception() if retry.outcome is not None else None
        self._metrics.redis_errors.inc()
        self._metrics.redis_up.set(0)
        self._whole = True
        text = f"{type(error).__name__}: {error}"
        if self.up or not self.last_error:
            self._log.warning("heartbeat not stored; trying again with back-off", why=text)
        self.up, self.last_error = False, text
