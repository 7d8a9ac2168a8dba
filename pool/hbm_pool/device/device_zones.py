"""Extents of a device index: growth, planned shrink, drop (rules 5 and 6 of `tz_kernel`).

The lists of extents are kept on the host and uploaded when they change. Where ring and hand stand
is known on the host as of the last read-back: good enough to choose what to give up, and the
device corrects its own positions when a list changes, so nothing waits for it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hbm_pool.device.row_index import Extents, Keys
from hbm_pool.device.zone_tensors import (
    FRESH_POSITION,
    HAND_POSITION,
    HITS,
    NO_KEY,
    RING_POSITION,
    STATE_SIZE,
    SWEPT,
    ZoneTensors,
)
from hbm_pool.host.replacement import TzCounters, probation_extents
from hbm_pool.host.tz_kernel import DRAINING, MAIN, NOWHERE, PROBATION, REGROWN_SKIP

Ints = npt.NDArray[np.int64]


class DrainedSlots(NamedTuple):
    """One slice; `sources` and `targets` as in `Placed`, None when there was nothing to look at."""

    looked: int
    sources: torch.Tensor | None
    targets: torch.Tensor | None
    released: Extents


class DeviceZones(ZoneTensors):
    """`ZoneTensors` whose extents come and go."""

    def __init__(
        self, num_keys: int, rows_per_extent: int, num_extents: int, device: torch.device
    ) -> None:
        super().__init__(num_keys, rows_per_extent, num_extents, device)
        self.zones: npt.NDArray[np.int8] = np.zeros(num_extents, np.int8)
        self.version = 0
        """Of the lists: positions read back under another one are out of date."""
        self.told: Ints = np.zeros(STATE_SIZE, np.int64)
        """`state` as of the last read-back."""
        self._list_buffers = [
            torch.zeros(num_extents, dtype=torch.int64, device=device) for _ in range(3)
        ]
        self._ring_list: list[int] = []
        self._main_list: list[int] = []
        self._fresh_list: list[int] = []
        self._drain_list: list[int] = []
        self._drain_offset = 0
        self._grown: dict[int, int] = {}  # extent -> `SWEPT` at which the hand has swept it

    @property
    def num_extents(self) -> int:
        """Extents that take rows."""
        return len(self._ring_list) + len(self._main_list)

    @property
    def draining_extents(self) -> int:
        """Extents being emptied."""
        return len(self._drain_list)

    @property
    def fresh_extents(self) -> int:
        """Grown main extents that were not full at the last look."""
        return len(self._fresh_list)

    @property
    def own_slot(self) -> int:
        """Some slot of an extent held, -1 when there is none; those being emptied hold rows too."""
        for extents in (self._main_list, self._ring_list, self._drain_list):
            if extents:
                return extents[0] * self.rows_per_extent
        return -1

    def learn(self, version: int, state: Ints) -> None:
        """Takes over a read-back; positions only when the lists have not changed since."""
        if version != self.version:
            state = state.copy()
            state[: FRESH_POSITION + 1] = self.told[: FRESH_POSITION + 1]
        self.told = state

    def free_slots(self) -> int:
        """Unused slots of grown main extents, as of the last read-back."""
        self._look()
        used = int(self.told[FRESH_POSITION])
        return max(0, len(self._fresh_list) * self.rows_per_extent - used)

    def note_filled(self, count: int) -> None:
        """Takes unused slots for used until a read-back tells."""
        self.told[FRESH_POSITION] += count

    def extents(self) -> Extents:
        """All extents held, ascending."""
        return np.flatnonzero(self.zones != NOWHERE).astype(np.int32)

    def counters(self) -> TzCounters:
        """As of the last read-back."""
        self._look()
        return TzCounters(*(int(n) for n in self.told[HITS : SWEPT + 1]))

    # -- growth ----------------------------------------------------------------------------------

    def grow(self, extents: Extents) -> None:
        """Takes over extents (rule 6)."""
        self._look()
        new = [int(extent) for extent in extents]
        total = self.num_extents + len(new)
        to_ring = min(len(new), max(0, probation_extents(total) - len(self._ring_list)))
        places = self._indices(new)
        self._fill[places] = 0
        self._generation[places] += REGROWN_SKIP
        self._forget_filled()
        self._into_ring(new[:to_ring])
        self._behind_hand(new[to_ring:])
        self._fresh_list += new[to_ring:]
        main_slots = len(self._main_list) * self.rows_per_extent
        for extent in new[to_ring:]:
            self._grown[extent] = int(self.told[SWEPT]) + main_slots
        self._upload_lists()

    def _into_ring(self, extents: list[int]) -> None:
        if not extents:
            return
        start = int(self.told[RING_POSITION]) // self.rows_per_extent
        self._ring_list[start:start] = extents
        self._shift(RING_POSITION, start, len(extents))
        self._set_zone(extents, PROBATION)

    def _behind_hand(self, extents: list[int]) -> None:
        if not extents:
            return
        start = int(self.told[HAND_POSITION]) // self.rows_per_extent
        if self._main_list:
            self._shift(HAND_POSITION, start, len(extents))
        self._main_list[start:start] = extents
        self._set_zone(extents, MAIN)

    def _shift(self, which: int, start: int, count: int) -> None:
        """A position behind the place of insertion moves with the extents there; new extents of
        the ring come next if it stands right there, those of main last."""
        begin = start * self.rows_per_extent
        move = count * self.rows_per_extent
        if which == RING_POSITION:
            self.state[which] += move * (self.state[which] > begin)
            self.told[which] += move * int(self.told[which] > begin)
        else:
            self.state[which] += move * (self.state[which] >= begin)
            self.told[which] += move * int(self.told[which] >= begin)

    def _forget_filled(self) -> None:
        """Drops extents from the front of the fresh list that were full at the last read-back."""
        full = min(int(self.told[FRESH_POSITION]) // self.rows_per_extent, len(self._fresh_list))
        if full:
            self._fresh_list = self._fresh_list[full:]
            self.state[FRESH_POSITION] -= full * self.rows_per_extent
            self.told[FRESH_POSITION] -= full * self.rows_per_extent

    # -- giving up -------------------------------------------------------------------------------

    def plan_shrink(self, count: int) -> int:
        """Marks extents to be emptied by `drain`. -> how many."""
        victims = self._take(count)
        self._set_zone(victims, DRAINING)
        self._drain_list += victims
        return len(victims)

    def cancel_shrink(self) -> int:
        """Keeps extents not yet emptied. -> how many."""
        self._look()
        back = self._drain_list
        rows = self.rows_per_extent
        for extent in back:
            slots = torch.arange(extent * rows, (extent + 1) * rows, device=self.device)
            unused = slots % rows >= self._fill[extent]
            self._slot_key[torch.where(unused, slots, self._spare_slot)] = NO_KEY
        self._fill[self._indices(back)] = rows
        self._drain_list = []
        self._drain_offset = 0
        total = self.num_extents + len(back)
        to_ring = min(len(back), max(0, probation_extents(total) - len(self._ring_list)))
        self._into_ring(back[:to_ring])
        self._behind_hand(back[to_ring:])
        self._upload_lists()
        return len(back)

    def drain(self, limit: int) -> DrainedSlots:
        """Looks at up to `limit` slots of one extent being emptied."""
        if not self._drain_list:
            return DrainedSlots(0, None, None, np.empty(0, np.int32))
        rows = self.rows_per_extent
        extent = self._drain_list[0]
        count = min(limit, rows - self._drain_offset)
        placed = self.relocate(extent * rows + self._drain_offset, count)
        self._drain_offset += count
        released: list[int] = []
        if self._drain_offset == rows:
            released = [self._drain_list.pop(0)]
            self._drain_offset = 0
            self._void(released)
        return DrainedSlots(
            count, placed.sources, placed.targets, np.asarray(released, dtype=np.int32)
        )

    def drop(self, count: int) -> Extents:
        """Gives up extents with all their rows; those being emptied first."""
        released: list[int] = []
        while self._drain_list and len(released) < count:
            released.append(self._drain_list.pop())
        if not self._drain_list:
            self._drain_offset = 0
        released += self._take(count - len(released))
        self._void(released)
        return np.asarray(released, dtype=np.int32)

    def _void(self, extents: list[int]) -> None:
        self._set_zone(extents, NOWHERE)
        if extents:
            self._fill[self._indices(extents)] = 0

    def _take(self, count: int) -> list[int]:
        """Extents to give up, out of their lists (rule 5): oldest probation, last-grown main
        newest first, then the order of the hand."""
        self._look()
        total = self.num_extents
        count = min(count, total)
        from_ring = max(0, len(self._ring_list) - probation_extents(total - count))
        from_ring = min(count, from_ring)
        if count - from_ring > len(self._main_list):
            from_ring = count - len(self._main_list)
        victims = _rotated(self._ring_list, self._next_in_ring())[:from_ring]
        swept = int(self.told[SWEPT])
        in_main = set(self._main_list)
        newest = [e for e, until in self._grown.items() if until > swept and e in in_main][::-1]
        hand = int(self.told[HAND_POSITION]) // self.rows_per_extent
        rest = [e for e in _rotated(self._main_list, hand) if e not in set(newest)]
        victims += (newest + rest)[: count - from_ring]
        gone = set(victims)
        for extent in victims:
            self._grown.pop(extent, None)
        self._ring_list = self._close(self._ring_list, gone, RING_POSITION)
        self._main_list = self._close(self._main_list, gone, HAND_POSITION)
        self._fresh_list = self._close(self._fresh_list, gone, FRESH_POSITION)
        self._upload_lists()
        return victims

    def _next_in_ring(self) -> int:
        rows = self.rows_per_extent
        return -(-int(self.told[RING_POSITION]) // rows)

    def _close(self, extents: list[int], gone: set[int], which: int) -> list[int]:
        """The list without extents that left; the position goes on where it was, or at the next
        extent that is left."""
        kept = [extent not in gone for extent in extents]
        if all(kept):
            return extents
        rows = self.rows_per_extent
        before = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
        stays = np.asarray([*kept, True], dtype=np.int64)
        left = int(before[-1])
        total = left * rows
        before_there = self._to_device(before)
        stays_there = self._to_device(stays)
        position = self.state[which]
        at = position // rows
        moved = before_there[at] * rows + stays_there[at] * (position % rows)
        told = int(self.told[which])
        known = int(before[told // rows]) * rows + int(stays[told // rows]) * (told % rows)
        if which == FRESH_POSITION:  # may stand behind the last one
            self.state[which] = moved
            self.told[which] = known
        else:
            self.state[which] = moved % max(total, 1)
            self.told[which] = known % max(total, 1)
        return [extent for extent, stay in zip(extents, kept, strict=True) if stay]

    # -- state -----------------------------------------------------------------------------------

    def resident(self) -> tuple[Keys, Ints]:
        """All rows held as (keys, slots). Waits for the device."""
        rows = self.rows_per_extent
        fill = self._fill.cpu().numpy()
        keys = self._slot_key.cpu().numpy().astype(np.int64)
        slots = [np.empty(0, np.int64)]
        for extent in self.extents():
            slots.append(int(extent) * rows + np.arange(fill[extent], dtype=np.int64))
        every = np.concatenate(slots)
        used = keys[every] != NO_KEY
        return keys[every][used], every[used]

    def violations(self) -> list[str]:
        """What is wrong, in words. Waits for the device."""
        found = []
        for name, extents, kind in (
            ("ring", self._ring_list, PROBATION),
            ("main", self._main_list, MAIN),
            ("drain", self._drain_list, DRAINING),
        ):
            if sorted(extents) != np.flatnonzero(self.zones == kind).tolist():
                found.append(f"{name} lists {len(extents)} extents, others are in that zone")
        if not np.array_equal(self._zone[:-1].cpu().numpy(), self.zones):
            found.append("host and device do not agree on the zones")
        rows = self.rows_per_extent
        state = self.state.cpu().numpy()
        for name, which, size in (
            ("ring", RING_POSITION, len(self._ring_list)),
            ("hand", HAND_POSITION, len(self._main_list)),
        ):
            if not 0 <= state[which] < max(1, size * rows):
                found.append(f"the {name} stands at slot {int(state[which])} of {size * rows}")
        if not 0 <= state[FRESH_POSITION] <= len(self._fresh_list) * rows:
            found.append("the next unused slot is outside the fresh extents")
        fill = self._fill[:-1].cpu().numpy()
        if np.any(fill[self.zones == NOWHERE]):
            found.append("an extent that was given up still has valid slots")
        keys, slots = self.resident()
        if keys.size != np.unique(keys).size:
            found.append(f"{keys.size - np.unique(keys).size} rows are resident twice")
        reached = self.slots_of(torch.from_numpy(keys).to(self.device)).cpu().numpy()
        lost = np.flatnonzero(reached != slots)
        if lost.size:
            found.append(f"row {int(keys[lost[0]])} cannot be looked up")
        return found

    def _look(self) -> None:
        """On CPU the state can be read for nothing."""
        if self.device.type == "cpu":
            self.told = self.state.numpy().copy()

    def _set_zone(self, extents: list[int], kind: int) -> None:
        if extents:
            self.zones[extents] = kind
            self._zone[self._indices(extents)] = kind

    def _upload_lists(self) -> None:
        """Into buffers that stay where they are: work queued on another stream may still read."""
        self.version += 1
        for buffer, extents in zip(
            self._list_buffers, (self._ring_list, self._main_list, self._fresh_list), strict=True
        ):
            buffer[: len(extents)].copy_(self._indices(extents), non_blocking=True)
        ring, order, fresh = self._list_buffers
        self._ring = ring[: len(self._ring_list)]
        self._order = order[: len(self._main_list)]
        self._fresh = fresh[: len(self._fresh_list)]

    def _indices(self, extents: list[int]) -> torch.Tensor:
        return self._to_device(np.asarray(extents, dtype=np.int64))

    def _to_device(self, values: Ints) -> torch.Tensor:
        host = torch.from_numpy(values)
        if self.device.type == "cpu" or values.size == 0:
            return host.to(self.device)
        return host.pin_memory().to(self.device, non_blocking=True)


def _rotated(extents: list[int], start: int) -> list[int]:
    return extents[start:] + extents[:start]
