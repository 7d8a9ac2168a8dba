"""`hbm`: every wrong command line is one line on stderr and exit 2."""

from __future__ import annotations

import sys

import pytest
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


COMMANDS = ("bench", "demo", "explain", "plan", "router", "serve", "sidecar", "sweep")


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
