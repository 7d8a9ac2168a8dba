"""Reads what nodes publish in Redis and turns it into snapshots, in a thread of its own.

One round: ZRANGEBYSCORE (who is alive), one pipeline of HGETALL (their states), one MGET of those
digests that have changed. Decoding and sorting happen here too, so that the data path only ever
swaps a pointer. Nothing that Redis says or fails to say reaches a request: what is malformed,
stale or foreign is rejected, counted by reason and survived; the last good words stay, and age.

Rejected as
* `schema`: state written by another release; `state`: malformed fields,
* `foreign`: the state or digest of someone else under this node's key,
* `stale`: older than what was already accepted,
* `missing`: announced in the state, but not there,
* `mismatch`: a digest that the state does not announce,
* else the codec's own word (`hbm_pool.contracts.digest.DigestReason`).

A node's clock is never compared with ours beyond its first heartbeat: age counts from the moment
at which a new sequence number was first seen.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, cast

import redis
import structlog
from hbm_kube.redis_secret import RedisSecret
from hbm_pool.contracts.digest import (
    NODE_SCHEMA,
    DigestError,
    NodeState,
    NodeStateError,
    decode_digest,
    digest_crc,
    digest_key_name,
    node_from_hash,
    node_key,
    nodes_key,
)
from redis.backoff import NoBackoff
from redis.retry import Retry

from hbm_router.config import RouterSettings
from hbm_router.cost import CostTable, Trust
from hbm_router.metrics import RouterMetrics
from hbm_router.snapshot import NodeView, Residency, Snapshot

LIVE_WINDOW_MS: Final = 60_000
"""Members of the ZSET older than this are ignored; wide, because clocks differ."""
MAX_MEMBERS: Final = 4096
MAX_BACKOFF_S: Final = 2.0


class Offered(Protocol):
    """Who takes snapshots: the data path."""

    def offer(self, table: CostTable) -> None: ...

    @property
    def names(self) -> tuple[str, ...]: ...


class Rejected(Exception):
    """Something a node said is not believed."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def accept_state(name: str, fields: Mapping[bytes, bytes], previous: NodeView | None) -> NodeState:
    """The state in a node's hash, if it is newer than or the same as what is known.

    Raises `Rejected`.
    """
    if fields.get(b"schema", b"") not in (b"", str(NODE_SCHEMA).encode()):
        raise Rejected("schema", f"schema {fields[b'schema'][:20]!r} is not {NODE_SCHEMA}")
    try:
        state = node_from_hash(fields)
    except NodeStateError as error:
        raise Rejected("state", str(error)) from error
    if state.name != name:
        raise Rejected("foreign", f"the state under {name!r} is of node {state.name!r}")
    if previous is not None:
        known = previous.state
        if state.boot_epoch == known.boot_epoch:
            older = state.sequence < known.sequence
        else:
            older = state.heartbeat_unix_ms < known.heartbeat_unix_ms
        if older:
            raise Rejected(
                "stale", f"heartbeat {state.sequence} came after {known.sequence} was accepted"
            )
    return state


def accept_digest(state: NodeState, blob: bytes | None, previous: Residency | None) -> Residency:
    """The residency in a node's digest, if it is what the state announces or newer.

    Raises `Rejected`.
    """
    if blob is None:
        raise Rejected("missing", "the digest that the state announces is not there")
    try:
        digest = decode_digest(blob)
    except DigestError as error:
        raise Rejected(str(error.reason), str(error)) from error
    if digest.boot_epoch != state.boot_epoch:
        raise Rejected("foreign", f"digest of boot {digest.boot_epoch}, not {state.boot_epoch}")
    crc = digest_crc(blob)
    if digest.sequence == state.digest_sequence and crc != state.digest_crc:
        raise Rejected("mismatch", "the digest is not the one that the state announces")
    known = previous.sequence if previous is not None else -1
    if digest.sequence < state.digest_sequence or digest.sequence < known:
        raise Rejected(
            "stale", f"digest {digest.sequence} is older than {state.digest_sequence} or {known}"
        )
    return Residency(
        keys=digest.keys.astype("int64"),
        tokens=digest.tokens,
        shard_rows=digest.shard_rows,
        blob_bytes=len(blob),
        boot_epoch=digest.boot_epoch,
        sequence=digest.sequence,
        crc=crc,
    )


class Collector:
    """Holds the last accepted words of each node; turns one round of answers into the next."""

    def __init__(
        self, rejected: Callable[[str, str, str], None], expire_s: float = float("inf")
    ) -> None:
        """`rejected(node, reason, message)` is told of everything that is not believed.

        Words older than `expire_s` do not make newer ones stale: a sidecar whose clock was set
        back may count from a lower number, and must be heard again.
        """
        self.views: dict[str, NodeView] = {}
        self._rejected = rejected
        self._expire_s = expire_s

    def keep_only(self, names: tuple[str, ...]) -> None:
        """Forgets nodes that are no backends any more."""
        for name in set(self.views) - set(names):
            del self.views[name]

    def states(
        self, answers: Mapping[str, Mapping[bytes, bytes]], now_s: float, now_unix_ms: int
    ) -> list[str]:
        """Takes in node hashes; returns the nodes whose digest must be fetched."""
        wanted = []
        for name, fields in answers.items():
            if not fields:
                continue  # expired between the two reads; its last words age
            previous = self.views.get(name)
            if previous is not None and now_s - previous.heard_s > self._expire_s:
                previous = None
            try:
                state = accept_state(name, fields, previous)
            except Rejected as error:
                self._rejected(name, error.reason, str(error))
                continue
            residency = previous.residency if previous is not None else None
            if residency is not None and residency.boot_epoch != state.boot_epoch:
                residency = None  # the server started anew with an empty pool
            confirmed = residency is not None and (
                residency.sequence >= state.digest_sequence
                and (
                    residency.sequence > state.digest_sequence or residency.crc == state.digest_crc
                )
            )
            if previous is None:
                heard_s = now_s - max(0, now_unix_ms - state.heartbeat_unix_ms) / 1000
            elif (state.boot_epoch, state.sequence) == (
                previous.state.boot_epoch,
                previous.state.sequence,
            ):
                heard_s = previous.heard_s
            else:
                heard_s = now_s
            residency_heard_s = heard_s
            if not confirmed:
                wanted.append(name)
                residency_heard_s = previous.residency_heard_s if previous is not None else heard_s
            self.views[name] = NodeView(state, heard_s, residency, residency_heard_s)
        return wanted

    def digests(self, blobs: Mapping[str, bytes | None]) -> int:
        """Takes in digests; returns how many were accepted."""
        accepted = 0
        for name, blob in blobs.items():
            view = self.views[name]
            try:
                residency = accept_digest(view.state, blob, view.residency)
            except Rejected as error:
                self._rejected(name, error.reason, str(error))
                continue
            self.views[name] = view._replace(residency=residency, residency_heard_s=view.heard_s)
            accepted += 1
        return accepted


class SnapshotReader:
    """The thread. `names` are the backends, `offer` takes each new table; both are thread-safe."""

    def __init__(
        self,
        settings: RouterSettings,
        target: Offered,
        metrics: RouterMetrics,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        file = settings.redis_url_file
        self._secret = None if file is None else RedisSecret(file)
        self._problem = ""
        self._target = target
        self._metrics = metrics
        self._clock = clock
        self._unix_clock = unix_clock
        self._trust = Trust(settings.fresh_s, settings.half_life_s, settings.expire_s)
        self._log = structlog.get_logger("hbm_router")
        self._told: set[tuple[str, str]] = set()
        self._collector = Collector(self._reject, settings.expire_s)
        self._snapshot: Snapshot | None = None
        self._stop = threading.Event()
        self._up: bool | None = None
        self._redis: redis.Redis | None = None
        if settings.redis_url is not None:
            self._redis = self._connection(settings.redis_url)
        self._thread = threading.Thread(target=self._run, name="snapshot-reader", daemon=True)

    def start(self) -> None:
        """Starts reading."""
        self._thread.start()

    def stop(self) -> None:
        """Stops and waits for the thread."""
        self._stop.set()
        self._thread.join(timeout=5)
        if self._redis is not None:
            self._redis.close()

    def _connection(self, url: str) -> redis.Redis:
        timeout_s = self._settings.redis_timeout_ms / 1000
        return redis.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            client_name="hbm-router",
        )

    def _follow(self, secret: RedisSecret) -> None:
        """Turn to another Redis once the file names one."""
        changed = secret.poll()
        if secret.problem and secret.problem != self._problem:
            self._log.warning("no new address of redis", why=secret.problem)
        self._problem = secret.problem
        if not changed or secret.url is None:
            return
        before, self._redis = self._redis, self._connection(secret.url)
        self._log.info("redis has an address", file=str(secret.path), changed=before is not None)
        if before is not None:
            before.close()

    def _run(self) -> None:
        period_s = self._settings.poll_ms / 1000
        backoff_s = period_s
        jitter = random.Random()
        while not self._stop.is_set():
            if self.poll():
                backoff_s = wait_s = period_s
            else:
                backoff_s = min(MAX_BACKOFF_S, backoff_s * 2)
                wait_s = backoff_s * (0.5 + jitter.random() / 2)
            self._stop.wait(wait_s)

    def poll(self) -> bool:
        """One round; `False` when Redis did not answer."""
        started_s = self._clock()
        try:
            if self._secret is not None:
                self._follow(self._secret)
            if self._redis is None:
                return True  # nobody to ask yet
            self._round(self._redis)
        except (redis.RedisError, OSError) as error:
            self._metrics.polls.labels("error").inc()
            self._metrics.store_up.set(0)
            if self._up is not False:
                self._log.warning("redis does not answer", error=str(error))
            self._up = False
            return False
        except Exception as error:
            # Whatever is in Redis, this thread must live: without it there is no news at all.
            self._metrics.polls.labels("failed").inc()
            self._log.error("reading redis failed", error=repr(error))
            return False
        self._metrics.polls.labels("ok").inc()
        self._metrics.store_up.set(1)
        self._metrics.poll_s.observe(self._clock() - started_s)
        if self._up is False:
            self._log.info("redis answers again")
        self._up = True
        return True

    def _round(self, store: redis.Redis) -> None:
        namespace, names = self._settings.namespace, self._target.names
        now_unix_ms = int(self._unix_clock() * 1000)
        members = cast(
            list[bytes],
            store.zrangebyscore(
                nodes_key(namespace), now_unix_ms - LIVE_WINDOW_MS, "+inf", 0, MAX_MEMBERS
            ),
        )
        alive = {member.decode("utf-8", "replace") for member in members}
        matched = [name for name in names if name in alive]
        self._metrics.unmatched_nodes.set(len(alive) - len(matched))
        pipeline = store.pipeline(transaction=False)
        for name in matched:
            pipeline.hgetall(node_key(namespace, name))
        answers: list[Any] = pipeline.execute(raise_on_error=False) if matched else []
        hashes: dict[str, Mapping[bytes, bytes]] = {}
        for name, answer in zip(matched, answers, strict=True):
            if isinstance(answer, Exception):
                self._reject(name, "state", f"{node_key(namespace, name)}: {answer}")
            else:
                hashes[name] = answer
        collector = self._collector
        collector.keep_only(names)
        now_s = self._clock()
        wanted = collector.states(hashes, now_s, now_unix_ms)
        if wanted:
            blobs = cast(
                list[bytes | None],
                store.mget([digest_key_name(namespace, name) for name in wanted]),
            )
            accepted = collector.digests(dict(zip(wanted, blobs, strict=True)))
            self._metrics.digests_accepted.inc(accepted)
        if not collector.views:
            return
        self._snapshot = Snapshot(names, collector.views, self._snapshot)
        self._target.offer(CostTable(self._snapshot, self._trust))

    def _reject(self, name: str, reason: str, message: str) -> None:
        self._metrics.digests_rejected.labels(reason).inc()
        if (name, reason) not in self._told:
            if len(self._told) > 10_000:
                self._told.clear()
            self._told.add((name, reason))
            self._log.warning("not believed", node=name, reason=reason, detail=message)
