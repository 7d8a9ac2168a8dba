"""`TzCache`: one cache under the TZ rule, and the functions it is made of.

The pool, the twin and the simulator all run these functions. A twin that keeps K virtual caches
calls them in its own compiled loop: `allocate` each, `stack_of` them, and inside the loop
`access(at(stack, k), key)`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import tz_calls
from . import tz_kernel as kernel
from .tz_batch import (
    access_many,
    discard_many,
    fill_many,
    insert_many,
    lookup_many,
    slots_of,
)
from .tz_extents import cancel_shrink, drain_rows, drop, grow, plan_shrink, violations
from .tz_kernel import (
    MAX_KEYS,
    NOWHERE,
    Tz,
    access,
    allocate,
    at,
    free_slots,
    insert,
    lookup,
    probation_extents,
    stack_of,
    touch,
)
from .tz_table import table_of

__all__ = [
    "MAX_KEYS",
    "Tz",
    "TzCache",
    "TzCounters",
    "access",
    "access_many",
    "allocate",
    "at",
    "cancel_shrink",
    "discard_many",
    "drain_rows",
    "drop",
    "fill_many",
    "free_slots",
    "grow",
    "insert",
    "insert_many",
    "lookup",
    "lookup_many",
    "plan_shrink",
    "probation_extents",
    "slots_of",
    "stack_of",
    "touch",
    "violations",
]

DIRECT_MAP_LIMIT_BYTES = 2 << 30
"""A direct map above this many bytes is replaced by the hash index when that is smaller."""


class TzCounters(NamedTuple):
    """Counts since the cache was made; they only grow."""

    hits: int
    misses: int
    ghost_hits: int
    conflicts: int  # misses that found no place
    evictions: int  # rows overwritten
    promotions: int  # rows copied from probation to main
    relocations: int  # rows copied by planned shrinks
    insertions: int
    swept: int  # slots the hand has passed

    @property
    def accesses(self) -> int:
        return self.hits + self.misses


class Slice(NamedTuple):
    """What one slice of a planned shrink asks for."""

    looked: int
    """Slots looked at; 0 when no shrink is under way."""
    sources: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    """`[c]` each: copy row `sources[i]` to slot `targets[i]`, all reads before all writes."""
    released: npt.NDArray[np.int32]
    """Extents that hold nothing any more."""


class Insertion(NamedTuple):
    """Where the rows of a batch go."""

    slots: npt.NDArray[np.int64]
    """`[n]`, -1 for a row that is not to be written."""
    sources: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    """`[c]` each: copies to be made before the new rows are written."""


def uses_hash_index(num_keys: int, max_extents: int, rows_per_extent: int) -> bool:
    """Which index fits: the direct map (8 bytes per catalogue row) up to
    `DIRECT_MAP_LIMIT_BYTES`, beyond it the smaller of the two."""
    direct_bytes = 8 * num_keys
    hash_bytes = 12 * kernel.hash_index_entries(max_extents * rows_per_extent)
    return direct_bytes > DIRECT_MAP_LIMIT_BYTES and hash_bytes < direct_bytes


class TzCache:
    """A cache of rows 0..num_keys-1 in extents 0..max_extents-1; it starts without extents.

    Slots are numbered `extent * rows_per_extent + offset`. `rows_per_extent = 1` is the
    row-granular cache of the twin and the simulator. Not thread-safe; calls hold no GIL.
    """

    def __init__(
        self,
        num_keys: int,
        rows_per_extent: int = 1,
        *,
        max_extents: int,
        num_extents: int = 0,
        hash_index: bool | None = None,
    ) -> None:
        if hash_index is None:
            hash_index = uses_hash_index(num_keys, max_extents, rows_per_extent)
        self.tz = allocate(num_keys, max_extents, rows_per_extent, hash_index=hash_index)
        self._table = table_of(self.tz)
        self.num_keys = num_keys
        self.rows_per_extent = rows_per_extent
        self.max_extents = max_extents
        self.index_bytes = self.tz.entries.nbytes + self.tz.hashed.nbytes + self.tz.words.nbytes
        """Reserved by index and slot words; only what is used is backed by memory."""
        if num_extents:
            self.grow(np.arange(num_extents, dtype=np.int32))

    @property
    def num_extents(self) -> int:
        """Extents that take insertions."""
        state = self.tz.state
        return state.item(kernel.IN_RING) + state.item(kernel.IN_MAIN)

    @property
    def draining_extents(self) -> int:
        """Extents a planned shrink has still to empty; their rows hit until then."""
        state = self.tz.state
        return state.item(kernel.IN_DRAIN) - state.item(kernel.DRAIN_AT)

    def counters(self) -> TzCounters:
        return TzCounters(*self.tz.state[kernel.HITS : kernel.SWEPT + 1].tolist())

    def extents(self) -> npt.NDArray[np.int32]:
        """Every extent held, draining ones included, ascending."""
        return np.flatnonzero(self.tz.zone != kernel.NOWHERE).astype(np.int32)

    def free_slots(self) -> int:
        """Unused slots of newly grown main extents."""
        return int(tz_calls.free_slots(self._table))

    def access_many(
        self, keys: npt.NDArray[np.uint32]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Accesses in turn, misses inserted: `[n] uint32` -> hit `[n]`, slot `[n]` (-1: none)."""
        keys = np.ascontiguousarray(keys, np.uint32)
        self._check(keys)
        hits = np.empty(keys.size, np.bool_)
        slots = np.empty(keys.size, np.int64)
        access_many(self.tz, keys, hits, slots)
        return hits, slots

    def lookup_many(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Slots of distinct keys, -1 for misses; one hit is counted per row."""
        self._check(keys)
        slots = np.empty(keys.size, np.int64)
        tz_calls.lookup_many(self._table, keys, slots)
        return slots

    def insert_many(self, keys: npt.NDArray[np.int64]) -> Insertion:
        """Places for distinct keys that `lookup_many` missed."""
        self._check(keys)
        scratch = np.empty((4, keys.size), np.int64)
        copies = tz_calls.insert_many(self._table, keys, scratch)
        return Insertion(scratch[0], scratch[1, :copies], scratch[2, :copies])

    def slots_of(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Slots of keys, -1 where one is not resident; nothing is counted."""
        self._check(keys)
        slots = np.empty(keys.size, np.int64)
        tz_calls.slots_of(self._table, keys, slots)
        return slots

    def fill_many(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Puts keys into unused slots of grown extents; -1 for those that found none."""
        self._check(keys)
        slots = np.empty(keys.size, np.int64)
        tz_calls.fill_many(self._table, keys, slots)
        return slots

    def discard_many(self, keys: npt.NDArray[np.int64]) -> int:
        """Forgets rows, resident or not. -> how many were resident."""
        self._check(keys)
        return int(tz_calls.discard_many(self._table, keys))

    def grow(self, extents: npt.NDArray[np.integer]) -> None:
        """Takes over extents, O(extents). Raises ValueError for one it holds or does not know."""
        wanted = np.ascontiguousarray(extents, np.int32)
        if wanted.size == 0:
            return
        wrong = tz_calls.grow(self._table, wanted)
        if wrong == tz_calls.FINE:
            return
        extent = int(wanted[wrong])
        if 0 <= extent < self.max_extents and self.tz.zone[extent] != NOWHERE:
            raise ValueError(f"extent {extent} is held already")
        raise ValueError(f"extent {extent} does not exist; they are 0..{self.max_extents - 1}")

    def plan_shrink(self, count: int) -> int:
        """Chooses extents to be given up; `shrink_slice` empties them. -> how many."""
        self._check_count(count)
        return int(tz_calls.plan_shrink(self._table, count))

    def shrink_slice(self, slots: int) -> Slice:
        """Looks at up to that many slots of the extents to be given up."""
        scratch = np.empty((3, slots), np.int64)
        released = np.empty(self.draining_extents, np.int32)
        looked, copies, emptied = tz_calls.drain_rows(self._table, slots, scratch, released)
        return Slice(looked, scratch[0, :copies], scratch[1, :copies], released[:emptied])

    def cancel_shrink(self) -> int:
        """Keeps the extents that are not yet emptied. -> how many."""
        return int(tz_calls.cancel_shrink(self._table, np.empty(self.draining_extents, np.int32)))

    def drop(self, count: int) -> npt.NDArray[np.int32]:
        """Gives extents up at once, rows and all, O(extents). -> the extents, at most `count`."""
        self._check_count(count)
        released = np.empty(count, np.int32)
        return released[: tz_calls.drop(self._table, count, released)]

    def check_integrity(self) -> list[str]:
        """Violations of the structure; empty when it is sound. O(slots + keys)."""
        return violations(self.tz)

    def _check(self, keys: npt.NDArray[np.integer]) -> None:
        wrong = tz_calls.first_outside(keys, self.num_keys)
        if wrong != tz_calls.FINE:
            raise ValueError(
                f"row {int(keys[wrong])} is outside the catalogue of {self.num_keys} rows"
            )

    def _check_count(self, count: int) -> None:
        if count < 0:
            raise ValueError(f"cannot give up {count} extents")
