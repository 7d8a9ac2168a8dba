"""Row index on the arena's device: the TZ rules as tensor operations over whole batches.

Row→slot map and slot metadata are tensors; a lookup queues its operations, gathers the hits and
sends the missed keys back in one asynchronous copy. Nothing else waits for the device: sizes that
only the device knows (holes, promotions) are masks over a fixed size, and masked writes go to one
spare element at the end of each table, or write what is there already.

The rules are those of `hbm_pool.host.tz_kernel`, a batch at a time: ghosts are told, the ring is
overwritten and the hand advances once per batch instead of once per row. What the caller gets, the
rows, is the same; which rows stay differs a little. Runs on CPU tensors too.

Counters come with the read-back of the next lookup: `Inserted` is always (0, 0) here, and ghost
hits and conflicts show in `counters()` one batch late; `fill` on a GPU counts rows it was given
room for, resident already or not. Memory: 12 bytes per catalogue row and 5
per slot of the arena.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from hbm_pool.device.device_zones import DeviceZones
from hbm_pool.device.row_index import Drained, Extents, Inserted, Keys
from hbm_pool.device.zone_tensors import STATE_SIZE
from hbm_pool.host.replacement import TzCounters

HEAD: Final = 2 + STATE_SIZE
"""Of what is read back: missed rows, distinct rows, the state of the zones; then missed keys, each
with the place of an id that asked for it in its upper half."""
_PLACE_SHIFT: Final = 32
_KEY_MASK: Final = (1 << _PLACE_SHIFT) - 1
_NO_PLACES: Final = np.empty(0, np.int64)
_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_KEY_BYTES: Final = 8 + 4
_SLOT_BYTES: Final = 4 + 1


def index_bytes(num_keys: int, slots: int) -> int:
    """Device memory of an index over that many catalogue rows and slots."""
    return _KEY_BYTES * num_keys + _SLOT_BYTES * slots


class DeviceFound:
    """`row_index.Found` of the device back end."""

    def __init__(
        self,
        index: DeviceRowIndex,
        accesses: int,
        read_back: torch.Tensor,
        ready: Any,
        miss_place: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        self.accesses = accesses
        self._index = index
        self._read_back = read_back
        self._ready = ready
        self._miss_place = miss_place
        self._out = out
        self._version = index.zones.version
        self._missed: Keys | None = None
        self._missed_at: npt.NDArray[np.int64] = _NO_PLACES
        self._state: npt.NDArray[np.int64] | None = None
        self.unique = 0

    def missed(self) -> Keys:
        if self._missed is None:
            if self._ready is not None:
                self._ready.synchronize()
            told = self._read_back.numpy()
            count, self.unique = int(told[0]), int(told[1])
            packed = told[HEAD : HEAD + count]
            self._missed = packed & _KEY_MASK
            self._missed_at = packed >> _PLACE_SHIFT
            self._state = told[2:HEAD].copy()
        return self._missed

    def missed_places(self) -> npt.NDArray[np.int64]:
        return self._missed_at

    @property
    def complete(self) -> bool:
        return False

    def learn(self) -> None:
        if self._state is not None:
            self._index.zones.learn(self._version, self._state)

    def spread(self, fetched: torch.Tensor) -> None:
        place = self._miss_place
        rows = _plain(fetched).index_select(0, place.clamp(min=0))
        self._out.copy_(torch.where((place >= 0).unsqueeze(1), rows, self._out))


class DeviceRowIndex:
    """`row_index.RowIndex` on tensors. `rows` is the arena, `[slots, width]`."""

    def __init__(
        self, num_keys: int, rows_per_extent: int, num_extents: int, rows: torch.Tensor
    ) -> None:
        self.zones = DeviceZones(num_keys, rows_per_extent, num_extents, rows.device)
        # As integers: not every operation exists for every narrow floating-point type.
        self._rows = _plain(rows)
        self._num_keys = num_keys
        # Which id of a batch stands for a key that is asked for several times.
        self._leader = torch.zeros(num_keys, dtype=torch.int32, device=rows.device)

    @property
    def num_extents(self) -> int:
        return self.zones.num_extents

    @property
    def draining_extents(self) -> int:
        return self.zones.draining_extents

    @property
    def index_bytes(self) -> int:
        return index_bytes(self._num_keys, self._rows.shape[0])

    @property
    def ghost_hits(self) -> int:
        return self.zones.counters().ghost_hits

    def lookup(self, ids: torch.Tensor, first_key: int, out: torch.Tensor) -> DeviceFound:
        zones = self.zones
        count = ids.shape[0]
        device = self._rows.device
        keys = ids.to(device, non_blocking=True) + first_key
        if ids.device.type != "cpu":
            keys = keys.clamp(0, self._num_keys - 1)
        places = torch.arange(count, dtype=torch.int32, device=device)
        self._leader[keys] = places
        leader = self._leader[keys].long()
        leads = leader == places
        slots = zones.slots_of(keys)
        hit = slots >= 0
        zones.touch(slots, leads & hit)
        missed = leads & ~hit
        order = torch.cumsum(missed, 0) - 1
        miss_place = torch.where(hit, -1, order[leader])
        if count:
            torch.index_select(self._rows, 0, slots.clamp(min=0), out=_plain(out))
        zones.count_lookup(leads & hit, missed)
        told = torch.zeros(HEAD + count + 1, dtype=torch.int64, device=device)
        # The last element takes what is not missed.
        told[torch.where(missed, order + HEAD, HEAD + count)] = keys | leader << _PLACE_SHIFT
        told[0] = missed.sum()
        told[1] = leads.sum()
        told[2:HEAD] = zones.state
        if device.type != "cuda":
            return DeviceFound(self, count, told, None, miss_place, _plain(out))
        read_back = torch.empty(told.shape, dtype=torch.int64, pin_memory=True)
        read_back.copy_(told, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(device))
        return DeviceFound(self, count, read_back, ready, miss_place, _plain(out))

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        answer: npt.NDArray[np.bool_] = (self.zones.slots_of(self._upload(keys)) >= 0).cpu().numpy()
        return answer

    def insert(self, keys: Keys, rows: torch.Tensor) -> Inserted:
        if self.zones.num_extents and keys.size:
            placed = self.zones.insert(self._upload(keys))
            self._move(placed.sources, placed.targets)
            self._store(placed.slots, _plain(rows))
        else:
            self.zones.count_conflicts(keys.size)
        return Inserted(0, 0)

    def fill(self, keys: Keys, rows: torch.Tensor) -> int:
        room = min(keys.size, self.zones.free_slots())
        if room == 0:
            return 0
        slots = self.zones.fill(self._upload(keys))
        self._store(slots, _plain(rows))
        if self._rows.device.type == "cpu":
            return int((slots >= 0).sum())
        self.zones.note_filled(room)
        return room

    def update(self, keys: Keys, rows: torch.Tensor) -> None:
        self._store(self.zones.slots_of(self._upload(keys)), _plain(rows))

    def discard(self, keys: Keys) -> None:
        self.zones.discard(self._upload(keys))

    def free_slots(self) -> int:
        return self.zones.free_slots()

    def grow(self, extents: Extents) -> None:
        self.zones.grow(extents)

    def plan_shrink(self, count: int) -> int:
        return self.zones.plan_shrink(count)

    def cancel_shrink(self) -> int:
        return self.zones.cancel_shrink()

    def drain(self, slots: int) -> Drained:
        part = self.zones.drain(slots)
        if part.sources is not None and part.targets is not None:
            self._move(part.sources, part.targets)
        return Drained(part.looked, part.released)

    def drop(self, count: int) -> Extents:
        return self.zones.drop(count)

    def extents(self) -> Extents:
        return self.zones.extents()

    def resident(self) -> tuple[Keys, npt.NDArray[np.int64]]:
        return self.zones.resident()

    def counters(self) -> TzCounters:
        return self.zones.counters()

    def check_integrity(self) -> list[str]:
        return self.zones.violations()

    def _move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies row `sources[i]` to slot `targets[i]` where that is not negative."""
        moved = self._rows.index_select(0, sources.clamp(min=0))
        self._store(targets, moved)

    def _store(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Writes row i to slot i where that is not negative, without asking how many there are:
        the others repeat a row that is written, or, when none is, what an own slot holds."""
        if slots.numel() == 0 or self.zones.own_slot < 0:
            return
        written = slots >= 0
        first = written.to(torch.int8).argmax()
        choice = torch.where(written, torch.arange(slots.shape[0], device=slots.device), first)
        target = slots[choice]
        none = target < 0
        target = torch.where(none, self.zones.own_slot, target)
        held = self._rows.index_select(0, target)
        new = rows.index_select(0, choice)
        self._rows.index_copy_(0, target, torch.where(none.unsqueeze(1), held, new))

    def _upload(self, keys: Keys) -> torch.Tensor:
        values = torch.from_numpy(np.ascontiguousarray(keys))
        if self._rows.device.type != "cuda":
            return values
        pinned = torch.empty(values.shape, dtype=torch.int64, pin_memory=True)
        pinned.copy_(values)
        return pinned.to(self._rows.device, non_blocking=True)


def _plain(rows: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers of the same size."""
    return rows.view(_INTEGERS[rows.element_size()])
