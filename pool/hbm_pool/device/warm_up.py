"""Compiles the pool's kernels before the first request.

Kernels are compiled when they are first called, and the first call of many of them is the first
move of α: under load, seconds to half a minute in which nobody is served.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import torch

from hbm_pool.device.pool import Pool
from hbm_pool.host.config import KVSpec, PoolConfig, TableSpec
from hbm_pool.host.file_store import FileRowStore, create_file
from hbm_pool.host.row_store import RamRowStore, RowStore

_ROWS: Final = 4096
_MANY_ROWS: Final = 1 << 18
"""So many for the slots of the small pool that accesses are not counted row by row."""
_WIDTHS: Final = {"narrow": 16, "wide": 64, "second": 16}
"""Two width classes, of which one holds two tables."""
_PAGE: Final = 16
_STEPS: Final = 10_000
"""Batch boundaries within which a move of this small pool has ended; it takes some tens."""


def compile_kernels() -> None:
    """Runs everything a pool does once, on a small pool of its own in memory.

    Call it before the server says that it is ready: on a machine that has never run this version
    it takes half a minute, later (numba's cache, `NUMBA_CACHE_DIR`) a fraction of a second.
    """
    with TemporaryDirectory(prefix="hbm-") as directory:
        file = Path(directory) / "rows"
        create_file(file, _ROWS, _WIDTHS["wide"] * 4, _draw)
        wide = FileRowStore(file)
        try:
            _run(
                {
                    "narrow": RamRowStore(np.zeros((_ROWS, _WIDTHS["narrow"]), np.float32)),
                    "wide": wide,
                    "second": RamRowStore(np.zeros((_MANY_ROWS, _WIDTHS["second"]), np.float32)),
                }
            )
        finally:
            wide.close()


def _draw(start: int, stop: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.zeros((stop - start, _WIDTHS["wide"]), np.float32)


def _run(stores: Mapping[str, RowStore]) -> None:
    config = PoolConfig(
        pool_bytes=1 << 20,
        extent_bytes=8 << 10,
        tables=tuple(
            TableSpec(name=name, rows=store.rows, width=_WIDTHS[name])
            for name, store in stores.items()
        ),
        kv=KVSpec(layers=1, heads=1, head_dim=16, page_tokens=_PAGE, dtype="float32"),
        max_batch_users=1,
        max_sequence_tokens=4 * _PAGE,
        refill_bytes_per_s=1e9,
    )
    seconds = itertools.count()  # every look at the clock is a second later: all upkeep is due
    with Pool(config, stores, background=False, clock_s=lambda: float(next(seconds))) as pool:
        for offset in (0, 0, _ROWS // 2):  # misses, hits, and more rows than there is room for
            _gather(pool, offset)
        pool.emb.prefetch({name: torch.arange(8) for name in stores})
        for name, width in _WIDTHS.items():
            pool.emb.push_rows(name, torch.arange(4), torch.zeros(4, width))
        _serve_user(pool)
        for alpha, drop_only in ((0.3, False), (0.7, False), (0.3, True), (0.5, False)):
            _gather(pool, 0)
            pool.set_target_alpha(alpha, drop_only=drop_only)
            for _ in range(_STEPS):
                pool.begin_batch()
                if not pool.moving:
                    break
            for _ in _WIDTHS:  # after a growth there are slots to refill
                pool.refiller.step()
            _gather(pool, _ROWS // 4)
        pool.emb.set_row_prices([1.0] * len(config.classes))
        pool.emb.rebalance(config.slice_budget_us)
        pool.emb.shard_rows(4)
        pool.emb.resident_ids("wide")
        pool.stats()
        pool.check_integrity()
        pool.emb.reset()


def _gather(pool: Pool, offset: int) -> None:
    ids = torch.arange(offset, offset + _ROWS // 2)
    out = {name: torch.empty(len(ids), width) for name, width in _WIDTHS.items()}
    pool.emb.gather(dict.fromkeys(_WIDTHS, ids), out)


def _serve_user(pool: Pool) -> None:
    fingerprints = np.arange(4, dtype=np.uint32)
    for _ in range(2):
        handle = pool.kv.acquire(1, fingerprints, 4 * _PAGE)
        pool.kv.batch_indices([handle])
        pool.kv.commit(handle)
    pool.kv.evict(1)
