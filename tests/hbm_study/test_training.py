"""Learned baselines learn what is there to be learned; tuning never gets worse than it began."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hbm_learn.domain import Domain
from hbm_learn.episode import Episode, Library, make_episode
from hbm_study.arms import ArmError, load_arm
from hbm_study.arms.config import LearnedArm, PaperArm
from hbm_study.arms.predictors import Predictor
from hbm_study.arms.signals import SIGNAL_NAMES
from hbm_study.paper_training import PaperEnv
from hbm_study.training import (
    Examples,
    collect,
    mean_error,
    regime_optimum,
    train_lstm,
    train_trees,
)
from hbm_study.tuning import best_static_ms, changed, loss

SMALL = Domain(
    requests=900,
    warm_up=200,
    sample_rate=0.02,
    pool_bytes=(2e9, 4e9),
    rows=(1e6, 2e6),
    regime_requests=(300.0, 400.0),
    regimes=(2, 2),
    overlap_share=0.0,
    history_median=(512.0, 1024.0),
    load=(0.5, 0.6),
)


@pytest.fixture(scope="module")
def episode() -> Episode:
    return make_episode(SMALL, 1003)


@pytest.fixture(scope="module")
def config() -> LearnedArm:
    loaded = load_arm("xgboost")
    assert isinstance(loaded, LearnedArm)
    return loaded.model_copy(update={"window": 3, "period_s": 0.5})


def test_labels_are_the_optimum_of_each_regime(episode: Episode) -> None:
    best = regime_optimum(episode)
    assert np.isnan(best[: episode.stream.warm_up]).all()
    for regime in range(len(episode.stream.regimes)):
        of_regime = best[episode.stream.counted & (episode.stream.regime == regime)]
        assert len(set(of_regime.tolist())) == 1
        assert of_regime[0] in episode.alphas


def test_examples_are_windows_of_signals(episode: Episode, config: LearnedArm) -> None:
    examples = collect(episode, config)
    assert examples.windows.shape[1:] == (3, len(SIGNAL_NAMES))
    assert len(examples.best) == len(examples.windows) > 5
    assert np.isfinite(examples.windows).all()
    # α wandered, or a predictor would learn nothing of it.
    assert np.ptp(examples.windows[:, :, SIGNAL_NAMES.index("alpha")]) > 0.05


def _examples(seed: int, count: int) -> Examples:
    random = np.random.default_rng(seed)
    windows = random.uniform(0.0, 1.0, (count, 3, len(SIGNAL_NAMES)))
    best = 0.2 + 0.6 * windows[:, :, 1].mean(axis=1)
    return Examples(windows, best)


@pytest.mark.parametrize("kind", ["xgboost", "lstm"])
def test_a_predictor_finds_what_depends_on_a_signal(
    kind: str, tmp_path: Path, config: LearnedArm
) -> None:
    train, held = _examples(1, 600), _examples(2, 200)
    path = tmp_path / ("m.json" if kind == "xgboost" else "m.npz")
    error = (train_trees if kind == "xgboost" else train_lstm)(train, held, path)
    constant = mean_error(np.full(len(held.best), train.best.mean()), held)
    assert error < 0.6 * constant
    # What was written answers as what was trained.
    arm = Predictor("p", config.model_copy(update={"kind": kind, "model": str(path)}))
    answers = np.array([arm._predict(window) for window in held.windows])
    assert mean_error(answers, held) == pytest.approx(error, abs=1e-3)


def test_shipped_models_can_be_run() -> None:
    for name in ("xgboost", "lstm"):
        loaded = load_arm(name)
        assert isinstance(loaded, LearnedArm)
        arm = Predictor(name, loaded)
        answer = arm._predict(np.full((loaded.window, len(SIGNAL_NAMES)), 0.5))
        assert 0.0 < answer < 1.0
    assert isinstance(load_arm("ppo"), PaperArm)


def test_settings_are_changed_by_their_place() -> None:
    tuned = changed(load_arm("twin"), {"moves.move_fraction": 0.5, "drop_only": True})
    assert tuned.moves.move_fraction == 0.5
    assert tuned.drop_only
    with pytest.raises(ArmError, match="move_fraction"):
        changed(load_arm("twin"), {"moves.move_fraction": 2.0})


def test_loss_is_against_the_best_static(episode: Episode) -> None:
    reference = best_static_ms(episode)
    assert 0.0 < reference < math.inf
    seen = [loss(load_arm(name), name, episode, reference) for name in ("twin", "pid")]
    assert seen == [loss(load_arm(name), name, episode, reference) for name in ("twin", "pid")]
    assert all(-1.0 < value <= 1.5 for value in seen)
    with pytest.raises(ArmError, match="oracle"):
        loss(load_arm("oracle-paid"), "oracle-paid", episode, reference)


def test_the_paper_environment_is_a_closed_loop_that_ends_by_truncation() -> None:
    config = load_arm("paper")
    assert isinstance(config, PaperArm)
    env = PaperEnv(Library(SMALL), [1003], config.model_copy(update={"period_s": 0.5}))

    def episode_of(action: int) -> tuple[list[float], list[float]]:
        observed, _ = env.reset(seed=1)
        rewards, alphas = [], []
        truncated = False
        while not truncated:
            assert env.observation_space.contains(observed.astype(np.float32))
            observed, reward, terminated, truncated, _ = env.step(np.int64(action))
            assert not terminated
            rewards.append(reward)
            alphas.append(float(observed[SIGNAL_NAMES.index("alpha")]))
        return rewards, alphas

    up, down = episode_of(6), episode_of(0)
    assert up[1][-1] > down[1][-1]
    assert all(-math.inf < reward <= 1.0 for reward in up[0])
    assert episode_of(6) == up
    env.close()
