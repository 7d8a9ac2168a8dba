"""The paper's first layer: PPO over seven signals and seven steps of α, every 5 s.

Reward as the paper states it: SLO satisfaction − λ · max(0, P99 − SLO), the excess relative to the
SLO; λ is not known and 1 here. The closed loop cannot be stepped from outside, so it runs in a
thread that stands still while the learner thinks.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import gymnasium
import numpy as np
import numpy.typing as npt
from hbm_learn.episode import TICK_S, Episode, Library
from hbm_sim.loop import Action, Observation, run_node
from hbm_sim.node_spec import NodeSpec
from hbm_sim.stream import Stream

from hbm_study.arms.config import PaperArm
from hbm_study.arms.signals import MAX_P99, SIGNAL_NAMES, Signals
from hbm_study.arms.steering import Steering

Signal = npt.NDArray[np.float32]
LAMBDA: Final = 1.0
DISCOUNT: Final = 0.9
HIDDEN: Final = (32, 32)


class _Left(Exception):
    """The learner has begun another episode."""


class _Stepped:
    """The paper's scheme with a learner in the place of its policy."""

    name = "stepped"

    def __init__(self, config: PaperArm, questions: Any, answers: Any) -> None:
        self._config = config
        self._questions, self._answers = questions, answers
        self._steering = Steering(config.moves, free=True)
        self._due_s = config.period_s
        self._wanted: float | None = None
        self._begin = self._end = 0
        self._outcome: Any = None

    def start(self, spec: NodeSpec, seed: int) -> None:
        self._slo_ms = spec.info.slo_ms
        self._signals = Signals(spec.info.slo_ms, spec.info.max_sequence_tokens)

    def served(self, stream: Stream, begin: int, end: int, outcome: Any) -> None:
        self._signals.count_users(stream.user[begin:end])
        self._end, self._outcome = end, outcome

    def act(self, observation: Observation) -> Action:
        reading = observation.reading
        if observation.time_s >= self._due_s:
            self._due_s = observation.time_s + self._config.period_s
            self._questions.put((self._signals.look(observation.telemetry), self.reward()))
            chosen = self._answers.get()
            if chosen is None:
                raise _Left
            here = reading.alpha_target if self._wanted is None else self._wanted
            wanted = here + self._config.steps[chosen]
            self._wanted = min(max(wanted, reading.alpha_min), reading.alpha_max)
        return self._steering.action(reading, self._wanted)

    def reward(self) -> float:
        """Of the requests since it was last asked for."""
        begin, self._begin = self._begin, self._end
        if self._outcome is None or self._end == begin:
            return 0.0
        latency_ms = self._outcome.latency_ms[begin : self._end]
        latency_ms = np.where(np.isnan(latency_ms), np.inf, latency_ms)
        met = float((latency_ms <= self._slo_ms).mean())
        tail = min(float(np.percentile(latency_ms, 99)) / self._slo_ms, MAX_P99)
        return met - LAMBDA * max(0.0, tail - 1.0)


class PaperEnv(gymnasium.Env[Signal, np.int64]):  # type: ignore[misc]
    """One step is one period of the paper's controller. Ends by truncation."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as gymnasium declares it

    def __init__(self, library: Library, seeds: Sequence[int], config: PaperArm) -> None:
        self.observation_space = gymnasium.spaces.Box(0.0, MAX_P99, (len(SIGNAL_NAMES),))
        self.action_space = gymnasium.spaces.Discrete(len(config.steps))
        self._library, self._seeds, self._config = library, tuple(seeds), config
        self._loop: threading.Thread | None = None
        self._questions: SimpleQueue[Any] = SimpleQueue()
        self._answers: SimpleQueue[int | None] = SimpleQueue()
        self._newest = np.zeros(len(SIGNAL_NAMES), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Signal, dict[str, Any]]:
        """The first look at a drawn episode."""
        super().reset(seed=seed)
        self.close()
        episode = self._library.episode(int(self.np_random.choice(self._seeds)))
        self._questions, self._answers = SimpleQueue(), SimpleQueue()
        self._loop = threading.Thread(target=self._run, args=(episode,), daemon=True)
        self._loop.start()
        signals, _ = self._listen()
        assert signals is not None
        return signals, {}

    def step(self, action: np.int64) -> tuple[Signal, float, bool, bool, dict[str, Any]]:
        """One period under one action."""
        self._answers.put(int(action))
        signals, reward = self._listen()
        if signals is None:
            return self._newest, reward, False, True, {}
        return signals, reward, False, False, {}

    def close(self) -> None:
        """Ends the loop of the present episode."""
        if self._loop is not None:
            self._answers.put(None)
            self._loop.join()
            self._loop = None

    def _listen(self) -> tuple[Signal | None, float]:
        signals, reward = self._questions.get()
        if isinstance(signals, BaseException):
            raise signals
        if signals is None:
            assert self._loop is not None
            self._loop.join()
            self._loop = None
            return None, reward
        self._newest = signals.astype(np.float32)
        return self._newest, reward

    def _run(self, episode: Episode) -> None:
        arm = _Stepped(self._config, self._questions, self._answers)
        try:
            run_node(
                episode.stream,
                episode.spec,
                arm,
                episode.seed,
                tick_s=TICK_S,
                alpha=episode.drawn.start_alpha,
                refill_bytes_per_s=episode.drawn.refill_bytes_per_s,
            )
            self._questions.put((None, arm.reward()))
        except _Left:
            pass
        except Exception as error:
            self._questions.put((error, 0.0))


def train_ppo(
    library: Library, seeds: Sequence[int], config: PaperArm, steps: int, path: Path
) -> dict[str, float]:
    """Trains and writes the policy's weights; -> what the last updates were like."""
    import torch
    from stable_baselines3 import PPO

    torch.set_num_threads(1)
    env = PaperEnv(library, seeds, config)
    model = PPO(
        "MlpPolicy",
        env,
        n_steps=512,
        batch_size=64,
        gamma=DISCOUNT,
        learning_rate=3e-4,
        ent_coef=0.01,
        policy_kwargs={"net_arch": list(HIDDEN), "activation_fn": torch.nn.Tanh},
        seed=1,
        device="cpu",
    )
    model.learn(steps)
    env.close()
    rewards = [float(each["r"]) / each["l"] for each in model.ep_info_buffer or ()]
    policy = model.policy
    linear = [m for m in policy.mlp_extractor.policy_net if isinstance(m, torch.nn.Linear)]
    arrays = {}
    for index, layer in enumerate([*linear, policy.action_net]):
        arrays[f"weight_{index}"] = layer.weight.detach().numpy().astype(np.float32)
        arrays[f"bias_{index}"] = layer.bias.detach().numpy().astype(np.float32)
    np.savez(path, **arrays)
    return {
        "steps": float(model.num_timesteps),
        "reward_per_step": float(np.mean(rewards)) if rewards else float("nan"),
    }
