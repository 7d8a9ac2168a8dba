"""Trains the learned baselines, on training seeds only: XGBoost, LSTM and the paper's PPO.

All learn from the episodes that the product's own residual is trained on (`hbm_learn.episode`): one
drawn node and workload per seed. What is written is small: trees as JSON, weights as float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_learn.episode import TICK_S, Episode, Library, service_ms
from hbm_sim.loop import run_node
from hbm_sim.sweep import optimum

from hbm_study.arms.config import LearnedArm
from hbm_study.arms.wander import Wander

Floats = npt.NDArray[np.float64]
SETTLE: Final = 0.25
"""Leading part of a regime that α* is not taken over."""
TREES: Final = 120
DEPTH: Final = 4
HIDDEN: Final = 16
EPOCHS: Final = 40
BATCH: Final = 128


class Examples(NamedTuple):
    """Windows of signals and the α* of their regime."""

    windows: Floats  # [n, window, 7]
    best: Floats  # [n]


def regime_optimum(episode: Episode) -> Floats:
    """α* by mean service of the regime that each request belongs to, `[n]`."""
    stream = episode.stream
    service = service_ms(episode.tables, episode.overlap)
    best = np.full(len(stream), np.nan)
    for index, regime in enumerate(stream.regimes):
        settled = stream.of_regime(regime)
        if settled.any():
            found = optimum(episode.alphas.tolist(), service[settled].mean(axis=0))
            best[stream.counted & (stream.regime == index)] = found.alpha
    return best


def collect(episode: Episode, config: LearnedArm) -> Examples:
    """What a predictor would have seen of an episode while α wandered."""
    arm = Wander(config.period_s)
    run_node(
        episode.stream,
        episode.spec,
        arm,
        episode.seed,
        tick_s=TICK_S,
        refill_bytes_per_s=episode.drawn.refill_bytes_per_s,
    )
    best = regime_optimum(episode)
    signals = np.array([look.signals for look in arm.looks])
    newest = np.array([max(look.request, 0) for look in arm.looks])
    windows, labels = [], []
    for end in range(config.window, len(signals) + 1):
        label = best[newest[end - 1]]
        if np.isfinite(label):
            windows.append(signals[end - config.window : end])
            labels.append(label)
    shape = (0, config.window, signals.shape[1] if len(signals) else 7)
    return Examples(np.array(windows) if windows else np.empty(shape), np.array(labels))


def gather(
    library: Library,
    seeds: Sequence[int],
    config: LearnedArm,
    progress: Callable[[int], None],
) -> Examples:
    """Examples of all these seeds."""
    found = []
    for index, seed in enumerate(seeds):
        found.append(collect(library.episode(seed), config))
        progress(index + 1)
    return Examples(*(np.concatenate(column) for column in zip(*found, strict=True)))


def mean_error(predicted: Floats, examples: Examples) -> float:
    """Mean |α̂ − α*|."""
    return float(np.abs(np.clip(predicted, 0.0, 1.0) - examples.best).mean())


def train_trees(train: Examples, held: Examples, path: Path) -> float:
    """XGBoost; -> mean error on the held-out examples."""
    import xgboost

    def matrix(examples: Examples) -> Any:
        return xgboost.DMatrix(
            examples.windows.reshape(len(examples.best), -1), label=examples.best
        )

    parameters = {"max_depth": DEPTH, "eta": 0.08, "subsample": 0.7, "seed": 1, "nthread": 1}
    booster = xgboost.train(
        parameters,
        matrix(train),
        TREES,
        evals=[(matrix(held), "held")],
        early_stopping_rounds=20,
        verbose_eval=False,
    )
    booster = booster[: booster.best_iteration + 1]
    booster.save_model(path)
    return mean_error(booster.predict(matrix(held)).astype(np.float64), held)


def train_lstm(train: Examples, held: Examples, path: Path) -> float:
    """An LSTM of `HIDDEN` cells, the epoch that is best on the held-out examples."""
    import torch as untyped_torch

    torch: Any = untyped_torch
    torch.manual_seed(1)
    torch.set_num_threads(1)
    flat = train.windows.reshape(-1, train.windows.shape[-1])
    mean, scale = flat.mean(axis=0), flat.std(axis=0) + 1e-3
    network = torch.nn.LSTM(flat.shape[1], HIDDEN, batch_first=True)
    head = torch.nn.Linear(HIDDEN, 1)
    torch.nn.init.constant_(head.bias, float(train.best.mean()))
    parameters = [*network.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=3e-3, weight_decay=1e-4)

    def tensor(windows: Floats) -> Any:
        return torch.tensor((windows - mean) / scale, dtype=torch.float32)

    def predict(inputs: Any) -> Any:
        states, _ = network(inputs)
        return head(states[:, -1])[:, 0]

    inputs, wanted = tensor(train.windows), torch.tensor(train.best, dtype=torch.float32)
    held_inputs = tensor(held.windows)
    best_error, best = np.inf, {}
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(wanted)).split(BATCH):
            optimiser.zero_grad()
            loss = torch.nn.functional.smooth_l1_loss(predict(inputs[rows]), wanted[rows], beta=0.1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
        with torch.no_grad():
            error = mean_error(predict(held_inputs).numpy().astype(np.float64), held)
        if error < best_error:
            best_error = error
            layers = {**network.state_dict(), "head_weight": head.weight, "head_bias": head.bias}
            best = {name: value.detach().numpy().copy() for name, value in layers.items()}
    np.savez(path, mean=mean.astype(np.float32), scale=scale.astype(np.float32), **best)
    return float(best_error)


def write_card(path: Path, content: dict[str, Any]) -> None:
    """What a model was made from, beside it."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
