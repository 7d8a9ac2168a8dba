"""The commands in the pods are ones that the programs take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chart.conftest import Render
from tests.chart.rendered import VALUES

pytestmark = pytest.mark.helm


@pytest.fixture(scope="module", params=["operator controller", "operator webhook", "router"])
def command(request: pytest.FixtureRequest) -> tuple[list[str], set[str]]:
    """A command and its flags, as --help lists them."""
    words = str(request.param).split()
    done = subprocess.run(
        [sys.executable, "-m", "hbm_cli.main", *words, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200", "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    return words, set(re.findall(r"--[a-z0-9-]+", done.stdout))


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.name)
def test_every_argument_is_a_flag(
    render: Render, command: tuple[list[str], set[str]], values: Path
) -> None:
    words, flags = command
    rendered = render(values)
    for deployment in rendered.of_kind("Deployment"):
        arguments = rendered.arguments(deployment["metadata"]["name"])
        if arguments[: len(words)] == words:
            given = {argument.split("=", 1)[0] for argument in arguments[len(words) :]}
            assert given <= flags, f"unknown to hbm {' '.join(words)}: {sorted(given - flags)}"
