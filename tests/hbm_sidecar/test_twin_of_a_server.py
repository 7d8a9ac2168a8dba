"""What the twin makes of a real model server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hbm_policy import CostConstants, DeclaredCosts, PriceState, RlsAdapter
from hbm_policy.twin import Twin
from hbm_pool.contracts.control_block import ServerView
from hbm_pool.contracts.records import CURVES, TELEMETRY
from hbm_serving.config import load_config
from hbm_serving.engine import Engine
from hbm_serving.features import RankRequest

REQUESTS = 200
COSTS = CostConstants(0.5, 0.02, 1e-5, (0.05, 0.03))
"""The same for both servers: each measures its own."""


def requests() -> list[RankRequest]:
    """Users with growing histories over a skewed catalogue: both caches hit and evict."""
    random = np.random.default_rng(5)
    histories: dict[int, np.ndarray] = {}
    made = []
    for at in range(REQUESTS):
        user = int(random.integers(1, 30))
        history = histories.get(user, np.empty(0, np.int64))
        new = (random.pareto(1.0, int(random.integers(4, 12))) * 40).astype(np.int64) % 8000
        history = np.concatenate([history, new])[:60]
        histories[user] = history
        times = np.arange(len(history)) * 1000
        candidates = random.integers(0, 8000, 8)
        made.append(RankRequest(user, history, times, None, candidates, at, len(history)))
    return made


async def served(run_dir: Path, alpha: float) -> tuple[np.void, float, float]:
    """The twin's curves of a server that runs at α, and its own hit ratios: KV, EMB."""
    engine = Engine(load_config("tiny", {"pool.alpha": alpha}), run_dir=run_dir)
    view = ServerView.open(run_dir)
    view.read_requests(0)
    engine.start()
    try:
        for request in requests():
            await engine.rank(request)
    finally:
        engine.close()
    samples, lost = view.read_requests(2 * REQUESTS)
    assert (len(samples), lost) == (REQUESTS, 0)
    twin = Twin(view.info, clock_ns=lambda: 1)
    twin.feed(samples, lost, COSTS)
    curves = np.zeros((), CURVES)
    twin.curves(curves)
    seen = np.zeros((), TELEMETRY)
    assert view.read_telemetry(seen)
    kv = float(seen["kv_hits"]) / float(seen["kv_lookups"])
    return curves, kv, float(seen["emb_hits"]) / float(seen["emb_accesses"])


async def test_the_curve_is_the_same_whatever_alpha_the_server_runs_at(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    low, low_kv, low_emb = await served(tmp_path_factory.mktemp("low"), 0.15)
    high, high_kv, high_emb = await served(tmp_path_factory.mktemp("high"), 0.65)
    # The servers themselves lived very different lives.
    assert low_kv > high_kv + 0.05
    assert high_emb > low_emb + 0.05
    assert low["requests"] == REQUESTS
    assert low.tobytes() == high.tobytes()
    points = int(low["points"])
    assert np.ptp(low["cost_ms"][:points]) > 0.02 * low["cost_ms"][0], "candidates differ"
    assert low["kv_hit_ratio"][0] == pytest.approx(low_kv, abs=0.15)


async def test_prices_are_learned_from_a_real_servers_batches(tmp_path: Path) -> None:
    engine = Engine(load_config("tiny", {"pool.alpha": 0.4}), run_dir=tmp_path)
    view = ServerView.open(tmp_path)
    seen, adapter = np.zeros((), TELEMETRY), RlsAdapter()
    engine.start()
    try:
        for request in requests():
            await engine.rank(request)
            if view.read_telemetry(seen):
                costs = adapter.constants(seen)
    finally:
        engine.close()
    assert view.read_telemetry(seen)
    assert costs is not None
    assert adapter.state is PriceState.LEARNED
    assert adapter.batches > REQUESTS / 2
    assert int(seen["context_tokens"]) > int(seen["kv_tokens_computed"])
    # The pool has counted the calibration at start too.
    assert 0 < int(seen["timed_accesses"]) <= int(seen["emb_accesses"])
    assert 0 < int(seen["timed_misses"].sum()) <= int(seen["class_misses"].sum())
    declared = DeclaredCosts().constants(seen)
    assert declared is not None
    for ours, theirs in zip(
        (*costs[:3], *costs.row_ms), (*declared[:3], *declared.row_ms), strict=True
    ):
        assert theirs / 4.1 <= ours <= theirs * 4.1
