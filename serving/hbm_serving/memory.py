"""Where rows and KV come from: the pool, or (`cache: false`) the host tables alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from hbm_pool.device.staging import staging_ring
from hbm_pool.errors import RowStoreError
from hbm_pool.host.config import KVSpec, PoolConfig, TableSpec, WidthClass
from hbm_pool.host.file_store import CHECKSUM_BYTES, DEFAULT_BUFFER_BYTES, FileRowStore
from hbm_pool.host.link import LinkModel
from hbm_pool.host.row_store import RamRowStore, RowStore
from pydantic import ValidationError

from hbm_serving.config import Config, first_problem
from hbm_serving.errors import ConfigError
from hbm_serving.features import Ints
from hbm_serving.metrics import Sample
from hbm_serving.weights import DTYPES, draw_table, load_table


class Hold(Protocol):
    """A request's hold on its user's pages (`hbm_pool` calls it KVHandle)."""

    cached_tokens: int
    row_lag_s: float
    open: bool

    @property
    def ready(self) -> bool: ...

    @property
    def page_ids(self) -> npt.NDArray[np.int32]: ...


class RowCount(NamedTuple):
    """What one gather found."""

    accesses: int
    misses: int
    class_misses: tuple[int, ...]
    missed_at: tuple[npt.NDArray[np.integer], ...]
    """Places in the tables' ids of those for which rows were copied, `misses` in all; where several
    ask for a row, of one."""


class MemoryLayout(NamedTuple):
    """What the sidecar must know of the memory."""

    extents: int
    extent_bytes: int
    pages_per_extent: int
    slots: int
    """Row slots at the smallest α: how many the twin's sample is to be taken from."""
    classes: tuple[WidthClass, ...]
    table_class: tuple[int, ...]
    """Width class of every table."""


class Memory(Protocol):
    """Gather side: one thread. Commit and abort: the compute thread."""

    device: torch.device
    layout: MemoryLayout
    layer_pages: Sequence[torch.Tensor] | None
    model_version: int

    @property
    def alpha(self) -> float: ...
    def begin_batch(self) -> None: ...
    def idle(self) -> bool: ...
    def acquire(self, user: int, pages: npt.NDArray[np.uint32], tokens: int) -> Hold | None: ...
    def commit(self, hold: Hold) -> None: ...
    def abort(self, hold: Hold) -> None: ...
    def order_pages(self, holds: Sequence[Hold]) -> None: ...
    def gather(
        self, ids: Mapping[str, torch.Tensor], out: Mapping[str, torch.Tensor]
    ) -> RowCount: ...
    def set_target_alpha(self, alpha: float, *, drop_only: bool) -> None: ...
    def set_row_prices(self, row_ms: Sequence[float]) -> None: ...
    def set_refill_rate(self, bytes_per_s: float) -> None: ...
    def push_rows(self, table: str, ids: Ints, values: npt.NDArray[np.float32]) -> int: ...
    def set_model_version(self, version: int) -> None: ...
    def on_kv_event(self, callback: Callable[[int, int], None]) -> None: ...
    def shard_rows(self, shards: int) -> npt.NDArray[np.uint32]: ...
    def check_integrity(self) -> list[str]: ...
    def fill(self, record: npt.NDArray[Any]) -> None: ...
    def samples(self) -> Iterable[Sample]: ...
    def close(self) -> None: ...


def pool_config(config: Config) -> PoolConfig:
    """The pool's own view of the configuration. Raises `ConfigError` with one line."""
    model, pool = config.model, config.pool
    try:
        return PoolConfig(
            pool_bytes=pool.pool_bytes,
            extent_bytes=pool.extent_bytes,
            tables=tuple(
                TableSpec(name=t.name, rows=t.rows, width=t.width, dtype=t.dtype)
                for t in model.tables
            ),
            kv=KVSpec(
                layers=model.layers,
                heads=model.heads,
                head_dim=model.head_dim,
                page_tokens=pool.page_tokens,
                dtype=model.dtype,
            ),
            alpha=pool.alpha,
            alpha_min=pool.alpha_min,
            alpha_max=pool.alpha_max,
            max_batch_users=config.server.max_batch_requests,
            max_sequence_tokens=model.max_sequence_tokens,
            link_bytes_per_s=pool.link_bytes_per_s,
            refill_bytes_per_s=pool.refill_bytes_per_s,
            max_kv_row_lag_s=pool.max_kv_row_lag_s,
        )
    except ValidationError as error:
        raise ConfigError(f"pool: {first_problem(error)}") from error


def layout_of(pool: PoolConfig) -> MemoryLayout:
    """Sizes of a pool that follow from its configuration alone."""
    table_class = [0] * len(pool.tables)
    for index, kind in enumerate(pool.classes):
        for table in kind.tables:
            table_class[table] = index
    return MemoryLayout(
        pool.num_extents,
        pool.bytes_per_extent,
        pool.pages_per_extent,
        pool.min_emb_extents * min(kind.rows_per_extent for kind in pool.classes),
        pool.classes,
        tuple(table_class),
    )


def open_stores(config: Config, device: torch.device) -> dict[str, RowStore]:
    """The whole tables on the host: drawn from the seed, out of the weights file, or row files.

    Files are read through a ring of buffers, page-locked where `device` is a GPU.
    Raises `ConfigError`, naming the table, for a file that does not fit.
    """
    model, weights = config.model, config.server.weights
    stores: dict[str, RowStore] = {}
    for index, table in enumerate(model.tables):
        row_bytes = table.width * DTYPES[table.dtype].itemsize
        store: RowStore
        if table.file is not None:
            try:
                store = FileRowStore(table.file, buffers=_ring(device, row_bytes))
            except RowStoreError as error:
                raise ConfigError(f"model.tables[{index}].file: {error}") from error
            if (store.rows, store.row_bytes) != (table.rows, row_bytes):
                raise ConfigError(
                    f"model.tables[{index}].file: {table.file} holds {store.rows} rows of "
                    f"{store.row_bytes} bytes; table {table.name} has {table.rows} of {row_bytes}"
                )
        else:
            rows = None if weights is None else load_table(model, index, weights)
            if rows is None:
                drawn = torch.from_numpy(draw_table(model, index, config.server.seed))
                rows = drawn.to(DTYPES[table.dtype])
            store = RamRowStore(rows.contiguous().view(torch.uint8).numpy(), table.name)
        stores[table.name] = store
    return stores


def _ring(device: torch.device, row_bytes: int) -> list[npt.NDArray[np.uint8]]:
    return staging_ring(device, buffer_bytes=max(DEFAULT_BUFFER_BYTES, row_bytes + CHECKSUM_BYTES))


def open_memory(config: Config, device: torch.device) -> Memory:
    """Reserves the pool, or with `cache: false` only opens the tables.

    Raises `ConfigError`, and `hbm_pool.ArenaMemoryError` when the device has not enough memory.
    """
    pool = pool_config(config)
    stores = open_stores(config, device)
    if not config.server.cache:
        from hbm_serving.uncached import HostMemory

        link = LinkModel(config.pool.link_bytes_per_s)
        return HostMemory(config.model, stores, layout_of(pool), device, link)
    from hbm_serving.pooled import PooledMemory

    return PooledMemory(pool, stores, layout_of(pool), device)


def as_row_bytes(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.uint8]:
    """Float rows as a store holds them, `[n, width] float32` -> `[n, row_bytes] uint8`."""
    rows = torch.from_numpy(values).to(DTYPES[dtype]).contiguous()
    return rows.view(torch.uint8).numpy()
