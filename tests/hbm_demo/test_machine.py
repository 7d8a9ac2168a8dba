from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from hbm_demo.machine import MachineWatch, describe, family, read_cpu_times, read_scheduling


def test_stolen_time_is_read_where_proc_has_it(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 400 50 6 7 80 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    ticks = os.sysconf("SC_CLK_TCK")
    times = read_cpu_times(stat)
    assert times.busy_s == pytest.approx((100 + 20 + 30 + 6 + 7 + 80) / ticks)
    assert times.idle_s == pytest.approx(450 / ticks)
    assert times.steal_s == pytest.approx(80 / ticks)


def test_work_of_a_family_is_counted() -> None:
    worker = subprocess.Popen(["sh", "-c", "sleep 60 & wait"])
    try:
        deadline = time.monotonic() + 30
        while len(family(worker.pid)) < 2:
            assert time.monotonic() < deadline
        watch = MachineWatch({"me": os.getpid(), "idle": worker.pid}, 0.0)
        before = read_scheduling([os.getpid()]).cpu_s
        while read_scheduling([os.getpid()]).cpu_s < before + 0.2:
            sum(range(10_000))
        report = watch.report(1.0)
        assert report.processes["me"].cpu_s >= 0.2
        assert report.processes["idle"].cpu_s < 0.2
        assert 0.0 < report.busy_share <= 1.0
        assert 0.0 <= report.run_queue_share < 1.0
    finally:
        for pid in reversed(family(worker.pid)):
            os.kill(pid, 9)
        worker.wait()


def test_an_ended_process_costs_nothing() -> None:
    done = subprocess.Popen(["true"])
    done.wait()
    assert read_scheduling([done.pid]) == (0.0, 0.0)
    assert describe()["cores"] == os.cpu_count()
