"""kill -9 of each process in turn, under load: what is left serves, no score is wrong, and after
the restart everything finds back together."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from hbm_demo.system import Node
from hbm_policy.reading import HOLDS
from hbm_pool.contracts.control_block import ServerView, SidecarView
from hbm_pool.contracts.records import TELEMETRY

from .conftest import Load, Running, wait_until

pytestmark = pytest.mark.timeout(420)


def state(node: Node) -> dict[str, Any]:
    """What the sidecar knows, over its socket in the run directory."""
    transport = httpx.HTTPTransport(uds=str(node.run_dir / "admin.sock"))
    with httpx.Client(transport=transport, timeout=5.0) as client:
        answer = client.get("http://sidecar/v1/state")
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found


def telemetry(node: Node) -> Any:
    """The newest telemetry record of a server."""
    record = np.zeros((), dtype=TELEMETRY)
    view = ServerView.open(node.run_dir)
    assert view.read_telemetry(record)
    return record


def newest_decision_ns(node: Node) -> int:
    """When the newest decision of a sidecar was taken."""
    decisions = SidecarView.open(node.run_dir).read_decisions(1)
    return int(decisions["monotonic_ns"][-1]) if len(decisions) else 0


def is_held(node: Node) -> bool:
    """The newest decision of a sidecar was to decide nothing."""
    decisions = SidecarView.open(node.run_dir).read_decisions(1)
    return bool(int(decisions["reasons"][-1]) & HOLDS)


def answered_by(load: Load, node: str) -> int:
    """Answers that came from a node."""
    return sum(name == node for name in load.records.texts["node"])


def assert_scores_right(load: Load) -> None:
    """No sampled answer differs from the cache-free reference."""
    found = load.check_scores()
    assert found.checked > 0
    assert found.mismatched == 0, found.first_mismatch


def assert_nothing_violated(running: Running) -> None:
    """The pools of all servers are whole."""
    for node in running.system.nodes:
        # A server that was started again has another admin port.
        port = json.loads((node.run_dir / "serve.json").read_text())["admin_port"]
        answer = httpx.get(f"http://127.0.0.1:{port}/v1/admin/integrity", timeout=30.0)
        assert answer.json()["violations"] == []


@pytest.mark.parametrize("child", ["decide", "twin", "admin"])
def test_a_process_of_the_sidecar_dies(running: Running, child: str) -> None:
    node = running.system.nodes[0]
    supervisor = psutil.Process(running.processes.find(f"{node.name}-sidecar").pid)

    def child_pid() -> int | None:
        for each in supervisor.children(recursive=True):
            if f"hbm_sidecar.{child}" in " ".join(each.cmdline()):
                return each.pid
        return None

    with Load(running.system.router_url) as load:
        wait_until(lambda: child_pid() is not None, f"{child} runs")
        victim = child_pid()
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        load.wait_answered(30)
        wait_until(lambda: child_pid() not in (None, victim), f"{child} runs again")
        before = newest_decision_ns(node)
        wait_until(lambda: newest_decision_ns(node) > before, "decisions go on")
    assert set(load.statuses()) == {200}
    assert_scores_right(load)


def test_the_sidecar_dies(running: Running) -> None:
    node = running.system.nodes[0]
    name = f"{node.name}-sidecar"
    with Load(running.system.router_url) as load:
        running.kill(name)
        wait_until(lambda: not bool(telemetry(node)["moving"]), "the last move ends")
        alpha = float(telemetry(node)["alpha"])
        load.wait_answered(60)
        assert float(telemetry(node)["alpha"]) == alpha, "without a sidecar α must stay"
        before = newest_decision_ns(node)
        running.restart(name)
        wait_until(lambda: newest_decision_ns(node) > before, "decisions go on")
        load.wait_answered(20)
    assert set(load.statuses()) == {200}
    assert_scores_right(load)
    assert_nothing_violated(running)


def test_a_model_server_dies(running: Running) -> None:
    node, other = running.system.nodes
    name = f"{node.name}-server"
    with Load(running.system.router_url) as load:
        boot_epoch = int(telemetry(node)["boot_epoch"])
        running.kill(name)
        load.wait_answered(60)
        wait_until(lambda: not state(node)["server"]["fresh"], "the sidecar calls it stale")
        assert is_held(node), "nothing may be decided for a dead server"
        served_by_other = answered_by(load, other.name)
        load.wait_answered(20)
        assert answered_by(load, other.name) > served_by_other
        running.restart(name)
        wait_until(
            lambda: int(telemetry(node)["boot_epoch"]) != boot_epoch, "the file is the new server's"
        )
        wait_until(
            lambda: bool(state(node)["server"]["fresh"]) and not is_held(node),
            "the sidecar decides for the new server",
        )
        served = answered_by(load, node.name)
        wait_until(lambda: answered_by(load, node.name) > served + 10, "the router sends again")
    # Only what was in flight on the dead server may have failed.
    failed = sum(count for status, count in load.statuses().items() if status != 200)
    assert failed <= 16, load.statuses()
    assert_scores_right(load)
    assert_nothing_violated(running)


def test_the_router_dies(running: Running) -> None:
    with Load(running.system.router_url) as load:
        running.kill("router")
        running.restart("router")
        load.wait_answered(60)
    assert not [status for status in load.statuses() if status >= 500]
    assert_scores_right(load)
    assert_nothing_violated(running)


def test_redis_dies(running: Running) -> None:
    node = running.system.nodes[0]
    with Load(running.system.router_url) as load:
        running.kill("redis")
        load.wait_answered(60)
        wait_until(lambda: not state(node)["redis"]["up"], "the sidecar notices")
        running.restart("redis")
        wait_until(lambda: bool(state(node)["redis"]["up"]), "the sidecar finds Redis again")
        load.wait_answered(30)
    assert set(load.statuses()) == {200}
    assert_scores_right(load)
