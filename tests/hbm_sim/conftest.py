"""Small nodes and streams."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
from hbm_policy import CostConstants
from hbm_pool.contracts.history import page_fingerprints
from hbm_pool.contracts.records import RequestSample, ServerInfo
from hbm_sim import SimRequest

from tests.small_server import keys_of, small_server


def _requests(
    info: ServerInfo,
    seed: int,
    count: int,
    *,
    users: int = 25,
    zipf: float = 0.8,
    regime: str = "only",
    nodes: int = 1,
    start_s: float = 0.0,
) -> list[SimRequest]:
    random = np.random.default_rng(seed)
    rows = info.tables[0].rows
    popularity = np.cumsum(1.0 / np.arange(1, rows + 1) ** zipf)
    known: dict[int, np.ndarray] = {}
    requests = []

    def draw(many: int) -> np.ndarray:
        ranks = np.searchsorted(popularity, random.random(many) * popularity[-1])
        return ranks * 7 % rows

    for index in range(count):
        user = int(random.integers(1, users + 1))
        history = known.get(user, draw(int(random.integers(20, 80))))
        history = np.concatenate([history, draw(2)])[-info.max_sequence_tokens :]
        known[user] = history
        candidates = draw(8)
        rows_of, wanted = keys_of(info, history), keys_of(info, candidates)
        sample = RequestSample(
            user=user,
            history_tokens=len(history),
            candidates=len(candidates),
            rows_total=len(rows_of) + len(wanted),
            history_rows_total=len(rows_of),
            page_fingerprints=page_fingerprints(
                history, np.arange(len(history)), None, info.page_tokens
            ),
            history_keys=rows_of,
            history_positions=np.repeat(np.arange(len(history), dtype=np.uint32), len(info.tables)),
            candidate_keys=wanted,
        )
        requests.append(
            SimRequest(
                sample=sample,
                regime=regime,
                node=f"node-{user % nodes}",
                settled=index >= count // 2,
                arrival_s=start_s + index * 0.01,
            )
        )
    return requests


@pytest.fixture(scope="session")
def make_info() -> Callable[..., ServerInfo]:
    return functools.partial(small_server, extents=96)


@pytest.fixture(scope="session")
def make_requests() -> Callable[..., list[SimRequest]]:
    return _requests


@pytest.fixture(scope="session")
def costs() -> CostConstants:
    return CostConstants(0.5, 0.02, 1e-5, (0.05, 0.03))
