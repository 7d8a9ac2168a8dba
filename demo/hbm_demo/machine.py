"""What the machine did meanwhile, from /proc: stolen time, business, and waiting for a core."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


class CpuTimes(NamedTuple):
    """Cumulative times of all cores together, s."""

    busy_s: float
    idle_s: float
    steal_s: float


class Scheduling(NamedTuple):
    """Of one process with all its threads and descendants, cumulative, s."""

    cpu_s: float
    run_queue_s: float  # runnable, but waiting for a core


class MachineReport(NamedTuple):
    """Of one arm, while it was under load."""

    cores: int
    seconds: float
    busy_share: float  # of all cores; stolen time counts as busy
    steal_share: float
    run_queue_share: float  # waiting for a core / (running + waiting), all our processes
    processes: dict[str, Scheduling]


def read_cpu_times(stat: Path = _PROC / "stat") -> CpuTimes:
    """The first line of /proc/stat (proc(5)): user nice system idle iowait irq softirq steal."""
    fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, idle, iowait, irq, softirq, steal = fields
    ticks = os.sysconf("SC_CLK_TCK")
    return CpuTimes(
        (user + nice + system + irq + softirq + steal) / ticks,
        (idle + iowait) / ticks,
        steal / ticks,
    )


def read_scheduling(pids: Iterable[int]) -> Scheduling:
    """Sum over the threads of `pids` (/proc/PID/task/TID/schedstat: ns running, ns waiting)."""
    running = waiting = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in (_PROC / str(pid) / "task").iterdir():
                with contextlib.suppress(OSError, ValueError, IndexError):
                    ran, waited, *_ = (task / "schedstat").read_text().split()
                    running += int(ran)
                    waiting += int(waited)
    return Scheduling(running / 1e9, waiting / 1e9)


def family(pid: int) -> list[int]:
    """`pid` and all its living descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in (_PROC / str(parent) / "task").iterdir():
                with contextlib.suppress(OSError):
                    found += [int(child) for child in (task / "children").read_text().split()]
    return found


class MachineWatch:
    """Differences over the time under load. Long-lived threads only: an ended one takes its
    counters with it."""

    def __init__(self, pids: dict[str, int], now_s: float) -> None:
        self._families = {name: family(pid) for name, pid in pids.items()}
        self._start_s = now_s
        self._cpu = read_cpu_times()
        self._before = {name: read_scheduling(pids) for name, pids in self._families.items()}

    def report(self, now_s: float) -> MachineReport:
        """What happened since the start."""
        cpu = read_cpu_times()
        busy, idle = cpu.busy_s - self._cpu.busy_s, cpu.idle_s - self._cpu.idle_s
        total = max(busy + idle, 1e-9)
        processes = {}
        for name, pids in self._families.items():
            after, before = read_scheduling(pids), self._before[name]
            processes[name] = Scheduling(
                max(0.0, after.cpu_s - before.cpu_s),
                max(0.0, after.run_queue_s - before.run_queue_s),
            )
        ran = sum(each.cpu_s for each in processes.values())
        waited = sum(each.run_queue_s for each in processes.values())
        return MachineReport(
            cores=os.cpu_count() or 1,
            seconds=now_s - self._start_s,
            busy_share=busy / total,
            steal_share=(cpu.steal_s - self._cpu.steal_s) / total,
            run_queue_share=waited / max(ran + waited, 1e-9),
            processes=processes,
        )


def describe() -> dict[str, str | int]:
    """The machine in words."""
    model = ""
    with contextlib.suppress(OSError):
        for line in (_PROC / "cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "kernel": platform.release(),
        "system": platform.system(),
    }
