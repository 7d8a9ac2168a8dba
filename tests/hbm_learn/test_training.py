"""A whole run on small episodes: killed and taken up again, selected, judged, exported."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hbm_learn.checkpoint import Checkpoint
from hbm_learn.config import TrainConfig
from hbm_learn.export import export
from hbm_learn.training import TrainingError, checkpoint_path, read_curve, train
from hbm_policy.onnx_residual import OnnxResidual


@pytest.fixture(scope="module")
def tiny(library) -> TrainConfig:
    return TrainConfig(
        seeds=(1, 2),
        episodes=2,
        validation_episodes=1,
        held_out_episodes=2,
        table_steps=128,
        simulator_steps=32,
        table_chunks=2,
        simulator_chunks=1,
        table_envs=2,
        simulator_envs=1,
        rollout_steps=32,
        minibatch=32,
        epochs=2,
        hidden=8,
        domain=library.domain,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder, tiny) -> Path:
    """A run from beginning to end."""
    out = tmp_path_factory.mktemp("whole")
    (out / "episodes").symlink_to(folder)
    train(tiny, out)
    return out


def weights(folder: Path, seed: int, chunk: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = Checkpoint.load(
        checkpoint_path(folder, seed, chunk)
    ).parameters["policy"]
    return found


def test_the_plan_has_its_stages_in_order(tiny) -> None:
    stages = [(chunk.stage, chunk.first_step, chunk.steps) for chunk in tiny.chunks()]
    assert stages == [("table", 0, 64), ("table", 64, 64), ("simulator", 128, 32)]
    assert [tiny.validated(chunk) for chunk in tiny.chunks()] == [False, True, True]


def test_a_run_leaves_curves_checkpoints_and_a_result(whole, tiny) -> None:
    result = json.loads((whole / "result.json").read_text())
    assert result["seed"] in tiny.seeds
    assert result["held_out"]["seeds"] == [2050, 2051]
    best = max(p.worth.mean for seed in tiny.seeds for p in read_curve(whole, seed))
    chosen = int(result["checkpoint"][-6:-3])
    points = {point.chunk: point for point in read_curve(whole, result["seed"])}
    assert points[chosen].worth.mean == best
    assert list(whole.glob("seed-1/tensorboard/events.*"))


def test_training_changes_the_policy_and_seeds_differ(whole, tiny) -> None:
    first, second = weights(whole, 1, 3), weights(whole, 2, 3)
    assert not torch.all(first["action_net.weight"] == 0.0)
    assert not torch.equal(first["action_net.weight"], second["action_net.weight"])


def test_a_run_that_was_killed_ends_in_the_same_weights(whole, tiny, folder, tmp_path) -> None:
    (tmp_path / "episodes").symlink_to(folder)
    arguments = tmp_path / "arguments.yaml"
    arguments.write_text(tiny.model_dump_json())  # JSON is YAML
    command = ["-m", "hbm_cli.main", "train", "--out", str(tmp_path), "--config", str(arguments)]
    running = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL)
    first = checkpoint_path(tmp_path, 1, 1)
    while not first.is_file():
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    stamp = first.stat().st_mtime_ns
    train(tiny, tmp_path)
    assert first.stat().st_mtime_ns == stamp
    for seed in tiny.seeds:
        expected, found = weights(whole, seed, 3), weights(tmp_path, seed, 3)
        assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert [p.worth for p in read_curve(tmp_path, 1)] == [p.worth for p in read_curve(whole, 1)]


def test_a_folder_of_another_run_is_left_alone(whole, tiny) -> None:
    other = tiny.model_copy(update={"gamma": 0.5, "hidden": 16})
    with pytest.raises(TrainingError, match=r"other arguments \(gamma, hidden\)"):
        train(other, whole)


def test_an_export_is_what_the_sidecar_loads_and_its_card_says_the_truth(
    whole, tiny, tmp_path
) -> None:
    done = export(whole, tmp_path / "residual.onnx", gain=0.5, note="It rained.")
    assert hashlib.sha256(done.path.read_bytes()).hexdigest() == done.sha256
    residual = OnnxResidual(done.path, done.sha256)
    assert residual.gain == 0.5
    run = json.loads((whole / "run.json").read_text())
    assert residual.commit == run["commit"]
    card = done.card.read_text()
    result = json.loads((whole / "result.json").read_text())
    assert done.sha256 in card
    assert f"{result['held_out']['service']['mean']:+.3g} %" in card
    assert card.count("| simulator |") == len(tiny.seeds)
    assert "--set 'hidden=8'" in card
    assert "--gain 0.5" in card
    assert "* It rained.\n" in card


def test_an_unfinished_run_is_not_exported(whole, tmp_path) -> None:
    with pytest.raises(TrainingError, match="holds no training run"):
        export(tmp_path, tmp_path / "residual.onnx")
    shutil.copy(whole / "run.json", tmp_path)
    with pytest.raises(TrainingError, match="has no result yet"):
        export(tmp_path, tmp_path / "residual.onnx")
    assert not (tmp_path / "residual.onnx").exists()
