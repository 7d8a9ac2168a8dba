"""A small model, its reference, and requests drawn from it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hbm_serving.config import Config, load_config
from hbm_serving.features import RankRequest
from hbm_serving.reference import ReferenceScorer

torch.set_num_threads(1)

Draw = Callable[..., RankRequest]
Scores = Callable[[RankRequest], npt.NDArray[np.float32]]


@pytest.fixture(scope="session")
def config() -> Config:
    return load_config("tiny")


@pytest.fixture(scope="session")
def reference(config: Config) -> ReferenceScorer:
    return ReferenceScorer.from_config(config)


@pytest.fixture(scope="session")
def draw(config: Config) -> Draw:
    """A request with random items and growing times."""
    model = config.model

    def drawn(
        generator: np.random.Generator,
        tokens: int,
        candidates: int,
        *,
        user: int = 1,
        actions: bool = True,
    ) -> RankRequest:
        times = np.cumsum(generator.integers(0, 50_000, tokens))
        return RankRequest(
            user=user,
            items=generator.integers(0, model.items, tokens),
            timestamps=times,
            actions=generator.integers(0, model.actions, tokens) if actions else None,
            candidates=generator.integers(0, model.items, candidates),
            query_time=int(times[-1] if tokens else 0) + int(generator.integers(0, 1000)),
            request_tokens=tokens,
        )

    return drawn


@pytest.fixture(scope="session")
def wanted(reference: ReferenceScorer) -> Scores:
    """What the cache-free reference says."""

    def scores(request: RankRequest) -> npt.NDArray[np.float32]:
        return reference.score(
            request.items,
            request.timestamps,
            request.candidates,
            request.actions,
            request.query_time,
        )

    return scores
