"""A server so small that everything in it fills up and evicts within a few hundred requests."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.history import table_rows
from hbm_pool.contracts.identity import row_keys
from hbm_pool.contracts.records import CostModel, RowClass, ServerInfo, TableMap


def small_server(**fields: Any) -> ServerInfo:
    """64 extents of 4 pages of 4 tokens, two width classes; but for `fields`."""
    values: dict[str, Any] = {
        "node": "n",
        "model": "m",
        "extents": 64,
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


def keys_of(info: ServerInfo, items: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Row keys of items, item by item, of each table in turn."""
    columns = [
        row_keys(index, table_rows(items, index, table.rows, table.hashed))
        for index, table in enumerate(info.tables)
    ]
    return np.stack(columns, axis=1).reshape(-1)
