"""`hbm eval train`: all learned baselines in one go, each with a card that says what made it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hbm_learn.domain import Domain
from hbm_learn.episode import Library

from hbm_study.arms import load_arm
from hbm_study.arms.config import LearnedArm, PaperArm
from hbm_study.arms.signals import SIGNAL_NAMES
from hbm_study.frozen import TRAINING_SEEDS, VALIDATION_SEEDS
from hbm_study.training import gather, train_lstm, train_trees, write_card


def train_arms(
    folder: Path, kept: Path | None, episodes: int, held: int, steps: int, wanted: set[str]
) -> Iterator[str]:
    """Trains what is wanted of xgboost, lstm and ppo; yields what is to be told."""
    folder.mkdir(parents=True, exist_ok=True)
    library = Library(Domain(), kept)
    training = TRAINING_SEEDS[:episodes]
    validation = VALIDATION_SEEDS[:held]
    card: dict[str, Any] = {
        "signals": SIGNAL_NAMES,
        "training_seeds": [training[0], training[-1]],
        "domain": library.domain.model_dump(mode="json"),
    }
    if wanted & {"xgboost", "lstm"}:
        config = load_arm("xgboost")
        assert isinstance(config, LearnedArm)
        train = gather(library, training, config, lambda done: None)
        yield f"{len(train.best)} examples of {episodes} training episodes"
        test = gather(library, validation, config, lambda done: None)
        told = {
            **card,
            "validation_seeds": [validation[0], validation[-1]],
            "examples": len(train.best),
            "window": config.window,
            "period_s": config.period_s,
        }
        constant = float(abs(test.best - train.best.mean()).mean())
        for name, function, file in (
            ("xgboost", train_trees, "xgboost.json"),
            ("lstm", train_lstm, "lstm.npz"),
        ):
            if name in wanted:
                error = function(train, test, folder / file)
                about = {**told, "validation_error": error, "validation_error_of_mean": constant}
                write_card(folder / f"{name}.card.json", about)
                yield f"{name}: mean error {error:.3f}, of the constant mean {constant:.3f}"
    if "ppo" in wanted:
        from hbm_study.paper_training import DISCOUNT, HIDDEN, LAMBDA, train_ppo

        paper = load_arm("paper")
        assert isinstance(paper, PaperArm)
        seen = train_ppo(library, training, paper, steps, folder / "ppo.npz")
        about = {**card, **seen, "lambda": LAMBDA, "discount": DISCOUNT, "hidden": HIDDEN}
        write_card(folder / "ppo.card.json", about)
        yield f"ppo: {seen['steps']:.0f} steps, reward per step {seen['reward_per_step']:.3f}"
