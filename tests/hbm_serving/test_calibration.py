"""Prices measured at start are positive, bounded in time and see the link model."""

from __future__ import annotations

import numpy as np
import pytest
from hbm_pool.contracts.records import TELEMETRY
from hbm_serving.config import Config, load_config
from hbm_serving.engine import Engine


def test_row_prices_are_those_of_the_link() -> None:
    """A row of 64 bytes at 1 MB/s takes 64 µs, one of 32 bytes half as long; code comes on top."""
    engine = Engine(load_config("tiny", {"pool.link_bytes_per_s": 1e6, "server.calibrate_s": 1.0}))
    try:
        wide, narrow = engine.costs.constants.row_ms
        assert wide >= 0.5 * 0.064
        assert 0.5 * 0.032 <= narrow < wide
    finally:
        engine.close()


@pytest.mark.parametrize("cache", [True, False])
def test_all_prices_are_positive_and_published(config: Config, cache: bool) -> None:
    server = config.server.model_copy(update={"cache": cache})
    engine = Engine(config.model_copy(update={"server": server}))
    try:
        constants = engine.costs.constants
        assert constants.fixed_ms > 0.0
        assert min(constants.row_ms) > 0.0
        assert constants.token_ms + constants.token_context_ms > 0.0
        record = np.zeros((), dtype=TELEMETRY)
        engine._fill(record)
        assert record["cost_fixed_ms"] == constants.fixed_ms
        assert record["cost_row_ms"].tolist() == [*constants.row_ms, 0.0, 0.0]
    finally:
        engine.close()
