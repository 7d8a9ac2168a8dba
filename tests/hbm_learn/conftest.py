"""A domain of small and slow nodes: an episode has few requests and some fifty steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from hbm_learn.domain import Domain
from hbm_learn.episode import Episode, Library

SMALL = Domain(
    requests=900,
    warm_up=700,
    sample_rate=0.05,
    pool_bytes=(6e8, 1e9),
    rows=(2e5, 4e5),
    row_bytes=(1024,),
    token_bytes=(8192, 16_384),
    gather_bytes_per_s=(4e7, 8e7),
    compute_factor=(20.0, 30.0),
    history_median=(512.0, 1024.0),
    revisit_distance=(20.0, 60.0),
    regime_requests=(200.0, 500.0),
    twin_rate=(0.02, 0.05),
    churn=(0.0, 5.0),
    load=(0.5, 0.8),
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the small episodes are kept."""
    return tmp_path_factory.mktemp("episodes")


@pytest.fixture(scope="session")
def library(folder: Path) -> Library:
    return Library(SMALL, folder)


@pytest.fixture(scope="session")
def episode(library: Library) -> Episode:
    return library.episode(1000)
