"""The arrays of a `Tz` as one array of addresses and sizes, and back inside compiled code.

A compiled function unboxes every array it is given, thirteen for a `Tz` at .4 us each: more than
most calls do. Handed over as one table they cost nothing. Whoever makes a table keeps the arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from hbm_pool.host.tz_kernel import Tz

Table = npt.NDArray[np.uint64]


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typingctx: Any, address: Any) -> Any:
    """An address as an untyped pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.uintp), generate


def table_of(arrays: Iterable[npt.NDArray[Any]]) -> Table:
    """Address and size of each array, `[2 n] uint64`."""
    pairs = [value for array in arrays for value in (array.ctypes.data, array.size)]
    return np.array(pairs, np.uint64)


@numba.njit(nogil=True, cache=True, forceinline=True)  # type: ignore[untyped-decorator]
def array_of(table: Table, number: int, dtype: Any) -> Any:
    """Array `number` of a table."""
    size = np.int64(table[2 * number + 1])
    return numba.carray(pointer(np.uintp(table[2 * number])), (size,), dtype)


@numba.njit(nogil=True, cache=True, forceinline=True)  # type: ignore[untyped-decorator]
def tz_of(table: Table) -> Tz:
    """The `Tz` at the beginning of a table."""
    return Tz(
        array_of(table, 0, np.uint32),
        array_of(table, 1, np.int64),
        array_of(table, 2, np.uint32),
        array_of(table, 3, np.int32),
        array_of(table, 4, np.int32),
        array_of(table, 5, np.int8),
        array_of(table, 6, np.int32),
        array_of(table, 7, np.int32),
        array_of(table, 8, np.int32),
        array_of(table, 9, np.int32),
        array_of(table, 10, np.int64),
        array_of(table, 11, np.int64),
        array_of(table, 12, np.int64),
    )
