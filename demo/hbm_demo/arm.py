"""One arm: a fresh system, all requests once, and everything that was seen meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import httpx
import numpy as np
import numpy.typing as npt
import orjson
from hbm_load.records import Records
from hbm_load.trace import Trace
from hbm_serving.config import Config

from hbm_demo.errors import DemoError, ProcessFailed
from hbm_demo.interrupt import Cleanups
from hbm_demo.machine import MachineReport, MachineWatch
from hbm_demo.observe import NodeDescription, NodeObserver, NodeSample
from hbm_demo.processes import Process, Processes, read_lines
from hbm_demo.settings import DemoSettings
from hbm_demo.system import Arm, System, start_system

_LOOK_S: Final = 0.2
_TIMEOUT_S: Final = 10.0


class View(Protocol):
    """What shows the demo while it runs."""

    def say(self, text: str) -> None:
        """One line about what is going on."""
        ...

    def update(
        self, arm: Arm, progress: dict[str, Any] | None, samples: Sequence[NodeSample]
    ) -> None:
        """The newest state: `hbm_load.progress.Progress` as a mapping, one sample per node."""
        ...


class ArmResult(NamedTuple):
    """What an arm leaves. Times of samples and decisions are s since the start of the load."""

    arm: Arm
    nodes: tuple[str, ...]
    records: Records
    samples: list[NodeSample]
    decisions: dict[str, npt.NDArray[Any]]  # node -> [n] DECISION
    decision_time_s: dict[str, npt.NDArray[np.float64]]
    described: dict[str, NodeDescription]
    machine: MachineReport
    integrity_violations: list[str]


def run_arm(
    settings: DemoSettings,
    arm: Arm,
    trace: Trace,
    *,
    directory: Path,
    out: Path,
    model: Config,
    view: View,
    cleanups: Cleanups,
) -> ArmResult:
    """Starts a system below `directory`, sends the trace, stops everything; logs go to `out`.

    Raises `ProcessFailed` when a part ends early.
    """
    directory.mkdir()
    path = out / f"requests-{arm.name}.parquet"
    path.unlink(missing_ok=True)
    processes = Processes(out / "logs" / arm.name)
    with cleanups.undone_by(processes.stop):
        view.say(
            f"{arm.title}: starting {settings.nodes} servers, their sidecars and the router "
            "(a machine's first demo compiles kernels: a minute or more)"
        )
        refill = model.pool.refill_bytes_per_s
        system = start_system(processes, settings, arm, directory, refill)
        view.say(f"{arm.title}: {len(trace)} requests in {settings.arm_seconds:.0f} s")
        observers = [NodeObserver(node) for node in system.nodes]
        watch = MachineWatch(processes.pids(), time.monotonic())
        load = _start_load(processes, settings, system, path, model)
        samples = _watch(arm, processes, load, observers, view)
        machine = watch.report(time.monotonic())
        violations = [line for node in system.nodes for line in _integrity(node.admin_url)]
    records = Records.read(path)
    if records.meta["trace"] != trace.fingerprint():
        raise DemoError(f"{path} holds other requests than this demo's; was it overwritten?")
    start_s = records.meta["start_monotonic_ns"] / 1e9
    described = {
        each.node.name: found for each in observers if (found := each.described()) is not None
    }
    decisions = {each.node.name: each.all_decisions() for each in observers}
    return ArmResult(
        arm=arm,
        nodes=tuple(node.name for node in system.nodes),
        records=records,
        samples=[sample._replace(time_s=sample.time_s - start_s) for sample in samples],
        decisions=decisions,
        decision_time_s={
            node: each["monotonic_ns"] / 1e9 - start_s for node, each in decisions.items()
        },
        described=described,
        machine=machine,
        integrity_violations=violations,
    )


def _start_load(
    processes: Processes,
    settings: DemoSettings,
    system: System,
    records: Path,
    model: Config,
) -> Process:
    """The load generator is a process of its own: drawing this view must not delay a request."""
    command = [sys.executable, "-m", "hbm_load", "--url", system.router_url]
    command += ["--records", str(records), "--seconds", str(settings.arm_seconds)]
    command += ["--seed", str(settings.seed), "--slo-ms", str(model.server.slo_ms)]
    command += ["--timeout-s", str(_TIMEOUT_S), "--progress-s", "0.5"]
    if settings.trace is None:
        command += ["--scenario", settings.scenario]
    else:
        command += ["--trace", str(settings.trace), "--columns", settings.columns]
        command += ["--rate", str(settings.rate), "--catalogue", str(model.model.items)]
    process = processes.start("load", command, stdout=subprocess.PIPE)
    assert process.popen.stdout is not None
    os.set_blocking(process.popen.stdout.fileno(), False)
    return process


def _watch(
    arm: Arm,
    processes: Processes,
    load: Process,
    observers: list[NodeObserver],
    view: View,
) -> list[NodeSample]:
    """Looks at everything until the load generator has ended."""
    assert load.popen.stdout is not None
    samples: list[NodeSample] = []
    newest: dict[str, NodeSample] = {}
    progress: dict[str, Any] | None = None
    rest = bytearray()
    due_s = time.monotonic()
    while True:
        ended = load.popen.poll() is not None
        for line in read_lines(load.popen.stdout, rest):
            progress = orjson.loads(line)
        now_s = time.monotonic()
        for observer in observers:
            sample = observer.sample(now_s)
            if sample is not None:
                samples.append(sample)
                newest[sample.node] = sample
        view.update(arm, progress, list(newest.values()))
        if ended:
            break
        processes.check_others(load)
        due_s += _LOOK_S
        time.sleep(max(0.0, due_s - time.monotonic()))
    if load.popen.returncode != 0:
        raise ProcessFailed(f"load generator failed: {load.last_words()}")
    processes.forget(load)
    return samples


def _integrity(admin_url: str) -> list[str]:
    try:
        answer = httpx.get(f"{admin_url}/v1/admin/integrity", timeout=30.0)
        answer.raise_for_status()
        violations: list[str] = answer.json()["violations"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        return [f"{admin_url} could not be asked for its integrity: {error!r}"]
    return violations
