"""`hbm train` and `hbm export` on a command line."""

from __future__ import annotations

import pytest
from hbm_learn.cli import export, train
from hbm_learn.config import TrainConfig
from typer.testing import CliRunner


def run(app, *arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_every_argument_is_listed_with_its_meaning() -> None:
    result = run(train, "--arguments")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    named = {line.split("=")[0] for line in lines if not line.startswith(" ")}
    flat = TrainConfig().model_dump()
    expected = {k for k, v in flat.items() if not isinstance(v, dict)}
    expected |= {f"{k}.{n}" for k, v in flat.items() if isinstance(v, dict) for n in v}
    assert named == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "gamma"), "NAME=VALUE"),
        (("--set", "gamma=2"), "gamma: Input should be less than or equal to 1"),
        (("--set", "gama=0.9"), "gama: there is no such argument"),
        (("--set", "domain.load=[0.9, 0.4]"), "domain.load: 0.9 to 0.4 is no range"),
        (("--set", "gamma.a=1", "--set", "gamma.a.b=1"), "has no arguments of its own"),
        (("--config", "/no/such.yaml"), "/no/such.yaml cannot be read as YAML"),
        (("--out", "/dev/null/run"), "cannot be written"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_2(arguments, said) -> None:
    result = run(train, *arguments)
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1, result.output
    assert said in result.output


def test_an_export_of_nothing_is_one_line_and_exit_2(tmp_path) -> None:
    result = run(export, str(tmp_path))
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert "hbm train" in result.output
