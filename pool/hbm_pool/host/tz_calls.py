"""What `TzCache` calls: functions of the kernel over a table of addresses, inputs checked.

See `tz_table` for why. `WRONG` results say which of the inputs is wrong; nothing has happened then.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt

from hbm_pool.host import tz_batch, tz_extents, tz_kernel
from hbm_pool.host.tz_kernel import NOWHERE
from hbm_pool.host.tz_table import Table, tz_of

Keys = npt.NDArray[np.int64]
Slots = npt.NDArray[np.int64]
Extents = npt.NDArray[np.int32]

FINE: Final = -1


def _call(function: Any) -> Any:
    return numba.njit(function, nogil=True, cache=True, error_model="numpy")


@_call
def first_outside(keys: Keys, num_keys: int) -> int:
    """Place of the first key that is not in 0..num_keys-1, else FINE."""
    for i in range(keys.size):
        if keys[i] < 0 or keys[i] >= num_keys:
            return i
    return FINE


@_call
def lookup_many(table: Table, keys: Keys, slots: Slots) -> int:
    hits: int = tz_batch.lookup_many(tz_of(table), keys, slots)
    return hits


@_call
def insert_many(table: Table, keys: Keys, scratch: npt.NDArray[np.int64]) -> int:
    """`scratch` is `[4, n]`: slots, sources, targets, and what the kernel needs."""
    copies: int = tz_batch.insert_many(
        tz_of(table), keys, scratch[0], scratch[1], scratch[2], scratch[3]
    )
    return copies


@_call
def slots_of(table: Table, keys: Keys, slots: Slots) -> None:
    tz_batch.slots_of(tz_of(table), keys, slots)


@_call
def fill_many(table: Table, keys: Keys, slots: Slots) -> None:
    tz_batch.fill_many(tz_of(table), keys, slots)


@_call
def discard_many(table: Table, keys: Keys) -> int:
    done: int = tz_batch.discard_many(tz_of(table), keys)
    return done


@_call
def free_slots(table: Table) -> int:
    unused: int = tz_kernel.free_slots(tz_of(table))
    return unused


@_call
def grow(table: Table, extents: Extents) -> int:
    """Place of the first extent that does not exist or is held already, else FINE."""
    tz = tz_of(table)
    for i in range(extents.size):
        extent = extents[i]
        if extent < 0 or extent >= tz.zone.size or tz.zone[extent] != NOWHERE:
            return i
    tz_extents.grow(tz, extents)
    return FINE


@_call
def plan_shrink(table: Table, count: int) -> int:
    marked: int = tz_extents.plan_shrink(tz_of(table), count)
    return marked


@_call
def cancel_shrink(table: Table, scratch: Extents) -> int:
    kept: int = tz_extents.cancel_shrink(tz_of(table), scratch)
    return kept


@_call
def drain_rows(
    table: Table, limit: int, scratch: npt.NDArray[np.int64], released: Extents
) -> tuple[int, int, int]:
    """`scratch` is `[3, limit]`: sources, targets, and what the kernel needs."""
    done: tuple[int, int, int] = tz_extents.drain_rows(
        tz_of(table), limit, scratch[0], scratch[1], scratch[2], released
    )
    return done


@_call
def drop(table: Table, count: int, released: Extents) -> int:
    given: int = tz_extents.drop(tz_of(table), count, released)
    return given
