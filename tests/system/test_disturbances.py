"""What an operator or a neighbour may do to a running system: garbage in Redis, frozen processes,
a deleted run directory. What is left serves, no score is wrong, and everything finds back together.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis
from hbm_pool.contracts import digest as contract

from .conftest import Load, Running, wait_until
from .test_kill import (
    answered_by,
    assert_nothing_violated,
    assert_scores_right,
    newest_decision_ns,
    state,
    telemetry,
)

pytestmark = pytest.mark.timeout(420)
NAMESPACE = "demo"
FROZEN_S = 10.0


@contextmanager
def frozen(running: Running, name: str) -> Iterator[None]:
    """The process and its children stand still for `FROZEN_S` at least."""
    group = running.processes.find(name).pid
    os.killpg(group, signal.SIGSTOP)
    try:
        yield
        threading.Event().wait(FROZEN_S)  # how long it is frozen is what is tested
    finally:
        os.killpg(group, signal.SIGCONT)


def test_garbage_in_redis(running: Running) -> None:
    node, other = running.system.nodes
    url = f"unix://{node.run_dir.parent / 'redis.sock'}"
    with redis.Redis.from_url(url) as client, Load(running.system.router_url) as load:
        keys = (
            contract.nodes_key(NAMESPACE),
            contract.node_key(NAMESPACE, node.name),
            contract.digest_key_name(NAMESPACE, node.name),
        )
        for key in keys:
            client.delete(key)
            client.rpush(key, b"\xff" * 4096)  # no type that anybody expects there
        client.set(contract.digest_key_name(NAMESPACE, other.name), os.urandom(65_536))
        client.zadd(f"hbm:{NAMESPACE}:other", {"x": 1.0})
        for number in range(2000):
            client.set(f"hbm:{NAMESPACE}:garbage:{number}", os.urandom(64))
        load.wait_answered(60)
        client.delete(*keys)
        wait_until(
            lambda: len(client.zrange(contract.nodes_key(NAMESPACE), 0, -1)) == 2,
            "both nodes are published again",
        )
        load.wait_answered(30)
    assert set(load.statuses()) == {200}
    assert_scores_right(load)


def test_a_frozen_sidecar(running: Running) -> None:
    node = running.system.nodes[0]
    with Load(running.system.router_url) as load:
        with frozen(running, f"{node.name}-sidecar"):
            load.wait_answered(60)
        before = newest_decision_ns(node)
        wait_until(lambda: newest_decision_ns(node) > before, "decisions go on")
        load.wait_answered(20)
    assert set(load.statuses()) == {200}
    assert_scores_right(load)
    assert_nothing_violated(running)


def test_a_frozen_model_server(running: Running) -> None:
    node, other = running.system.nodes
    with Load(running.system.router_url) as load:
        with frozen(running, f"{node.name}-server"):
            served = answered_by(load, other.name)
            wait_until(
                lambda: answered_by(load, other.name) > served + 60, "the other node serves all"
            )
        served = answered_by(load, node.name)
        wait_until(lambda: answered_by(load, node.name) > served + 10, "the router sends again")
        wait_until(lambda: bool(state(node)["server"]["fresh"]), "the sidecar decides again")
    # What was waiting on the frozen node is late: answered, refused or given up, never wrong.
    assert set(load.statuses()) <= {0, 200, 503, 504}
    assert_scores_right(load)
    assert_nothing_violated(running)


def test_a_deleted_run_directory(running: Running) -> None:
    """The server goes on without anybody to steer it; a restart of both brings them together."""
    node = running.system.nodes[0]
    with Load(running.system.router_url) as load:
        shutil.rmtree(node.run_dir)
        load.wait_answered(60)
        served = answered_by(load, node.name)
        wait_until(lambda: answered_by(load, node.name) > served + 10, "it still serves")
        node.run_dir.mkdir()
        for part in ("server", "sidecar"):
            running.kill(f"{node.name}-{part}")
            running.restart(f"{node.name}-{part}")
        wait_until(lambda: newest_decision_ns(node) > 0, "decisions are taken")
        before = int(telemetry(node)["requests"])
        wait_until(lambda: int(telemetry(node)["requests"]) > before, "the new server serves")
    # While one node starts again the other may be too slow for all: late or refused, never wrong.
    assert set(load.statuses()) <= {0, 200, 502, 503, 504}
    assert_scores_right(load)
    assert_nothing_violated(running)
