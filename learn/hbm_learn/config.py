"""Arguments of a training run."""

from __future__ import annotations

from itertools import accumulate
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from hbm_learn.domain import TRAINING_SEEDS, VALIDATION_SEEDS, Domain
from hbm_learn.reward import RewardConfig

Share = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
HALF = len(VALIDATION_SEEDS) // 2


class Chunk(NamedTuple):
    """A part of the training of one seed, from checkpoint to checkpoint."""

    number: int
    """From 0."""
    stage: Literal["table", "simulator"]
    first_step: int
    steps: int


class TrainConfig(BaseModel):
    """One run: the same for all its seeds. Equal arguments give equal weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    seeds: tuple[int, ...] = Field((1, 2, 3, 4, 5), min_length=1)
    """Seeds of the learner; each is trained alone, the best of all is selected on validation."""
    episodes: int = Field(64, ge=1, le=len(TRAINING_SEEDS))
    """Training episodes, drawn with the seeds 1000, 1001, …"""
    validation_episodes: int = Field(10, ge=1, le=HALF)
    """Episodes by which checkpoints are selected, drawn with the seeds 2000, 2001, …"""
    held_out_episodes: int = Field(16, ge=2, le=HALF)
    """Episodes that the selected checkpoint alone is judged on, with the seeds 2050, 2051, …"""
    period_ticks: int = Field(4, ge=1, le=4)
    """Ticks of one step, 250 ms each, under one action. Deployed, every tick has its own."""
    table_steps: int = Field(200_000, ge=0)
    """Steps of pre-training in the table environment. 0: none."""
    simulator_steps: int = Field(40_000, ge=0)
    """Steps on the simulator, with real transients. 0: none."""
    table_chunks: int = Field(2, ge=1, le=1000)
    """Checkpoints of the pre-training."""
    simulator_chunks: int = Field(4, ge=1, le=1000)
    """Checkpoints on the simulator; each of them is validated, and so is the last pre-trained."""
    table_envs: int = Field(16, ge=1, le=1024)
    """Table environments stepped together."""
    simulator_envs: int = Field(4, ge=1, le=64)
    """Simulators stepped together."""
    rollout_steps: int = Field(128, ge=2)
    """Steps of each environment between two updates."""
    minibatch: int = Field(256, ge=2)
    """Samples of one gradient step."""
    epochs: int = Field(6, ge=1)
    """Passes over a rollout."""
    learning_rate: float = Field(3e-4, gt=0.0, allow_inf_nan=False)
    """At the beginning; it falls linearly, from chunk to chunk, to a tenth."""
    gamma: Share = 0.97
    """Discount per step. .97: what comes half a minute later counts for 40 %, and a pool is warm
    again within that."""
    gae_lambda: Share = 0.95
    """Of generalised advantage estimation."""
    clip_range: Share = 0.2
    """Of PPO's ratio."""
    entropy: float = Field(0.001, ge=0.0)
    """Weight of the entropy bonus. 0: none."""
    value_weight: float = Field(0.5, ge=0.0)
    """Weight of the value loss."""
    gradient_norm: float = Field(0.5, gt=0.0)
    """Gradients are cut to this norm."""
    hidden: int = Field(64, ge=1, le=256)
    """Width of both hidden layers. 64: a file of 24 KB."""
    initial_std: float = Field(0.5, gt=0.0, le=2.0)
    """Standard deviation of actions at the beginning. Their mean begins at 0: the untrained
    policy is the stack without it."""
    reward_limit: float = Field(10.0, gt=0.0)
    """Rewards over their running deviation are cut to this."""
    torch_threads: int = Field(1, ge=1, le=256)
    """Threads of torch, per seed trained at once."""
    domain: Domain = Domain()
    """What episodes are drawn from."""
    reward: RewardConfig = RewardConfig()
    """What a step is worth."""

    def chunks(self) -> list[Chunk]:
        """The whole training of one seed."""
        plan: list[tuple[Literal["table", "simulator"], int]] = []
        if self.table_steps:
            plan += [("table", self.table_steps // self.table_chunks)] * self.table_chunks
        if self.simulator_steps:
            each = self.simulator_steps // self.simulator_chunks
            plan += [("simulator", each)] * self.simulator_chunks
        starts = [0, *accumulate(steps for _, steps in plan)]
        return [
            Chunk(number, stage, start, steps)
            for number, ((stage, steps), start) in enumerate(zip(plan, starts, strict=False))
        ]

    def validated(self, chunk: Chunk) -> bool:
        """Simulator chunks, and the last of the tables."""
        chunks = self.chunks()
        following = chunks[chunk.number + 1 :]
        return chunk.stage == "simulator" or not following or following[0].stage == "simulator"

    @property
    def training_seeds(self) -> tuple[int, ...]:
        """Of the episodes trained on."""
        return tuple(TRAINING_SEEDS[: self.episodes])

    @property
    def validation_seeds(self) -> tuple[int, ...]:
        """Of the episodes that select."""
        return tuple(VALIDATION_SEEDS[: self.validation_episodes])

    @property
    def held_out_seeds(self) -> tuple[int, ...]:
        """Of the episodes that judge; they select nothing."""
        return tuple(VALIDATION_SEEDS[HALF : HALF + self.held_out_episodes])
