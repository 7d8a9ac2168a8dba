"""One width class at work: its tables, its index over the arena, its demand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from hbm_pool.device.arena import Arena
from hbm_pool.device.host_index import HostRowIndex
from hbm_pool.device.row_index import Keys, RowIndex
from hbm_pool.errors import RowStoreError
from hbm_pool.host.class_shares import ClassDemand
from hbm_pool.host.config import MIN_CLASS_EXTENTS, PoolShape, WidthClass
from hbm_pool.host.push_log import PushLog
from hbm_pool.host.recent_counts import RecentCounts
from hbm_pool.host.row_store import RowStore

IndexKind = Literal["host", "device"]
RECENT_ROWS: Final = 1 << 16
"""Accesses after which the weight of older ones is halved."""
PROBATION_SPARE: Final = 1.12
"""Extents ÷ extents of the whole catalogue beyond which more would stay unused: rows that were
never hit twice live in probation, a tenth."""
ROW_PRICE_BYTES: Final = 512
"""A missed row costs its bytes and, as a request of its own, as much as this many more."""

CANDIDATE_ROWS: Final = 4096
"""Rows the refiller asks about at a time."""
SWEEP_STEP: Final = 1 << 15
SWEEP_PLACES: Final = 1 << 19
"""Counts it looks at, at a time and before it rests."""


class Table:
    """One embedding table inside its class: keys `first_key .. first_key + rows - 1`."""

    def __init__(self, name: str, number: int, first_key: int, store: RowStore) -> None:
        self.name = name
        self.number = number
        self.first_key = first_key
        self.store = store
        self.rows = store.rows


class EmbClass:
    """Everything the cache keeps per width class; guarded by the cache's lock."""

    def __init__(
        self,
        number: int,
        kind: WidthClass,
        shape: PoolShape,
        arena: Arena,
        stores: Mapping[str, RowStore],
        index: IndexKind,
    ) -> None:
        self.number = number
        self.kind = kind
        self.arena_rows = arena.rows(kind.row_bytes, kind.dtype, kind.width)
        self.dtype = self.arena_rows.dtype
        self.device = self.arena_rows.device
        self.row_bytes = kind.width * self.dtype.itemsize
        self.tables: list[Table] = []
        first_key = 0
        for table in kind.tables:
            spec = shape.tables[table]
            store = stores[spec.name]
            self.tables.append(Table(spec.name, table, first_key, store))
            first_key += spec.rows
        self.num_keys = first_key
        whole = self.num_keys / kind.rows_per_extent
        self._most_extents = math.ceil(whole * PROBATION_SPARE) + 1
        self._table_bytes = self.num_keys * self.row_bytes
        self.index: RowIndex = self._make_index(index, arena)
        self.counts = RecentCounts(self.arena_rows.shape[0], self.num_keys)
        self.price = float(self.row_bytes + ROW_PRICE_BYTES)
        self.accesses = 0
        self.misses = 0
        self._recent_accesses = 0.0
        self._recent_misses = 0.0
        self._ghosts_before = 0.0

    def _make_index(self, index: IndexKind, arena: Arena) -> RowIndex:
        sizes = (self.num_keys, self.kind.rows_per_extent, arena.num_extents)
        if index == "device":
            from hbm_pool.device.device_index import DeviceRowIndex

            return DeviceRowIndex(*sizes, self.arena_rows)
        return HostRowIndex(*sizes, self.arena_rows)

    @property
    def num_extents(self) -> int:
        """Extents held, those being emptied included."""
        return self.index.num_extents + self.index.draining_extents

    def count(self, accesses: int, misses: int) -> None:
        """Counts one batch; older ones fade."""
        self.accesses += accesses
        self.misses += misses
        self._recent_accesses += accesses
        self._recent_misses += misses
        if self._recent_accesses > 2 * RECENT_ROWS:
            self._recent_accesses /= 2
            self._recent_misses /= 2
            self._ghosts_before += self._recent_ghosts() / 2

    def _recent_ghosts(self) -> float:
        return self.index.ghost_hits - self._ghosts_before

    def demand(self) -> ClassDemand:
        """What the division of extents among the classes goes by."""
        return ClassDemand(
            extents=self.index.num_extents,
            price=self.price,
            ghost_hits=self._recent_ghosts(),
            misses=self._recent_misses,
            most=self._most_extents,
            least=MIN_CLASS_EXTENTS,
            table_bytes=self._table_bytes,
        )

    def absent(self, limit: int) -> Keys:
        """Rows that are not in the cache, hottest first, at most `limit`, for the refiller.

        Looks at `SWEEP_PLACES` counts and goes on from there at the next call. Not guarded by the
        cache's lock: what is in the cache may have changed when a row is copied.
        """
        found: list[Keys] = []
        chosen, places = 0, min(SWEEP_PLACES, self.counts.cycle)
        while chosen < limit and places > 0:
            keys, looked = self.counts.sweep(CANDIDATE_ROWS, min(SWEEP_STEP, places))
            keys = keys[~self.index.contains(keys)]
            found.append(keys)
            chosen += keys.size
            places -= looked
        return np.concatenate(found)[:limit]

    def staging(self, count: int) -> torch.Tensor:
        """A host buffer for `count` rows, page-locked where a GPU reads it."""
        return torch.empty(
            (count, self.kind.width), dtype=self.dtype, pin_memory=self.device.type == "cuda"
        )

    def on_device(self, staged: torch.Tensor) -> torch.Tensor:
        """The staged rows on the arena's device; on CPU they are there already."""
        return staged.to(self.device, non_blocking=True)

    def read(self, keys: Keys, into: npt.NDArray[np.uint8]) -> None:
        """Reads rows, `[n]` keys of any of the class's tables, from their stores.

        Raises RowStoreError, whatever the store raised.
        """
        left = keys.size
        for table in self.tables:
            if left == 0:
                return
            own = (keys >= table.first_key) & (keys < table.first_key + table.rows)
            found = int(np.count_nonzero(own))
            if found == 0:
                continue
            left -= found
            ids = keys[own] - table.first_key
            if found == keys.size:
                _read(table, ids, into)
            else:
                part = np.empty((found, self.row_bytes), np.uint8)
                _read(table, ids, part)
                into[own] = part


class Fetch:
    """Missed rows of one class on their way from the store into buffers and cache."""

    def __init__(self, kind: EmbClass, keys: Keys) -> None:
        self.kind = kind
        self.keys = keys
        self.staged = kind.staging(keys.size)
        self._bytes: npt.NDArray[np.uint8] = as_bytes(self.staged)

    @property
    def nbytes(self) -> int:
        return int(self._bytes.nbytes)

    def read(self) -> None:
        """Reads all rows; no lock is held."""
        self.kind.read(self.keys, self._bytes)

    def read_again(self, places: npt.NDArray[np.int64]) -> None:
        """Reads some of them once more."""
        again = np.empty((places.size, self.kind.row_bytes), np.uint8)
        self.kind.read(self.keys[places], again)
        self._bytes[places] = again

    def patch(self, pushes: PushLog, ticket: int) -> npt.NDArray[np.int64]:
        """Takes over what was pushed meanwhile; returns the places to be read again."""
        return pushes.patch(ticket, self.kind.number, self.keys, self._bytes).suspect

    def rows(self) -> torch.Tensor:
        """The rows on the arena's device, `[n, width]`."""
        return self.kind.on_device(self.staged)


def as_bytes(rows: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Contiguous rows of a CPU tensor as `[n, row_bytes] uint8`, without a copy."""
    view: npt.NDArray[np.uint8] = rows.view(torch.uint8).numpy()
    return view


def _read(table: Table, ids: Keys, into: npt.NDArray[np.uint8]) -> None:
    try:
        table.store.read(ids, into)
    except RowStoreError:
        raise
    except Exception as error:
        raise RowStoreError(
            f"table {table.name!r}: {ids.size} rows could not be read ({error})"
        ) from error
