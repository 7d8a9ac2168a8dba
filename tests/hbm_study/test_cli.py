"""`hbm eval` as it is typed: runs, goes on, reports, refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hbm_study.cli import app
from typer.testing import CliRunner, Result


@pytest.fixture
def suite(workload_file: Path, tmp_path: Path) -> Path:
    file = tmp_path / "suite.yaml"
    block = {
        "workloads": [str(workload_file)],
        "loads": ["0.8"],
        "seeds": 1,
        "arms": ["static-0.30", "static-0.50", "twin"],
    }
    content = {"schema_version": 1, "description": "test", "blocks": [block]}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def _eval(suite: Path, cache: Path, *arguments: str) -> Result:
    out = suite.parent / "out"
    told = ["--suite", str(suite), "--out", str(out), "--cache", str(cache), "--jobs", "1"]
    return CliRunner().invoke(app, [*told, *arguments])


def test_a_suite_that_was_stopped_goes_on_and_writes_everything(suite: Path, cache: Path) -> None:
    nothing = _eval(suite, cache, "--development", "--budget", "0")
    assert nothing.exit_code == 2
    assert "no cell of suite" in nothing.output
    done = _eval(suite, cache, "--development", "--strict")
    assert done.exit_code == 0, done.output
    assert "3 of 3 cells finished" in done.output
    out = suite.parent / "out"
    text = (out / "results-policy.md").read_text(encoding="utf-8")
    assert "Not the frozen test set" in text
    assert {row["arm"] for row in json.loads((out / "results.json").read_text())} == {
        "static-0.30",
        "static-0.50",
        "twin",
    }
    assert (out / "results.parquet").stat().st_size > 0
    # What is finished is reported without being run again.
    again = _eval(suite, cache, "--development", "--strict", "--budget", "0")
    assert again.exit_code == 0
    assert "3 of 3 cells finished" in again.output


def test_strict_is_not_content_with_less(suite: Path, cache: Path) -> None:
    assert _eval(suite, cache, "--development").exit_code == 0
    content = yaml.safe_load(suite.read_text(encoding="utf-8"))
    content["blocks"][0]["seeds"] = 2
    suite.write_text(yaml.safe_dump(content), encoding="utf-8")
    less = _eval(suite, cache, "--development", "--strict", "--budget", "0")
    assert less.exit_code == 1
    assert "3 cells are missing" in less.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "not the frozen test scenarios"),
        (["--development", "--backend", "spark"], "--backend is 'spark'"),
        (["--suite", "huge"], "no suite is called 'huge'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    suite: Path, cache: Path, arguments: list[str], said: str
) -> None:
    done = _eval(suite, cache, *arguments)
    assert done.exit_code == 2
    assert said in done.output
    assert len(done.output.strip().splitlines()) == 1
