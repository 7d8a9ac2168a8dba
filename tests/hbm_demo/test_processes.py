from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hbm_demo.errors import ProcessFailed
from hbm_demo.interrupt import Cleanups, run_stoppable
from hbm_demo.processes import Processes
from hbm_demo.redis_server import redis_executable, start_redis, wait_redis

PYTHON = sys.executable


def script(text: str) -> list[str]:
    return [PYTHON, "-c", textwrap.dedent(text)]


def test_a_ready_file_is_waited_for(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    code = f"""
        import os, time
        open({str(ready)!r} + ".part", "w").write('{{"port": 7}}')
        os.rename({str(ready)!r} + ".part", {str(ready)!r})
        time.sleep(60)
    """
    with Processes(tmp_path / "logs") as processes:
        process = processes.start("server", script(code), ready_file=ready)
        assert process.wait_ready(30.0) == {"port": 7}
        pid = process.pid
    assert not Path(f"/proc/{pid}").exists()


def test_a_process_that_fails_to_start_is_quoted(tmp_path: Path) -> None:
    code = "import sys; print('wrong flag: --alpha 7', file=sys.stderr); sys.exit(2)"
    with Processes(tmp_path) as processes:
        process = processes.start("server", script(code), ready_file=tmp_path / "never")
        with pytest.raises(ProcessFailed, match="server ended with exit code 2: wrong flag: --al"):
            process.wait_ready(30.0)


def test_a_process_that_never_becomes_ready_is_named(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        process = processes.start(
            "slow", script("import time; time.sleep(60)"), ready_file=tmp_path / "never"
        )
        with pytest.raises(ProcessFailed, match="slow was not ready after 0 s"):
            process.wait_ready(0.2)


def test_a_process_that_dies_under_load_is_noticed(tmp_path: Path, until) -> None:
    with Processes(tmp_path) as processes:
        doomed = processes.start("server", script("import time; time.sleep(60)"))
        load = processes.start("load", script("import time; time.sleep(60)"))
        processes.check_others(load)
        os.kill(doomed.pid, signal.SIGKILL)
        until(lambda: doomed.popen.poll() is not None, "the server is gone")
        with pytest.raises(ProcessFailed, match="server ended by SIGKILL"):
            processes.check_others(load)


def test_what_ignores_sigterm_is_killed_with_its_children(tmp_path: Path, marked, until) -> None:
    environment, living = marked
    code = """
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print("ready", flush=True)
        time.sleep(60)
    """
    with Processes(tmp_path, stop_timeout_s=0.5) as processes:
        process = processes.start("stubborn", script(code), environment=environment)
        until(lambda: b"ready" in process.log.read_bytes(), "it ignores SIGTERM")
        until(lambda: len(living()) == 2, "it has a child")
    until(lambda: living() == [], "both are gone")


def stoppable(folder: Path, work: str) -> list[str]:
    """A parent that runs `work` as the demo runs: stoppable, with `start(name)` for a process."""
    return script(
        f"""
        import os, sys, time
        from pathlib import Path
        from hbm_demo.interrupt import Cleanups, Stopped, run_stoppable
        from hbm_demo.processes import Processes
        cleanups = Cleanups()
        def work():
            print("ready", flush=True)
            while True:
                processes = Processes(Path({str(folder)!r}))
                with cleanups.undone_by(processes.stop):
                    for index in range(3):
                        processes.start(f"p{{index}}", ["sleep", "60"])
                    {work}
        try:
            run_stoppable(work, cleanups)
        except Stopped as stopped:
            os._exit(stopped.status)
        """
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_killed_parent_takes_its_processes_along(
    tmp_path: Path, marked, until, number: signal.Signals
) -> None:
    environment, living = marked
    parent = subprocess.Popen(
        stoppable(tmp_path, "time.sleep(60)"), env=environment, stdout=subprocess.DEVNULL
    )
    until(lambda: len(living()) == 4, "all are started")
    parent.send_signal(number)
    assert parent.wait(30) == (-9 if number == signal.SIGKILL else 128 + number)
    until(lambda: living() == [], "all are gone")


def test_interrupts_at_any_moment_of_start_and_stop_leave_nothing(
    tmp_path: Path, marked, until
) -> None:
    """A parent that starts and stops in a loop is interrupted at moments spread over the loop,
    several times each, as by a user who is in a hurry."""
    environment, living = marked
    for attempt in range(20):
        parent = subprocess.Popen(
            stoppable(tmp_path, "pass"), env=environment, stdout=subprocess.PIPE
        )
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        if attempt % 2:
            until(lambda: len(living()) > 1, "it starts processes")
        for _ in range(attempt * 40):
            os.getppid()
        for _ in range(3):
            parent.send_signal(signal.SIGINT)
        assert parent.wait(30) == 130
        parent.stdout.close()
        until(lambda: living() == [], f"nothing is left of attempt {attempt}")


def test_work_ends_as_it_would_without_a_thread() -> None:
    cleanups, undone = Cleanups(), []

    def work() -> int:
        with cleanups.undone_by(lambda: undone.append("a")):
            return 7

    assert run_stoppable(work, cleanups) == 7
    assert undone == ["a"]
    with pytest.raises(ZeroDivisionError):
        run_stoppable(lambda: 1 / 0, Cleanups())


def test_no_process_starts_after_the_stop(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    processes.stop()
    with pytest.raises(ProcessFailed, match="late is not started"):
        processes.start("late", ["sleep", "60"])


def test_two_redis_servers_live_side_by_side(tmp_path: Path) -> None:
    import redis

    urls = []
    with Processes(tmp_path / "logs") as processes:
        for name in ("a", "b"):
            folder = tmp_path / name
            folder.mkdir()
            process, url = start_redis(processes, folder)
            wait_redis(process, url)
            urls.append(url)
        clients = [redis.Redis.from_url(url) for url in urls]
        clients[0].set("key", "first")
        assert clients[1].get("key") is None
        assert clients[0].config_get("save")["save"] == ""
        for client in clients:
            client.close()


def test_the_wheel_has_a_redis_where_the_system_has_none(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    version = subprocess.run([redis_executable(), "--version"], capture_output=True, text=True)
    assert version.stdout.startswith("Redis server")
