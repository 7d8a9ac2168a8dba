"""`hbm`: every wrong command line is one line on stderr and exit 2."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import yaml
from hbm_cli.main import main


@pytest.fixture
def hbm(monkeypatch, capfd):
    def hbm(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hbm", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return hbm


COMMANDS = (
    "bench",
    "demo",
    "explain",
    "plan",
    "router",
    "serve",
    "sidecar",
    "sweep",
    "trace",
)


@pytest.mark.parametrize("command", [*COMMANDS, "bench decide", "bench all"])
def test_an_unknown_flag(hbm, command) -> None:
    code, out, err = hbm(*command.split(), "--no-such-flag")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith(f"hbm {command}: ")
    assert "--no-such-flag" in err
    assert f"hbm {command} --help" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no-such-command",), "no-such-command"),
        (("--no-such-flag",), "--no-such-flag"),
        (("bench", "no-such-benchmark"), "no-such-benchmark"),
        (("bench", "decide", "--seed", "many"), "--seed"),
        (("demo", "--nodes", "many"), "--nodes"),
        (("explain", "--last", "0"), "--last"),
        (("plan", "--alpha", "much"), "--alpha"),
        (("router", "--port", "many"), "--port"),
        (("serve", "--port", "70000"), "--port"),
        (("serve", "--device"), "hbm serve: Option '--device' requires an argument"),
        (("sidecar", "--alpha-min", "many"), "--alpha-min"),
        (("sidecar", "one", "two"), "one two"),
        (("sweep", "--nodes", "0"), "--nodes"),
    ],
)
def test_a_wrong_argument_is_named(hbm, arguments, said) -> None:
    code, out, err = hbm(*arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert said in err


@pytest.mark.parametrize("arguments", [(), ("bench",)])
def test_no_command_is_answered_with_help(hbm, arguments) -> None:
    code, out, err = hbm(*arguments)
    assert code == 2
    assert "Usage: hbm" in out + err
    assert "Commands:" in out + err


def test_what_is_no_error_exits_0(hbm) -> None:
    assert hbm("--version")[0] == 0
    code, out, _ = hbm("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)
    assert hbm("plan", "--preset", "small")[0] == 0


def test_a_commands_own_exit_code_is_kept(hbm) -> None:
    code, _, err = hbm("plan")
    assert code == 2
    assert err.startswith("hbm plan: give either")


def test_ctrl_c_in_a_command_ends_it_with_130_and_no_traceback() -> None:
    """The signal comes once the command has been loaded and works."""
    code = """
        import os, signal, sys, threading, time
        from hbm_cli.main import main
        signal.signal(signal.SIGINT, signal.default_int_handler)
        def interrupt():
            while "hbm_sim.sweep" not in sys.modules:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt, daemon=True).start()
        sys.argv = ["hbm", "sweep", "--scenario", "demo", "--nodes", "2"]
        main()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_package_chart_and_images_are_of_one_version(hbm) -> None:
    """An operator tells sidecars of another version by it."""
    root = Path(__file__).parents[2]
    wanted = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((root / "charts/hbm-partition/Chart.yaml").read_text())
    assert hbm("--version")[1] == f"hbm {wanted}\n", "install it again: make install"
    assert (chart["version"], chart["appVersion"]) == (wanted, wanted)
    assert f"ARG VERSION={wanted}\n" in (root / "images/Dockerfile").read_text()
