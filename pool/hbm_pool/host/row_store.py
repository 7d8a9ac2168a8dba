"""Whole embedding tables outside the GPU: in memory, or in a file larger than memory.

A store knows bytes, not element types: row r is `row_bytes` bytes. `read` is called by several
threads at once, without any lock of the caches.
"""

from __future__ import annotations

from typing import Any, Protocol

import numba
import numpy as np
import numpy.typing as npt

from hbm_pool.errors import RowStoreError

Ids = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class RowStore(Protocol):
    """One table. Reads and writes of different rows may run at the same time; of a row that is
    read while it is written, a reader gets the old or the new one, or (memory only) a mixture:
    the cache above hands readers the pushed values until the write has finished."""

    @property
    def rows(self) -> int:
        """Rows of the table."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""

    def read(self, ids: Ids, out: Bytes) -> None:
        """Copies rows `ids`, `[n]`, into `out`, `[n, row_bytes] uint8`. Raises RowStoreError."""

    def write(self, ids: Ids, values: Bytes) -> None:
        """Replaces rows `ids`, distinct, by `values`, `[n, row_bytes] uint8`."""

    def close(self) -> None:
        """Gives back files and threads."""


class RamRowStore:
    """A table in host memory; the array is used as it is, not copied."""

    def __init__(self, table: npt.NDArray[Any], name: str = "table") -> None:
        if table.ndim != 2 or 0 in table.shape:
            raise RowStoreError(
                f"{name}: a table is [rows, width], both at least 1; got {table.shape}"
            )
        if not table.flags.c_contiguous:
            raise RowStoreError(f"{name}: rows must be contiguous; pass numpy.ascontiguousarray(…)")
        self._table: Bytes = table.view(np.uint8).reshape(table.shape[0], -1)
        self._rows, self._row_bytes = self._table.shape
        self._name = name

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def row_bytes(self) -> int:
        return self._row_bytes

    def read(self, ids: Ids, out: Bytes) -> None:
        check_request(self._name, self, ids, out)
        # mode="clip" writes straight into `out`; the ids have been checked.
        np.take(self._table, ids, axis=0, out=out, mode="clip")

    def write(self, ids: Ids, values: Bytes) -> None:
        check_request(self._name, self, ids, values)
        self._table[ids] = values

    def close(self) -> None:
        """There is nothing to give back."""


def check_request(name: str, store: RowStore, ids: Ids, rows: Bytes) -> None:
    """Raises RowStoreError unless `rows` is `[len(ids), row_bytes] uint8` and every id exists."""
    wanted = (ids.size, store.row_bytes)
    if rows.shape != wanted or rows.dtype != np.uint8:
        raise RowStoreError(
            f"{name}: {ids.size} rows of {store.row_bytes} bytes need a buffer of {wanted} uint8; "
            f"got {rows.shape} {rows.dtype}"
        )
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= store.rows):
        worst = int(ids.max()) if int(ids.max()) >= store.rows else int(ids.min())
        raise RowStoreError(f"{name}: row {worst} is outside 0..{store.rows - 1}")


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _seeded(seed: np.uint64, start: int, out: npt.NDArray[np.float32]) -> None:
    scale = np.float32(1.0 / (1 << 23))
    for i in range(out.shape[0]):
        first = np.uint64(start + i) * np.uint64(out.shape[1])
        for j in range(out.shape[1]):
            word = (first + np.uint64(j)) * np.uint64(0x9E3779B97F4A7C15) + seed
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            word ^= word >> np.uint64(31)
            out[i, j] = np.float32(word >> np.uint64(40)) * scale - np.float32(1.0)


def seeded_rows(seed: int, start: int, stop: int, width: int) -> npt.NDArray[np.float32]:
    """Rows start..stop-1 of a table drawn from a seed, `[stop - start, width] float32` in [-1, 1).

    A row's values depend on the seed and its number alone (splitmix64 as a counter), so that a
    part of a table can be drawn without the rest.
    """
    out = np.empty((stop - start, width), np.float32)
    _seeded(np.uint64(seed & ((1 << 64) - 1)), start, out)
    return out
