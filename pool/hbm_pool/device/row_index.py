"""The index of one width class: which row lies in which slot. One contract, two back ends.

`HostRowIndex` (numba, TZ kernel) and `DeviceRowIndex` (tensors on the arena's device) keep keys,
slots and replacement; both move rows inside the arena themselves, so that index and bytes never
part. Neither locks: the `EmbeddingCache` calls them under its lock, and outside of it only what
says so.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from hbm_pool.host.replacement import TzCounters

Keys = npt.NDArray[np.int64]
Extents = npt.NDArray[np.int32]


class Inserted(NamedTuple):
    """What became of missed rows. The device back end counts late: see `DeviceRowIndex`."""

    conflicts: int
    """Rows that found no place."""
    ghost_hits: int
    """Rows that had been on probation a short while ago."""


class Drained(NamedTuple):
    """One slice of a planned shrink."""

    looked: int
    """Slots looked at."""
    released: Extents


class Found(Protocol):
    """A batch that has been looked up; the rows that were hit are in `out` already."""

    accesses: int

    def missed(self) -> Keys:
        """Distinct missed keys, `[m] int64`, in order of first use. Waits for the device where
        there is one: call it without the lock."""

    def missed_places(self) -> npt.NDArray[np.integer]:
        """Of each missed key the place of an id that asked for it, `[m]`; after `missed`."""

    @property
    def unique(self) -> int:
        """Distinct rows; known after `missed`."""

    @property
    def complete(self) -> bool:
        """True when it is known that nothing was missed."""

    def learn(self) -> None:
        """Lets the index take over what `missed` has read back."""

    def spread(self, fetched: torch.Tensor) -> None:
        """Puts fetched rows, `[m, width]` on the arena's device, where they were asked for."""


class RowIndex(Protocol):
    """Keys 0..num_keys-1 in extents of the arena."""

    @property
    def num_extents(self) -> int:
        """Extents that take rows."""

    @property
    def draining_extents(self) -> int:
        """Extents being emptied."""

    @property
    def index_bytes(self) -> int:
        """Memory of the index, host or device."""

    @property
    def ghost_hits(self) -> int:
        """Ghost hits so far, as in `counters`."""

    def lookup(self, ids: torch.Tensor, first_key: int, out: torch.Tensor) -> Found:
        """Looks rows up, `[n] int64` ids of the table whose keys begin at `first_key`; gathers
        those that are hit into `out`, `[n, width]`. One hit is counted per row and batch."""

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which keys are resident; no counter changes. Waits for the device where there is one,
        and may be called without the lock: the answer is of a moment ago then."""

    def insert(self, keys: Keys, rows: torch.Tensor) -> Inserted:
        """Gives missed rows a place by the replacement rule, `[m]` keys, `[m, width]` rows."""

    def fill(self, keys: Keys, rows: torch.Tensor) -> int:
        """Puts rows into unused slots only, hottest first; evicts nothing. -> rows kept."""

    def update(self, keys: Keys, rows: torch.Tensor) -> None:
        """Overwrites the rows that are resident."""

    def discard(self, keys: Keys) -> None:
        """Forgets rows."""

    def free_slots(self) -> int:
        """Slots of newly grown extents that hold nothing yet."""

    def grow(self, extents: Extents) -> None: ...

    def plan_shrink(self, count: int) -> int: ...

    def cancel_shrink(self) -> int: ...

    def drain(self, slots: int) -> Drained:
        """Looks at up to that many slots of extents being emptied; referenced rows move."""

    def drop(self, count: int) -> Extents: ...

    def extents(self) -> Extents:
        """All extents held, ascending."""

    def resident(self) -> tuple[Keys, npt.NDArray[np.int64]]:
        """All rows held as (keys, slots). Scans the slots."""

    def counters(self) -> TzCounters: ...

    def check_integrity(self) -> list[str]: ...
