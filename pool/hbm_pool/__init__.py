"""One arena of HBM for two caches. `import hbm_pool` never imports torch.

Public names are loaded when they are first used; those of `hbm_pool.device` need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbm_pool.device.arena import Arena as Arena
    from hbm_pool.device.embedding import EmbeddingCache as EmbeddingCache
    from hbm_pool.device.kv import KVCache as KVCache
    from hbm_pool.device.kv import KVIndices as KVIndices
    from hbm_pool.device.pool import Pool as Pool
    from hbm_pool.device.refill import Refiller as Refiller
    from hbm_pool.device.row_counters import GatherStats as GatherStats
    from hbm_pool.device.warm_up import compile_kernels as compile_kernels
    from hbm_pool.errors import ArenaMemoryError as ArenaMemoryError
    from hbm_pool.errors import ExtentError as ExtentError
    from hbm_pool.errors import HandleError as HandleError
    from hbm_pool.errors import PoolError as PoolError
    from hbm_pool.errors import RowStoreError as RowStoreError
    from hbm_pool.host.config import KVSpec as KVSpec
    from hbm_pool.host.config import PoolConfig as PoolConfig
    from hbm_pool.host.config import TableSpec as TableSpec
    from hbm_pool.host.extents import ExtentLedger as ExtentLedger
    from hbm_pool.host.file_store import FileRowStore as FileRowStore
    from hbm_pool.host.kv_handle import KVHandle as KVHandle
    from hbm_pool.host.kv_handle import KVStatus as KVStatus
    from hbm_pool.host.link import LinkModel as LinkModel
    from hbm_pool.host.plan import MemoryPlan as MemoryPlan
    from hbm_pool.host.plan import plan_memory as plan_memory
    from hbm_pool.host.row_store import RamRowStore as RamRowStore
    from hbm_pool.host.row_store import RowStore as RowStore
    from hbm_pool.host.stats import PoolStats as PoolStats

_HOMES = {
    "Arena": "hbm_pool.device.arena",
    "ArenaMemoryError": "hbm_pool.errors",
    "EmbeddingCache": "hbm_pool.device.embedding",
    "ExtentError": "hbm_pool.errors",
    "ExtentLedger": "hbm_pool.host.extents",
    "FileRowStore": "hbm_pool.host.file_store",
    "GatherStats": "hbm_pool.device.row_counters",
    "HandleError": "hbm_pool.errors",
    "KVCache": "hbm_pool.device.kv",
    "KVHandle": "hbm_pool.host.kv_handle",
    "KVIndices": "hbm_pool.device.kv",
    "KVSpec": "hbm_pool.host.config",
    "KVStatus": "hbm_pool.host.kv_handle",
    "LinkModel": "hbm_pool.host.link",
    "MemoryPlan": "hbm_pool.host.plan",
    "Pool": "hbm_pool.device.pool",
    "PoolConfig": "hbm_pool.host.config",
    "PoolError": "hbm_pool.errors",
    "PoolStats": "hbm_pool.host.stats",
    "RamRowStore": "hbm_pool.host.row_store",
    "Refiller": "hbm_pool.device.refill",
    "RowStore": "hbm_pool.host.row_store",
    "RowStoreError": "hbm_pool.errors",
    "TableSpec": "hbm_pool.host.config",
    "compile_kernels": "hbm_pool.device.warm_up",
    "plan_memory": "hbm_pool.host.plan",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'hbm_pool' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
