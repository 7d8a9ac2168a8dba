import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hbm_e2e.daemon import Daemon
from hbm_e2e.errors import HarnessError
from hbm_e2e.waiting import TimedOut, wait_for

SLEEPER = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]


def test_another_holder_of_the_folder_stops_it(tmp_path: Path) -> None:
    Daemon("sleeper", SLEEPER, tmp_path).start()
    other = Daemon("sleeper", SLEEPER, tmp_path)
    pid = other.pid
    assert pid is not None
    other.start()
    assert other.pid == pid, "a second start finds it running"
    other.stop()
    assert not other.alive
    other.stop()


def test_a_recycled_pid_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(SLEEPER, stdout=subprocess.DEVNULL) as stranger:
        pid_file = tmp_path / "run" / "sleeper.pid"
        pid_file.parent.mkdir()
        pid_file.write_text(json.dumps({"pid": stranger.pid, "started": 1}))
        daemon = Daemon("sleeper", SLEEPER, tmp_path)
        assert not daemon.alive
        daemon.kill()
        assert stranger.poll() is None
        stranger.kill()


def test_stop_ends_what_ignores_it(tmp_path: Path) -> None:
    stubborn = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True)\n"
    daemon = Daemon(
        "stubborn", [sys.executable, "-c", stubborn + "while True: signal.pause()"], tmp_path
    )
    daemon.start()
    wait_for(lambda: "up" in daemon.log.read_text(), 20, "the process to be up")
    daemon.stop(grace_s=0.1)
    assert not daemon.alive


def test_the_child_of_a_forking_launcher_is_the_daemon(tmp_path: Path) -> None:
    launcher = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])"]
    daemon = Daemon("forked", SLEEPER, tmp_path)
    daemon.start(enter=launcher, forks=True)
    pid = daemon.pid
    assert pid is not None
    assert "signal.pause" in Path(f"/proc/{pid}/cmdline").read_text()
    assert "subprocess" not in Path(f"/proc/{pid}/cmdline").read_text()
    daemon.kill()
    assert not daemon.alive


def test_a_program_that_ends_at_once_is_named_with_its_last_words(tmp_path: Path) -> None:
    daemon = Daemon("broken", [sys.executable, "-c", "raise SystemExit('no such flag')"], tmp_path)
    with pytest.raises(HarnessError, match="broken ended at once: no such flag"):
        daemon.start(enter=[sys.executable, "-c", LAUNCH], forks=True)


LAUNCH = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"


def test_signals_need_a_running_program(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="nobody is not running"):
        Daemon("nobody", SLEEPER, tmp_path).send(signal.SIGTERM)


def test_waiting_says_what_for_and_why_in_vain() -> None:
    with pytest.raises(TimedOut, match=r"waited 0 s for rain: the sky is blue"):
        wait_for(lambda: None, 0, "rain", because=lambda: "the sky is blue")
