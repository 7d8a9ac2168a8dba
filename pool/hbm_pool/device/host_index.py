"""Row index on the host: the TZ kernel, with rows copied by compiled loops or by the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hbm_pool.device.row_index import Drained, Extents, Inserted, Keys
from hbm_pool.host import row_copies
from hbm_pool.host.replacement import TzCache, TzCounters
from hbm_pool.host.tz_extents import resident
from hbm_pool.host.tz_kernel import CONFLICTS, GHOST_HITS


class HostFound:
    """`row_index.Found` of the host back end; nothing is asynchronous but the device's copies."""

    def __init__(
        self,
        index: HostRowIndex,
        keys: Keys,
        slots: npt.NDArray[np.int64],
        inverse: npt.NDArray[np.int32],
        out: torch.Tensor,
    ) -> None:
        self.accesses = inverse.size
        self.unique = keys.size
        self._index = index
        self._inverse = inverse
        self._out = out
        missed = slots < 0
        self._missed = keys[missed]
        self._keys = keys
        self._missed_mask = missed

    def missed(self) -> Keys:
        return self._missed

    def hit_keys(self) -> Keys:
        return self._keys[~self._missed_mask]

    def learn(self) -> None:
        """The host knows already."""

    def spread(self, fetched: torch.Tensor) -> None:
        place = np.full(self.unique, -1, np.int64)
        place[self._missed_mask] = np.arange(self._missed.size)
        self._index.spread(fetched, place, self._inverse, self._out)


class HostRowIndex:
    """`row_index.RowIndex` over a `TzCache`. `rows` is the arena, `[slots, width]`."""

    def __init__(
        self, num_keys: int, rows_per_extent: int, num_extents: int, rows: torch.Tensor
    ) -> None:
        self.cache = TzCache(num_keys, rows_per_extent, max_extents=num_extents)
        self._rows = rows
        self._words = _ArenaWords(rows) if rows.device.type == "cpu" else None

    @property
    def num_extents(self) -> int:
        return self.cache.num_extents

    @property
    def draining_extents(self) -> int:
        return self.cache.draining_extents

    @property
    def index_bytes(self) -> int:
        return self.cache.index_bytes

    def lookup(self, ids: torch.Tensor, first_key: int, out: torch.Tensor) -> HostFound:
        wanted = ids.cpu().contiguous().numpy()
        size = wanted.size
        keys, slots = np.empty((2, size), np.int64)
        inverse = np.empty(size, np.int32)
        table = np.zeros(1 << max(4, (2 * size - 1).bit_length()), np.int32)
        unique, _ = row_copies.lookup_batch(
            self.cache.tz, wanted, first_key, keys, slots, inverse, table
        )
        keys, slots = keys[:unique], slots[:unique]
        if self._words is not None:
            self._words.gather(slots, inverse, out)
        elif size:
            # A missed row reads slot 0 and is overwritten by `spread`.
            places = self._to_device(np.maximum(slots, 0)[inverse])
            torch.index_select(self._rows, 0, places, out=out)
        return HostFound(self, keys, slots, inverse, out)

    def spread(
        self,
        fetched: torch.Tensor,
        place: npt.NDArray[np.int64],
        inverse: npt.NDArray[np.int32],
        out: torch.Tensor,
    ) -> None:
        """`out[i] = fetched[place[inverse[i]]]` where `place` is not negative."""
        if self._words is not None:
            self._words.spread(fetched, place, inverse, out)
            return
        source = place[inverse]
        targets = np.flatnonzero(source >= 0)
        out.index_copy_(
            0,
            self._to_device(targets),
            fetched.index_select(0, self._to_device(source[targets])),
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
        if self._words is not None:
            self._words.move(sources, targets)
            return
        moved = self._rows.index_select(0, self._to_device(sources))
        self._rows.index_copy_(0, self._to_device(targets), moved)

    def _store(self, slots: npt.NDArray[np.int64], rows: torch.Tensor) -> None:
        if self._words is not None:
            self._words.store(slots, rows)
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


class _ArenaWords:
    """The arena's rows as flat words, for the compiled copies of `row_copies`."""

    def __init__(self, rows: torch.Tensor) -> None:
        width_bytes = rows.shape[1] * rows.element_size()
        stride_bytes = rows.stride(0) * rows.element_size()
        word = row_copies.word_dtype(width_bytes, stride_bytes)
        self._dtype = word
        self.width = width_bytes // word.itemsize
        self.stride = stride_bytes // word.itemsize
        flat = rows.as_strided((rows.shape[0] * rows.stride(0),), (1,))
        self._arena: npt.NDArray[Any] = flat.view(torch.uint8).numpy().view(word)

    def gather(
        self, slots: npt.NDArray[np.int64], inverse: npt.NDArray[np.int32], out: torch.Tensor
    ) -> None:
        row_copies.gather_rows(
            self._arena, self.stride, self.width, slots, inverse, self._flat(out)
        )

    def spread(
        self,
        fetched: torch.Tensor,
        place: npt.NDArray[np.int64],
        inverse: npt.NDArray[np.int32],
        out: torch.Tensor,
    ) -> None:
        row_copies.spread_rows(self._flat(fetched), self.width, place, inverse, self._flat(out))

    def store(self, slots: npt.NDArray[np.int64], rows: torch.Tensor) -> None:
        row_copies.store_rows(self._arena, self.stride, self.width, slots, self._flat(rows))

    def move(self, sources: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> None:
        row_copies.move_rows(self._arena, self.stride, self.width, sources, targets)

    def _flat(self, rows: torch.Tensor) -> npt.NDArray[Any]:
        """Contiguous rows, without a copy."""
        flat: npt.NDArray[Any] = rows.view(torch.uint8).view(-1).numpy().view(self._dtype)
        return flat
