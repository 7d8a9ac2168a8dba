"""`hbm sweep` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hbm_sim.cli import app
from hbm_sim.model_file import ModelFileError, load_node, presets
from typer.testing import CliRunner

MODEL = """
model:
  tables: [{name: item, rows: 3000, width: 16}, {name: side, rows: 500, width: 8}]
  layers: 1
  heads: 1
  head_dim: 16
  max_sequence_tokens: 128
  drop_block_tokens: 32
pool: {pool_bytes: 327680, extent_bytes: 4096, page_tokens: 8, link_bytes_per_s: 1.0e+6}
server: {max_batch_requests: 1}
"""
SCENARIO = """
schema_version: 1
name: small
catalogue: 3000
duration_s: 8
regimes:
  returning:
    arrivals: {rate_per_s: 60}
    users: {hot: 1.0, hot_users: 30}
    history: {median: 90, sigma: 0.1, minimum: 60, maximum: 110, growth: 1}
    candidates: 8
  strangers:
    arrivals: {rate_per_s: 60}
    history: {median: 20, sigma: 0.2, minimum: 10, maximum: 40}
    candidates: 64
walk: [{regime: returning}, {regime: strangers}]
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    model, scenario = tmp_path / "model.yaml", tmp_path / "small.yaml"
    model.write_text(MODEL)
    scenario.write_text(SCENARIO)
    return model, scenario


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_a_scenario_is_swept_to_json(files: tuple[Path, Path]) -> None:
    model, scenario = files
    result = run(
        "--scenario", str(scenario), "--model-config", str(model), "--serial", "--nodes", "2",
        "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["cost_model"] == "serial"
    assert said["nodes"] == 2
    alphas = {each["regime"]: each["best_mean"]["alpha"] for each in said["pooled"]}
    assert alphas["strangers"] - alphas["returning"] > 0.2
    assert said["costs"]["row_ms"] == [0.064, 0.032]


def test_equal_inputs_sweep_to_equal_results(files: tuple[Path, Path]) -> None:
    model, scenario = files
    arguments = ("--scenario", str(scenario), "--model-config", str(model), "--json")
    assert run(*arguments).stdout == run(*arguments).stdout


def test_a_log_is_swept_to_a_table(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = files
    log = tmp_path / "log.csv"
    lines = ["time,user,items"]
    lines += [f"{second},u{second % 9},i{second % 31}" for second in range(240)]
    log.write_text("\n".join(lines))
    result = run("--trace", str(log), "--model-config", str(model), "--seconds", "5")
    assert result.exit_code == 0, result.output
    assert "α*" in result.stdout


def test_given_costs_are_used(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, scenario = files
    costs = tmp_path / "costs.json"
    costs.write_text('{"fixed_ms": 1, "token_ms": 0.1, "token_context_ms": 0, "row_ms": [1, 2]}')
    result = run(
        "--scenario", str(scenario), "--model-config", str(model), "--costs", str(costs), "--json"
    )
    assert json.loads(result.stdout)["costs"]["row_ms"] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model-config", "/nowhere.yaml"), "cannot be read"),
        (("--scenario", "unheard-of"), "unheard-of"),
        (("--scenario", "demo", "--trace", "x.csv"), "not both"),
        (("--costs", "/nowhere.json"), "nowhere.json"),
    ],
)
def test_wrong_arguments_end_with_one_line(
    files: tuple[Path, Path], arguments: tuple[str, ...], words: str
) -> None:
    result = run("--model-config", str(files[0]), *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_workload_beyond_the_models_rows_is_refused(files: tuple[Path, Path]) -> None:
    result = run("--model-config", str(files[0]), "--scenario", "demo")
    assert result.exit_code == 2
    assert "3000 rows" in result.stderr


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("page_tokens: 8", "page_tokens: 7", "page_tokens=7"),
        ("max_sequence_tokens: 128", "max_tokens: 128", "model.max_sequence_tokens is missing"),
        ("pool_bytes: 327680", "pool_bytes: lots", "pool_bytes"),
        ("pool:", "pond:", "section pool is missing"),
        ("rows: 3000, width", "rows: 3000, breadth", "breadth"),
        ("server: {max_batch_requests: 1}", "server: 3", "server must be a mapping"),
        ("[{name: item", "[{name: [", "not valid YAML"),
    ],
)
def test_a_wrong_model_file_names_the_field(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in MODEL
    path = tmp_path / "model.yaml"
    path.write_text(MODEL.replace(old, new))
    with pytest.raises(ModelFileError, match=words) as raised:
        load_node(str(path))
    assert "\n" not in str(raised.value)


def test_the_presets_of_the_server_describe_nodes() -> None:
    assert "demo" in presets()
    info, config = load_node("demo")
    assert info.extents == config.num_extents
    assert info.tables[0].rows == config.tables[0].rows
