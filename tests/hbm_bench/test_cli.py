"""Every benchmark runs and says what it ran on; their figures are judged in docs/results.md."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hbm_bench.cli import MODULES


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hbm_cli.main", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [each for inner in value.values() for each in numbers(inner)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.parametrize("name", MODULES)
def test_a_quick_run_prints_figures(name: str) -> None:
    done = bench(name, "--quick", "--json", "--seed", "3")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["benchmark"] == name
    assert result["seed"] == 3
    assert result["machine"]["cores"] >= 1
    figures = numbers(result["figures"])
    assert len(figures) > 3
    assert all(figure == figure for figure in figures), "no figure may be NaN"


def test_an_unknown_benchmark_is_refused() -> None:
    assert bench("fastest").returncode == 2
