"""`hbm plan` on models, files and wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hbm_pool.cli import PRESETS, app
from typer.testing import CliRunner

PRESET_FOLDER = Path(__file__).parents[2] / "serving" / "hbm_serving" / "presets"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def planned(*arguments: str) -> dict[str, Any]:
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    return dict(json.loads(out))


@pytest.mark.parametrize("gpu", ["a100-40", "a100-80", "h100-80", "h200-141"])
@pytest.mark.parametrize("preset", ["hstu-8x1024", "dlrmv3"])
def test_plans_known_models_on_known_gpus(preset: str, gpu: str) -> None:
    plan = planned("--preset", preset, "--gpu", gpu)
    assert len(plan["alphas"]) == 9
    assert plan["alphas"][0]["users"] > plan["alphas"][-1]["users"] > 0
    code, out, _ = run("--preset", preset, "--gpu", gpu)
    assert code == 0
    assert f"{plan['num_extents']} extents" in out


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_reads_the_files_of_the_server(name: str) -> None:
    raw = yaml.safe_load((PRESET_FOLDER / f"{name}.yaml").read_text())
    plan = planned("--config", str(PRESET_FOLDER / f"{name}.yaml"))
    assert plan["num_extents"] == raw["pool"]["pool_bytes"] // raw["pool"]["extent_bytes"]


def test_reads_json_and_takes_a_size_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(PRESETS["dlrmv3"]))
    plan = planned("--config", str(path), "--pool-bytes", str(10 << 30), "--alpha", "0.25")
    assert [round(row["alpha"], 2) for row in plan["alphas"]] == [0.25]
    assert plan["pool_bytes"] <= 10 << 30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give either --config FILE or --preset"),
        (("--preset", "x"), "preset 'x' is unknown"),
        (("--preset", "dlrmv3"), "the pool has no size"),
        (("--preset", "dlrmv3", "--gpu", "b200"), "GPU 'b200' is unknown"),
        (("--preset", "small", "--pool-bytes", "100000"), "raise pool_bytes to at least"),
        (("--preset", "small", "--pool-bytes", "0"), "greater than or equal to 1"),
        (("--preset", "small", "--alpha", "2"), "alpha is 2.0"),
        (("--preset", "small", "--history-tokens", "9999"), "history_tokens=9999"),
        (("--preset", "dlrmv3", "--gpu", "a100-40", "--reserve-bytes", "-1"), "--reserve-bytes=-1"),
        (("--config", "/no/such/file.yaml"), "cannot be read"),
    ],
)
def test_wrong_input_exits_2_with_one_line(arguments: tuple[str, ...], said: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert said in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("model: 3\npool: {}", "section 'model' is missing"),
        ("model: {layers: 2}\npool: {}", "model.heads: this key is required"),
        (
            "model: {layers: 2, heads: x, head_dim: 4, tables: []}\npool: {page_tokens: 4}",
            "heads: Input should be a valid integer",
        ),
        (
            "model: {layers: 2, heads: 2, head_dim: 4, tables: []}\npool: {page_tokens: 4}",
            "model.tables: must be a list",
        ),
        (
            "model: {layers: 2, heads: 2, head_dim: 4, tables: [{name: a}]}\n"
            "pool: {page_tokens: 4}",
            "rows",
        ),
        ("\x00", "not valid YAML"),
    ],
)
def test_wrong_files_exit_2_with_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(text)
    code, out, err = run("--config", str(path))
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1
