"""What callers hand to the embedding cache, checked before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
import torch

from hbm_pool.device.arena import Arena
from hbm_pool.device.row_index import Keys
from hbm_pool.device.width_class import EmbClass, IndexKind, Table
from hbm_pool.host.config import PoolShape
from hbm_pool.host.row_copies import any_outside
from hbm_pool.host.row_store import RowStore

DEVICE_INDEX_SHARE: Final = 0.05
"""A device index may take this share of the arena's bytes on top of it, else the host keeps it."""


class RowRequest(NamedTuple):
    """Rows of one table for one batch."""

    kind: EmbClass
    table: Table
    ids: torch.Tensor
    out: torch.Tensor


def row_request(
    kind: EmbClass, table: Table, ids: torch.Tensor, out: Mapping[str, torch.Tensor] | None
) -> RowRequest:
    """Raises ValueError for ids that do not exist or a buffer that does not fit; `ids` contiguous.

    Ids on a GPU are not looked at: that would wait for it. The device index takes those that do
    not exist for row 0.
    """
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(
            f"ids of table {table.name!r} are {list(ids.shape)} {ids.dtype}; they must be [n] int64"
        )
    size = ids.shape[0]
    if ids.is_cpu and any_outside(ids.data_ptr(), size, table.rows):
        raise _outside(table, ids)
    if out is None:
        return RowRequest(kind, table, ids, ids)
    buffer = out.get(table.name)
    if buffer is None:
        raise ValueError(f"there is no buffer for the rows of table {table.name!r}")
    fits = buffer.shape == (size, kind.kind.width) and buffer.dtype == kind.dtype
    if not (fits and buffer.device == kind.device and buffer.is_contiguous()):
        raise ValueError(
            f"the buffer of table {table.name!r} is {list(buffer.shape)} {buffer.dtype} on "
            f"{buffer.device}; it must be contiguous, {[size, kind.kind.width]} {kind.dtype} on "
            f"{kind.device}"
        )
    return RowRequest(kind, table, ids, buffer)


def pushed_rows(
    kind: EmbClass, table: Table, ids: torch.Tensor | Keys, values: torch.Tensor
) -> tuple[Keys, torch.Tensor]:
    """Keys, ascending and distinct, and their rows in host memory; of an id given twice the last.

    Raises ValueError for ids that do not exist or values that do not fit.
    """
    numbers = np.asarray(ids.cpu() if isinstance(ids, torch.Tensor) else ids)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"pushed ids of table {table.name!r} are {numbers.shape} {numbers.dtype}; they must be "
            "[n] int64"
        )
    numbers = np.ascontiguousarray(numbers, np.int64)
    shape = [numbers.size, kind.kind.width]
    if list(values.shape) != shape or values.dtype != kind.dtype:
        raise ValueError(
            f"pushed values of table {table.name!r} are {list(values.shape)} {values.dtype}; they "
            f"must be {shape} {kind.dtype}"
        )
    given = torch.from_numpy(numbers)
    if any_outside(given.data_ptr(), numbers.size, table.rows):
        raise _outside(table, given)
    distinct, from_end = np.unique(numbers[::-1], return_index=True)
    newest = torch.from_numpy(numbers.size - 1 - from_end)
    return distinct + table.first_key, values.detach().cpu()[newest].contiguous()


def _outside(table: Table, ids: torch.Tensor) -> ValueError:
    wrong = int(ids[(ids < 0) | (ids >= table.rows)][0])
    return ValueError(f"table {table.name!r} has no row {wrong}; its rows are 0..{table.rows - 1}")


def index_for(shape: PoolShape, arena: Arena) -> IndexKind:
    """On the GPU if the arena is and the index is small beside it, else on the host."""
    if arena.device.type != "cuda":
        return "host"
    from hbm_pool.device.device_index import index_bytes

    needed = sum(
        index_bytes(kind.catalogue_rows, arena.num_extents * kind.rows_per_extent)
        for kind in shape.classes
    )
    return "device" if needed <= DEVICE_INDEX_SHARE * arena.nbytes else "host"


def check_stores(shape: PoolShape, stores: Mapping[str, RowStore]) -> None:
    """Raises ValueError unless there is one store per table, of the table's size."""
    names = {table.name for table in shape.tables}
    if names != set(stores):
        raise ValueError(
            f"there are stores for {sorted(stores)} and tables {sorted(names)}; give one store "
            "per table"
        )
    for table in shape.tables:
        store = stores[table.name]
        if store.rows != table.rows or store.row_bytes != table.row_bytes:
            raise ValueError(
                f"table {table.name!r} has {table.rows} rows of {table.row_bytes} bytes, its store "
                f"{store.rows} of {store.row_bytes}"
            )
