"""Row index on the host: the TZ kernel, with rows copied by compiled loops or by the device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from hbm_pool.device.row_index import Drained, Extents, Inserted, Keys
from hbm_pool.host import row_copies
from hbm_pool.host.replacement import TzCache, TzCounters
from hbm_pool.host.tz_extents import resident
from hbm_pool.host.tz_kernel import CONFLICTS, GHOST_HITS

_NO_KEYS = np.empty(0, np.int64)
_NO_PLACES = np.empty(0, np.int32)


class HostFound:
    """`row_index.Found` of the host back end; nothing is asynchronous but the device's copies.

    `missed_at` are the places of ids that wait for a row, `missed_from` which missed key it is.
    """

    __slots__ = (
        "_first_at",
        "_index",
        "_missed",
        "_out",
        "accesses",
        "missed_at",
        "missed_from",
        "unique",
    )

    def __init__(
        self,
        index: HostRowIndex,
        accesses: int,
        unique: int,
        missed: Keys,
        first_at: npt.NDArray[np.int32],
        missed_at: npt.NDArray[np.int32],
        missed_from: npt.NDArray[np.int32],
        out: torch.Tensor,
    ) -> None:
        self.accesses = accesses
        self.unique = unique
        self._index = index
        self._missed = missed
        self._first_at = first_at
        self.missed_at = missed_at
        self.missed_from = missed_from
        self._out = out

    @property
    def complete(self) -> bool:
        return self._missed.size == 0

    def missed(self) -> Keys:
        return self._missed

    def missed_places(self) -> npt.NDArray[np.int32]:
        return self._first_at

    def learn(self) -> None:
        """The host knows already."""

    def spread(self, fetched: torch.Tensor) -> None:
        self._index.spread(fetched, self.missed_at, self.missed_from, self._out)


class HostRowIndex:
    """`row_index.RowIndex` over a `TzCache`. `rows` is the arena, `[slots, width]`."""

    def __init__(
        self, num_keys: int, rows_per_extent: int, num_extents: int, rows: torch.Tensor
    ) -> None:
        if rows.shape[0] >= 1 << 31:
            raise ValueError(
                f"the arena has {rows.shape[0]} slots of this width; the host index counts them in "
                "31 bits: use wider rows, a smaller pool or the device index"
            )
        self.cache = TzCache(num_keys, rows_per_extent, max_extents=num_extents)
        self._rows = rows
        self._row_bytes = rows.shape[1] * rows.element_size()
        self._stride_bytes = rows.stride(0) * rows.element_size()
        self._arena: npt.NDArray[np.uint8] | None = None
        if rows.device.type == "cpu":
            flat = rows.as_strided((rows.shape[0] * rows.stride(0),), (1,))
            self._arena = as_flat_bytes(flat)
        self._view = self._batch_view(256)

    def _batch_view(self, most_ids: int) -> row_copies.BatchView:
        return row_copies.BatchView(
            self.cache.tz,
            0 if self._arena is None else self._rows.data_ptr(),
            self._stride_bytes,
            self._row_bytes,
            most_ids,
        )

    @property
    def num_extents(self) -> int:
        return self.cache.num_extents

    @property
    def draining_extents(self) -> int:
        return self.cache.draining_extents

    @property
    def index_bytes(self) -> int:
        return self.cache.index_bytes

    @property
    def ghost_hits(self) -> int:
        return int(self.cache.tz.state[GHOST_HITS])

    def lookup(self, ids: torch.Tensor, first_key: int, out: torch.Tensor) -> HostFound:
        wanted = ids if ids.is_cpu else ids.cpu()
        size = wanted.shape[0]
        if size > self._view.most_ids:
            self._view = self._batch_view(size)
        view = self._view
        on_host = self._arena is not None
        missed, waiting, hits = row_copies.gather_batch(
            view.table, wanted.data_ptr(), size, first_key, out.data_ptr() if on_host else 0
        )
        if not on_host and size:
            # A missed row reads slot 0 and is overwritten by `spread`.
            places = self._to_device(np.maximum(view.slots[:size], 0))
            torch.index_select(self._rows, 0, places, out=out)
        if missed == 0:
            return HostFound(self, size, hits, _NO_KEYS, _NO_PLACES, _NO_PLACES, _NO_PLACES, out)
        return HostFound(
            self,
            size,
            hits + missed,
            view.missed[:missed].copy(),
            view.first_at[:missed].copy(),
            view.missed_at[:waiting].copy(),
            view.missed_from[:waiting].copy(),
            out,
        )

    def spread(
        self,
        fetched: torch.Tensor,
        missed_at: npt.NDArray[np.int32],
        missed_from: npt.NDArray[np.int32],
        out: torch.Tensor,
    ) -> None:
        """`out[missed_at[i]] = fetched[missed_from[i]]`."""
        if self._arena is not None:
            row_copies.spread_rows(
                as_flat_bytes(fetched), self._row_bytes, missed_at, missed_from, as_flat_bytes(out)
            )
            return
        out.index_copy_(
            0,
            self._to_device(missed_at.astype(np.int64)),
            fetched.index_select(0, self._to_device(missed_from.astype(np.int64))),
        )

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        return self.cache.slots_of(keys) >= 0

    def insert(self, keys: Keys, rows: torch.Tensor) -> Inserted:
        state = self.cache.tz.state
        conflicts, ghosts = int(state[CONFLICTS]), int(state[GHOST_HITS])
        placed = self.cache.insert_many(keys)
        self._move(placed.sources, placed.targets)
        self._store(placed.slots, rows)
        return Inserted(int(state[CONFLICTS]) - conflicts, int(state[GHOST_HITS]) - ghosts)

    def fill(self, keys: Keys, rows: torch.Tensor) -> int:
        slots = self.cache.fill_many(keys)
        self._store(slots, rows)
        return int(np.count_nonzero(slots >= 0))

    def update(self, keys: Keys, rows: torch.Tensor) -> None:
        self._store(self.cache.slots_of(keys), rows)

    def discard(self, keys: Keys) -> None:
        self.cache.discard_many(keys)

    def free_slots(self) -> int:
        return self.cache.free_slots()

    def grow(self, extents: Extents) -> None:
        self.cache.grow(extents)

    def plan_shrink(self, count: int) -> int:
        return self.cache.plan_shrink(count)

    def cancel_shrink(self) -> int:
        return self.cache.cancel_shrink()

    def drain(self, slots: int) -> Drained:
        part = self.cache.shrink_slice(slots)
        self._move(part.sources, part.targets)
        return Drained(part.looked, part.released)

    def drop(self, count: int) -> Extents:
        return self.cache.drop(count)

    def extents(self) -> Extents:
        return self.cache.extents()

    def resident(self) -> tuple[Keys, npt.NDArray[np.int64]]:
        return resident(self.cache.tz)

    def counters(self) -> TzCounters:
        return self.cache.counters()

    def check_integrity(self) -> list[str]:
        return self.cache.check_integrity()

    def _move(self, sources: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> None:
        if sources.size == 0:
            return
        if self._arena is not None:
            row_copies.move_rows(self._arena, self._stride_bytes, self._row_bytes, sources, targets)
            return
        moved = self._rows.index_select(0, self._to_device(sources))
        self._rows.index_copy_(0, self._to_device(targets), moved)

    def _store(self, slots: npt.NDArray[np.int64], rows: torch.Tensor) -> None:
        if self._arena is not None:
            row_copies.store_rows(
                self._arena, self._stride_bytes, self._row_bytes, slots, as_flat_bytes(rows)
            )
            return
        kept = np.flatnonzero(slots >= 0)
        if kept.size:
            self._rows.index_copy_(
                0,
                self._to_device(slots[kept]),
                rows.index_select(0, self._to_device(kept)),
            )

    def _to_device(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        """Copies indices without waiting: torch keeps page-locked memory until the copy is done."""
        pinned = torch.empty(values.shape, dtype=torch.int64, pin_memory=True)
        pinned.copy_(torch.from_numpy(values))
        return pinned.to(self._rows.device, non_blocking=True)


def as_flat_bytes(rows: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous CPU tensor, without a copy."""
    flat: npt.NDArray[np.uint8] = rows.view(torch.uint8).reshape(-1).numpy()
    return flat
