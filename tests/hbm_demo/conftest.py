from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hbm_demo.arm import ArmResult
from hbm_demo.machine import MachineReport, Scheduling
from hbm_demo.observe import COUNTERS, NodeSample
from hbm_demo.optimum import NodeOptimum, RegimeOptimum
from hbm_demo.system import ADAPTIVE, FIXED, Arm
from hbm_load.generate import generate
from hbm_load.records import Outcome, Records
from hbm_load.scenario import load_scenario
from hbm_load.trace import Trace
from hbm_policy import Reason
from hbm_pool.contracts.records import DECISION

NODES = ("node-0", "node-1")


@pytest.fixture
def until() -> Callable[..., None]:
    """`until(condition, what, seconds)` waits for a condition; fails naming `what`."""

    def wait(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
            time.sleep(0.05)

    return wait


@pytest.fixture
def marked() -> Iterator[tuple[dict[str, str], Callable[[], list[int]]]]:
    """An environment with a mark, and a function that lists living processes bearing it."""
    mark = f"TEST_MARK={uuid.uuid4().hex}"
    name, value = mark.split("=")

    def living() -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                alive = b") Z " not in (entry / "stat").read_bytes()
                if alive and mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    yield {**os.environ, name: value}, living
    assert living() == [], "the test left processes behind"


@pytest.fixture(scope="session")
def trace() -> Trace:
    return generate(load_scenario("demo"), 1)


def finished_records(trace: Trace, latency_ms: float, alpha: float) -> Records:
    """Records as a run leaves them: alternating nodes, one error and one drop."""
    records = Records.empty(trace, "test", {"start_monotonic_ns": 0, "trace": ""})
    random = np.random.default_rng(0)
    count = len(records)
    records.sent_s = records.intended_s + 0.0005
    records.done_s = records.intended_s + random.gamma(4.0, latency_ms / 4e3, count)
    records.status[:] = 200
    records.outcome = [Outcome.OK] * count
    records.outcome[5], records.status[5] = Outcome.STATUS, 503
    records.outcome[6], records.status[6] = Outcome.DROPPED, 0
    records.done_s[6] = np.nan
    records.texts["node"] = [NODES[index % 2] for index in range(count)]
    records.numbers["alpha"][:] = alpha
    records.numbers["kv_reused_tokens"][:] = np.where(np.arange(count) % 4 == 0, 64, 0)
    records.numbers["rows_looked_up"][:] = 100
    records.numbers["rows_missed"][:] = 25
    records.numbers["service_ms"][:] = latency_ms / 2
    records.scores = {10: [0.5, 1.0]}
    return records


def decide_move(decisions: np.ndarray, place: int, alpha: float, goal: float) -> None:
    """A move that starts at `place`, its ramp of three steps, and the rest after it."""
    steps = np.linspace(alpha, goal, 4)
    decisions["reasons"][place : place + 3] = int(Reason.RAMPING)
    decisions["reasons"][place] |= np.uint64(int(Reason.MOVE_STARTED))
    decisions["alpha"][place : place + 3], decisions["target"][place : place + 3] = (
        steps[:-1],
        steps[1:],
    )
    decisions["alpha"][place + 3 :] = decisions["target"][place + 3 :] = goal


def arm_result(trace: Trace, arm: Arm, latency_ms: float) -> ArmResult:
    """α wanders 0.5 -> 0.8 -> 0.2 in the adaptive arm and stays at 0.5 in the fixed one."""
    records = finished_records(trace, latency_ms, 0.5)
    duration = float(records.intended_s[-1])
    samples = []
    for number, time_s in enumerate(np.arange(0.0, duration, 0.25)):
        share = time_s / duration
        moving = arm.name == "adaptive"
        alpha = (0.8 if share > 0.1 else 0.5) if share < 0.4 else 0.2
        for node in NODES:
            counters = dict.fromkeys(COUNTERS, float(number))
            counters |= {"gather_ms": 4.0 * number, "compute_ms": 2.0 * number}
            counters |= {"service_ms": 5.0 * number, "refill_bytes": 1000.0 * number}
            counters["moves"] = 2.0 if moving and share > 0.4 else 0.0
            samples.append(
                NodeSample(
                    time_s=float(time_s),
                    node=node,
                    alpha=alpha if moving else 0.5,
                    alpha_target=alpha if moving else 0.5,
                    anchor=alpha if time_s > 1 else float("nan"),
                    queue_depth=1.0,
                    link_busy=0.2,
                    kv_users=10.0,
                    counters=counters,
                )
            )
    decisions = {node: np.zeros(600, dtype=DECISION) for node in NODES}
    for each in decisions.values():
        each["latency_us"] = np.arange(600)
        each["generation"], each["alpha"], each["target"] = 7, 0.5, 0.5
        if arm.name == "adaptive":
            decide_move(each, 60, 0.5, 0.8)
            decide_move(each, 240, 0.8, 0.2)
    machine = MachineReport(2, duration, 0.5, 0.01, 0.2, {"router": Scheduling(1.0, 0.1)})
    times = {node: np.arange(600.0) for node in NODES}
    return ArmResult(arm, NODES, records, samples, decisions, times, {}, machine, [])


@pytest.fixture(scope="session")
def arms(trace: Trace) -> list[ArmResult]:
    return [arm_result(trace, ADAPTIVE, 8.0), arm_result(trace, FIXED, 12.0)]


@pytest.fixture
def optima() -> dict[str, RegimeOptimum]:
    stars = {"steady": 0.8, "trend": 0.25, "burst": 0.2}
    return {
        label: RegimeOptimum(
            {
                node: NodeOptimum(star, (star - 0.05, star + 0.05), (0.1, 0.9), (2.0, 3.0))
                for node in NODES
            }
        )
        for label, star in stars.items()
    }
