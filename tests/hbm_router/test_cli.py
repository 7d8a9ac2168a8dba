"""`hbm router` as a command: its flags, its refusals, its ready file."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from hbm_router.config import Policy, RouterSettings

from tests.hbm_router.waiting import free_port

COMMAND = (sys.executable, "-c", "from hbm_cli.main import main; main()", "router")
GOOD = ("--backends", "a=http://127.0.0.1:1")


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *flags],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ["--backends", "no backend is given"]),
        (("--backends", ""), ["--backends", "no backend is given"]),
        (("--backends", "a"), ["'a' has no address", "NAME=http://HOST:PORT"]),
        (("--backends", "a=ftp://h:1"), ["'ftp://h:1'", "http://HOST:PORT"]),
        (("--backends", "a=http://h:"), ["'http://h:'", "http://HOST:PORT"]),
        (("--backends", "a=http://h:99999"), ["'http://h:99999' is not an address"]),
        (("--backends", "a=http://h:1/path"), ["'http://h:1/path' carries more"]),
        (("--backends", "a b=http://h:1"), ["backend name 'a b' is no name"]),
        (("--backends", "a=http://h:1,a=http://h:2"), ["'a' is given twice"]),
        ((*GOOD, "--redis-url", "localhost:6379"), ["--redis-url", "redis://HOST:PORT"]),
        ((*GOOD, "--redis-url", "redis://h:bad"), ["--redis-url", "'redis://h:bad'", "'bad'"]),
        ((*GOOD, "--ready-file", "/"), ["--ready-file", "'/' is a directory"]),
        ((*GOOD, "--ready-file", "/no/such/f"), ["--ready-file", "'/no/such' is not a directory"]),
        ((*GOOD, "--bound", "1"), ["--bound", "greater than 1", "1"]),
        ((*GOOD, "--retry-ratio", "2"), ["--retry-ratio", "less than or equal to 1"]),
        ((*GOOD, "--port", "70000"), ["--port", "65535", "70000"]),
        ((*GOOD, "--fresh-s", "60"), ["expire_s is 30", "fresh_s is 60"]),
        ((*GOOD, "--ejection-s", "100"), ["max_ejection_s is 60", "ejection_s is 100"]),
        ((*GOOD, "--probe-path", "health"), ["--probe-path", "'health'"]),
        ((*GOOD, "--log-level", "loud"), ["--log-level", "'loud'", "debug, info"]),
        ((*GOOD, "--host", "no.such.host.invalid", "--port", "9"), ["--port no.such.host.invalid"]),
    ],
)
def test_wrong_configuration_exits_2_with_one_line(flags: tuple[str, ...], words: list[str]):
    result = run(*flags)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stderr.startswith("hbm router: ")
    for word in words:
        assert word in result.stderr


def test_a_refused_redis_url_keeps_its_password() -> None:
    result = run(*GOOD, "--redis-url", "redis://user:s3cret@h:bad")
    assert result.returncode == 2
    assert "redis://…@h:bad" in result.stderr
    assert "s3cret" not in result.stderr


def test_unknown_flags_and_policies_exit_2() -> None:
    assert run(*GOOD, "--no-such-flag").returncode == 2
    result = run(*GOOD, "--policy", "best")
    assert result.returncode == 2
    assert "round_robin" in result.stderr


def test_a_taken_port_exits_2_and_names_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flag in ("--port", "--admin-port"):
            result = run(*GOOD, flag, str(port))
            assert result.returncode == 2
            assert f"{flag} 127.0.0.1:{port}" in result.stderr
            assert "in use" in result.stderr


def test_environment_variables_and_flags(router_process, monkeypatch) -> None:
    monkeypatch.setenv("HBM_BACKENDS", "from-env=http://127.0.0.1:1")
    monkeypatch.setenv("HBM_POLICY", "p2c")
    monkeypatch.setenv("HBM_SOMETHING_OF_ANOTHER_COMMAND", "1")
    port = free_port()
    router = router_process("--port", "0", "--admin-port", str(port), "--policy", "chwbl")
    assert router.admin_port == port

    def ask(path: str) -> dict[str, object]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            told: dict[str, object] = json.load(answer)
            return told

    nodes = ask("/v1/nodes")["nodes"]
    assert [node["name"] for node in nodes] == ["from-env"]  # type: ignore[attr-defined]
    assert ask("/debug/route")["policy"] == "chwbl"


def test_help_names_every_setting() -> None:
    text = run("--help").stdout
    squeezed = "".join(text.split())
    for name, field in RouterSettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in squeezed, name
        assert field.description, name
    assert all(policy.value in squeezed for policy in Policy)


def test_importing_the_command_does_not_load_the_server() -> None:
    code = (
        "import sys, hbm_router.cli; "
        "print([m for m in ('fastapi','redis','uvicorn','numpy','torch') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_documents_name_every_setting_metric_and_word() -> None:
    from hbm_router.metrics import NODE_GAUGES, RouterMetrics

    documents = Path(__file__).parents[2] / "docs"
    metrics = (documents / "metrics-router.md").read_text()
    for family in RouterMetrics().registry.collect():
        suffix = "_total" if family.type == "counter" else ""
        assert f"`{family.name}{suffix}`" in metrics, family.name
    for name in NODE_GAUGES:
        assert f"`hbm_router_{name}`" in metrics, name
    guide = (documents / "router.md").read_text()
    for policy in Policy:
        assert f"`{policy.value}`" in guide
    for name in RouterSettings.model_fields:
        assert f"`--{name.replace('_', '-')}`" in guide, name
