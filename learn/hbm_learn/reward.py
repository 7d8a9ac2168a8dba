"""What a step is worth, with privileged knowledge: what the same requests would have taken.

Each request is compared with itself on a pool that is warm at the α best for the traffic around it.
Arrival noise and the length of histories so fall out of the difference, and what a move costs while
caches warm up stays in it. The price of |dα| keeps α from wandering where the difference is
small; late answers bring the tail in.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from hbm_learn.episode import Episode


class RewardConfig(BaseModel):
    """Weights of the terms. 0 leaves a term out."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    regret_weight: float = Field(100.0, ge=0.0)
    """Per unit of excess service time over the best: 100 counts in percent."""
    regret_limit: float = Field(0.5, gt=0.0)
    """Larger excess counts as this."""
    move_weight: float = Field(20.0, ge=0.0)
    """Per unit of |dα| that is commanded."""
    late_weight: float = Field(50.0, ge=0.0)
    """Per unit of the share of requests that are later than the latency goal, or refused."""
    paired: bool = True
    """The reward is the difference to what the stack without the residual gets in the same step of
    the same episode: 0 is as good as without. It changes no optimum, as nothing the residual does
    moves it, and takes most of the variance away."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What happened in one step."""

    requests: int = 0
    late: int = 0
    """Of them, beyond the latency goal or refused."""
    served_ms: float = 0.0
    best_ms: float = 0.0
    """What they would have taken on a pool warm at the best α."""
    moved: float = 0.0
    """Sum of |dα|."""

    def reward(self, config: RewardConfig) -> float:
        """The worth of this step, at most 0."""
        worth = -config.move_weight * self.moved
        if self.best_ms > 0.0:
            excess = max(self.served_ms / self.best_ms - 1.0, 0.0)
            worth -= config.regret_weight * min(excess, config.regret_limit)
        if self.requests:
            worth -= config.late_weight * self.late / self.requests
        return worth


def step_of(
    episode: Episode,
    begin: int,
    end: int,
    service_ms: npt.NDArray[np.float64],
    latency_ms: npt.NDArray[np.float64],
    moved: float,
) -> Step:
    """The step in which requests [begin, end) began; a refused one has the latency NaN."""
    answered = ~np.isnan(latency_ms)
    in_time = int((latency_ms <= episode.spec.info.slo_ms).sum())
    return Step(
        requests=end - begin,
        late=end - begin - in_time,
        served_ms=float(service_ms[answered].sum()),
        best_ms=float(episode.best_ms[begin:end][answered].sum()),
        moved=moved,
    )
