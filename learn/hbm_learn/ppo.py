"""PPO on one seed, chunk by chunk.

A chunk is a function of the checkpoint before it: environments, random generators and learner are
made anew from (seed, chunk), so a run that was killed and taken up again ends in the same weights.
Truncated episodes are bootstrapped by stable-baselines3, which sees `truncated` as
`TimeLimit.truncated`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from hbm_learn.checkpoint import NORMALISED_LIMIT, NORMALISER_EPSILON, Checkpoint, Moments
from hbm_learn.config import Chunk, TrainConfig
from hbm_learn.env import EpisodeEnv, SimulatorEnv
from hbm_learn.episode import Library
from hbm_learn.table_env import TableEnv

LAST_RATE: Final = 0.1
"""Learning rate of the last chunk over that of the first."""


class _Count(BaseCallback):  # type: ignore[misc]
    """Tells how many steps are done."""

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self._report = report

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._report(self.num_timesteps)


def train_chunk(
    config: TrainConfig,
    library: Library,
    seed: int,
    chunk: Chunk,
    before: Checkpoint | None,
    folder: Path,
    report: Callable[[int], None],
) -> Checkpoint:
    """Trains from one checkpoint (None: from scratch) to the next. `report` is told the steps."""
    torch.set_num_threads(config.torch_threads)
    table = chunk.stage == "table"
    count = config.table_envs if table else config.simulator_envs

    def make() -> Monitor[Any, Any]:
        kind = TableEnv if table else SimulatorEnv
        env = kind(library, config.training_seeds, config.reward, config.period_ticks)
        if made:
            env.share(made[0])
        made.append(env)
        return Monitor(env)

    made: list[EpisodeEnv] = []
    envs = DummyVecEnv([make] * count)
    normalised = VecNormalize(
        envs,
        clip_obs=NORMALISED_LIMIT,
        clip_reward=config.reward_limit,
        gamma=config.gamma,
        epsilon=NORMALISER_EPSILON,
    )
    try:
        model = learner(config, normalised, [seed, chunk.number], _rate(config, chunk))
        model.set_logger(configure(str(folder / "tensorboard"), ["tensorboard"]))
        done = 0
        if before is not None:
            done = before.steps
            model.set_parameters(before.parameters, exact_match=True)
            for group in model.policy.optimizer.param_groups:
                group["lr"] = _rate(config, chunk)
            _put(normalised.obs_rms, before.observed)
            _put(normalised.ret_rms, before.returned)
        model.num_timesteps = done
        model.learn(chunk.steps, callback=_Count(report), reset_num_timesteps=False)
        return Checkpoint(
            chunk.number + 1,
            model.num_timesteps,
            model.get_parameters(),
            _moments(normalised.obs_rms),
            _moments(normalised.ret_rms),
        )
    finally:
        normalised.close()


def learner(config: TrainConfig, envs: Any, seed: list[int], learning_rate: float) -> Any:
    """A PPO whose mean action is 0 for every observation."""
    with warnings.catch_warnings():
        # A rollout that is no multiple of the minibatch ends in a smaller one, as it should.
        warnings.filterwarnings("ignore", message="You have specified a mini-batch size")
        model = PPO(
            "MlpPolicy",
            envs,
            learning_rate=learning_rate,
            n_steps=config.rollout_steps,
            batch_size=min(config.minibatch, config.rollout_steps * envs.num_envs),
            n_epochs=config.epochs,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            clip_range=config.clip_range,
            ent_coef=config.entropy,
            vf_coef=config.value_weight,
            max_grad_norm=config.gradient_norm,
            seed=int(np.random.default_rng(seed).integers(1 << 31)),
            device="cpu",
            policy_kwargs={
                "net_arch": [config.hidden, config.hidden],
                "activation_fn": torch.nn.Tanh,
                "log_std_init": math.log(config.initial_std),
            },
        )
    torch.nn.init.zeros_(model.policy.action_net.weight)
    torch.nn.init.zeros_(model.policy.action_net.bias)
    return model


def untrained(config: TrainConfig, envs: Any, seed: int) -> Checkpoint:
    """What training begins with."""
    model = learner(config, envs, [seed, 0], config.learning_rate)
    width = envs.observation_space.shape[0]
    plain = Moments(np.zeros(width), np.ones(width), 0.0)
    one = Moments(np.zeros(()), np.ones(()), 0.0)
    return Checkpoint(0, 0, model.get_parameters(), plain, one)


def _rate(config: TrainConfig, chunk: Chunk) -> float:
    last = len(config.chunks()) - 1
    done = chunk.number / last if last else 0.0
    return config.learning_rate * (1.0 - (1.0 - LAST_RATE) * done)


def _moments(kept: Any) -> Moments:
    return Moments(np.array(kept.mean), np.array(kept.var), float(kept.count))


def _put(kept: Any, moments: Moments) -> None:
    kept.mean, kept.var, kept.count = moments.mean.copy(), moments.var.copy(), moments.weight
