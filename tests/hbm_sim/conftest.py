"""Small nodes and streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hbm_policy import CostConstants
from hbm_pool.contracts.history import page_fingerprints, table_rows
from hbm_pool.contracts.identity import row_keys
from hbm_pool.contracts.records import CostModel, RequestSample, RowClass, ServerInfo, TableMap
from hbm_sim import SimRequest


def _info(**fields: Any) -> ServerInfo:
    values: dict[str, Any] = {
        "node": "n",
        "model": "m",
        "extents": 96,
        "extent_bytes": 4096,
        "page_tokens": 4,
        "pages_per_extent": 4,
        "max_sequence_tokens": 128,
        "drop_block_tokens": 32,
        "tables": (TableMap("item", 3000, 0, False), TableMap("side", 500, 1, True)),
        "classes": (RowClass(64, 32, 3000, (0,)), RowClass(32, 64, 500, (1,))),
        "cost_model": CostModel.SERIAL,
        "sample_rate": 1.0,
        "alpha_min": 0.1,
        "alpha_max": 0.9,
        "slo_ms": 50.0,
        "device": "cpu",
    }
    return ServerInfo(**(values | fields))


def _keys(info: ServerInfo, items: np.ndarray) -> np.ndarray:
    columns = [
        row_keys(index, table_rows(items, index, table.rows, table.hashed))
        for index, table in enumerate(info.tables)
    ]
    return np.stack(columns, axis=1).reshape(-1)


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
        rows_of, wanted = _keys(info, history), _keys(info, candidates)
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
    return _info


@pytest.fixture(scope="session")
def make_requests() -> Callable[..., list[SimRequest]]:
    return _requests


@pytest.fixture(scope="session")
def costs() -> CostConstants:
    return CostConstants(0.5, 0.02, 1e-5, (0.05, 0.03))
