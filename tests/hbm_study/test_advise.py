"""Advice from a log: plain where adapting does not pay, and complete."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hbm_load.reader import read_log
from hbm_sim.model_file import load_node
from hbm_study.advise_cli import app
from hbm_study.log_node import Compute, node_of
from typer.testing import CliRunner

MODEL = {
    "model": {
        "tables": [
            {"name": "item", "rows": 20_000, "width": 64},
            {"name": "side", "rows": 4000, "width": 64},
        ],
        "layers": 2,
        "heads": 2,
        "head_dim": 16,
        "dtype": "float32",
        "max_sequence_tokens": 128,
        "drop_block_tokens": 16,
    },
    "pool": {"pool_bytes": 4_194_304, "extent_bytes": 32_768, "page_tokens": 8},
    "server": {"max_batch_requests": 2, "slo_ms": 20.0},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A log of steady traffic, and a model."""
    folder = tmp_path_factory.mktemp("advise")
    random = np.random.default_rng(7)
    log = folder / "log.csv"
    with log.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["time", "user", "items"])
        for index in range(4500):
            user = int(random.zipf(1.3)) % 400
            items = " ".join(f"i{item % 20_000}" for item in random.zipf(1.2, 6).tolist())
            writer.writerow([1_700_000_000 + index * 0.5, f"u{user}", items])
    model = folder / "model.yaml"
    model.write_text(yaml.safe_dump(MODEL))
    return log, model


def test_the_simulated_node_is_that_of_the_model_file(files: tuple[Path, Path]) -> None:
    log, model = files
    info, config = load_node(str(model))
    trace = read_log(log, catalogue=20_000, candidates=16).trace
    made = node_of(trace, info, config, Compute(1.0, 20.0, 10.0, 1e8))
    simulated = made.workload.node_spec()
    assert simulated.info.extents == info.extents
    assert simulated.info.pages_per_extent == info.pages_per_extent
    assert simulated.info.classes[0].rows_per_extent == info.classes[0].rows_per_extent
    assert simulated.costs.row_ms[0] == pytest.approx(256 / 1e8 * 1e3)
    assert not made.rounded
    assert made.workload.node.lookups_per_token == 2


def test_steady_traffic_is_told_to_keep_alpha_fixed(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    log, model = files
    arguments = ["--trace", str(log), "--model", str(model), "--candidates", "16", "--serial"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "Adapting is not worth it" in done.output
    advice = json.loads((tmp_path / "advice.json").read_text())
    tails = dict(zip(advice["alpha"], advice["tail_ms"], strict=True))
    assert advice["best_tail"]["value_ms"] == min(tails.values())
    assert not advice["pays"]
    policy = yaml.safe_load((tmp_path / "policy.yaml").read_text())
    assert policy["spec"]["mode"] == "Fixed"
    assert policy["spec"]["alpha"]["fixed"] == pytest.approx(advice["recommended"], abs=1e-3)
    page = (tmp_path / "advice.html").read_text()
    assert "Adapting is not worth it" in page
    assert page.count("<svg") == page.count("</svg>") == 2
    # Nothing is fetched by whoever opens it.
    assert "<script" not in page
    assert "src=" not in page
    assert 'href="http' not in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nothing.yaml"], "nothing.yaml: cannot be read"),
        (["--model", "small", "--gpu", "b9000"], "--gpu is 'b9000'"),
        (["--model", "hstu-8x1024"], "give --gpu or --pool-bytes"),
        (["--model", "small", "--columns", "a,b"], "--columns is 'a,b'"),
        (["--model", "small", "--columns", "when,user,items"], "when"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    files: tuple[Path, Path], tmp_path: Path, arguments: list[str], said: str
) -> None:
    log, _ = files
    done = CliRunner().invoke(app, ["--trace", str(log), "--out", str(tmp_path), *arguments])
    assert done.exit_code == 2
    assert said in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_too_short_a_log_says_how_much_is_needed(files: tuple[Path, Path], tmp_path: Path) -> None:
    log, model = files
    short = tmp_path / "short.csv"
    short.write_text("\n".join(log.read_text().splitlines()[:800]) + "\n")
    done = CliRunner().invoke(app, ["--trace", str(short), "--model", str(model)])
    assert done.exit_code == 2
    assert "at least 2000 are needed" in done.output
