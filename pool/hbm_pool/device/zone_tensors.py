"""TZ zones as tensors: rows in, rows out, a batch at a time (see `device_index`).

Masked writes go to the spare last element of a table, so that no operation asks the device how
many elements a mask has.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from hbm_pool.host.tz_kernel import GHOST_GENERATIONS, PROBATION

NO_KEY: Final = -1
MAX_COUNT: Final = 3
UNUSED: Final = MAX_COUNT + 1
"""Count of a slot that the hand must not take: it holds nothing yet."""
GENERATION_MASK: Final = (1 << 15) - 1
_SLOT_BITS: Final = 40
_SLOT_MASK: Final = (1 << _SLOT_BITS) - 1
WINDOW_PER_HOLE: Final = 4
WINDOW_LEAST: Final = 64
"""The hand looks at this many slots and four per hole it needs: a kernel of the host takes 3 to 5
steps per hole."""

# Places in `ZoneTensors.state`.
RING_POSITION: Final = 0  # slot of the ring to be overwritten next, counted along the ring
HAND_POSITION: Final = 1
FRESH_POSITION: Final = 2  # next unused slot, counted along the fresh extents
HITS: Final = 3
MISSES: Final = 4
GHOST_HITS: Final = 5
CONFLICTS: Final = 6
EVICTIONS: Final = 7
PROMOTIONS: Final = 8
RELOCATIONS: Final = 9
INSERTIONS: Final = 10
SWEPT: Final = 11
STATE_SIZE: Final = 12


class Placed(NamedTuple):
    """Slots for the rows of a batch, -1 for none, and copies to be made first, -1 for none."""

    slots: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor


class ZoneTensors:
    """Tables of one index. Extent lists are `[extents] int64` tensors in hand or ring order."""

    def __init__(
        self, num_keys: int, rows_per_extent: int, num_extents: int, device: torch.device
    ) -> None:
        self.rows_per_extent = rows_per_extent
        self.max_extents = num_extents
        self.device = device
        slots = num_extents * rows_per_extent
        self._spare_key = num_keys
        self._spare_slot = slots
        self._entries = torch.zeros(num_keys + 1, dtype=torch.int64, device=device)
        self._slot_key = torch.full((slots + 1,), NO_KEY, dtype=torch.int32, device=device)
        self._slot_count = torch.zeros(slots + 1, dtype=torch.int8, device=device)
        self._fill = torch.zeros(num_extents + 1, dtype=torch.int64, device=device)
        self._generation = torch.zeros(num_extents + 1, dtype=torch.int64, device=device)
        self._zone = torch.zeros(num_extents + 1, dtype=torch.int8, device=device)
        self.state = torch.zeros(STATE_SIZE, dtype=torch.int64, device=device)
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        self._ring = nothing
        self._order = nothing
        self._fresh = nothing

    # -- look-up ---------------------------------------------------------------------------------

    def slots_of(self, keys: torch.Tensor) -> torch.Tensor:
        """Slots of keys, `[n] int64`, -1 where one is not resident (rule 1)."""
        entries = self._entries[keys]
        slots = (entries & _SLOT_MASK) - 1
        inside = slots.clamp(min=0)
        valid = inside % self.rows_per_extent < self._fill[inside // self.rows_per_extent]
        return torch.where((entries != 0) & (self._slot_key[inside] == keys) & valid, slots, -1)

    def touch(self, slots: torch.Tensor, hit: torch.Tensor) -> None:
        """Counts hits; slots that are hit are distinct."""
        places = torch.where(hit, slots, self._spare_slot)
        self._slot_count[places] = (self._slot_count[places] + 1).clamp(max=MAX_COUNT)

    def count_lookup(self, hit: torch.Tensor, missed: torch.Tensor) -> None:
        """Adds a batch's distinct hits and misses to the counters."""
        self.state[HITS] += hit.sum()
        self.state[MISSES] += missed.sum()

    def count_conflicts(self, count: int) -> None:
        """Adds rows for which there was nothing to look for a place in."""
        self.state[CONFLICTS] += count

    def discard(self, keys: torch.Tensor) -> None:
        """Forgets rows that are resident."""
        slots = self.slots_of(keys)
        places = torch.where(slots >= 0, slots, self._spare_slot)
        self._slot_key[places] = NO_KEY
        self._slot_count[places] = 0

    # -- insertion -------------------------------------------------------------------------------

    def insert(self, keys: torch.Tensor) -> Placed:
        """Places for distinct missed keys (rules 3 and 4), with the admission of the host kernel:
        what is unused, and once round the ring."""
        rows = self.rows_per_extent
        ring_slots = self._ring.numel() * rows
        has_main = self._order.numel() > 0
        ghosts = self._are_ghosts(keys)
        needed = self.slots_of(keys) < 0
        rank = torch.cumsum(needed, 0) - 1
        free = self._fresh.numel() * rows - self.state[FRESH_POSITION]
        admitted = needed & (rank < free + max(ring_slots, rows))
        to_fresh = admitted & (rank < free)
        left = admitted & ~to_fresh
        if ring_slots == 0:
            to_main = left
        elif has_main:
            to_main = left & ghosts
        else:
            to_main = torch.zeros_like(left)
        to_ring = left & ~to_main
        self.state[GHOST_HITS] += (admitted & ghosts).sum()

        filled = self._fill.clone()  # the hand must not take what is filled only now
        fresh = self._take_fresh(to_fresh, rank)
        ring, old_keys, promoted = self._overwrite(to_ring)
        if has_main:
            holes = self._holes(torch.cat([to_main, promoted]), filled)
        else:
            holes = torch.full((2 * keys.numel(),), -1, dtype=torch.int64, device=self.device)
        main, targets = holes.chunk(2)
        moved = promoted & (targets >= 0)
        zeros = torch.zeros_like(old_keys)
        self._place(old_keys, torch.where(moved, targets, -1), zeros)
        slots = torch.where(to_fresh, fresh, torch.where(to_ring, ring, -1))
        slots = torch.where(to_main, main, slots)
        self._place(keys, slots, zeros)
        placed = (slots >= 0).sum()
        self.state[INSERTIONS] += placed
        self.state[CONFLICTS] += needed.sum() - placed
        self.state[PROMOTIONS] += moved.sum()
        self.state[EVICTIONS] += (to_ring & (old_keys >= 0) & ~moved).sum()
        return Placed(slots, torch.where(moved, ring, -1), torch.where(moved, targets, -1))

    def fill(self, keys: torch.Tensor) -> torch.Tensor:
        """Slots among the unused ones for keys that are not resident, -1 for none."""
        needed = self.slots_of(keys) < 0
        rank = torch.cumsum(needed, 0) - 1
        free = self._fresh.numel() * self.rows_per_extent - self.state[FRESH_POSITION]
        to_fresh = needed & (rank < free)
        slots = torch.where(to_fresh, self._take_fresh(to_fresh, rank), -1)
        self._place(keys, slots, torch.zeros_like(keys))
        return slots

    def relocate(self, first: int, count: int) -> Placed:
        """Empties slots first..first+count-1 of one extent; referenced rows go to main with one
        count less (rule 5). `slots` is where each row went."""
        rows = self.rows_per_extent
        slots = torch.arange(first, first + count, device=self.device)
        keys = self._slot_key[first : first + count].long()
        counts = self._slot_count[first : first + count].long()
        filled = slots % rows < self._fill[first // rows]
        moved = filled & (keys >= 0) & (counts > 0)
        if self._order.numel() == 0:
            targets = torch.full_like(slots, -1)
        else:
            rank = torch.cumsum(moved, 0) - 1
            free = self._fresh.numel() * rows - self.state[FRESH_POSITION]
            to_fresh = moved & (rank < free)
            before = self._fill.clone()
            fresh = self._take_fresh(to_fresh, rank)
            targets = torch.where(to_fresh, fresh, self._holes(moved & ~to_fresh, before))
        self._slot_key[first : first + count] = NO_KEY
        self._slot_count[first : first + count] = 0
        self._place(keys, targets, counts - 1)
        self.state[RELOCATIONS] += (targets >= 0).sum()
        return Placed(targets, torch.where(targets >= 0, slots, -1), targets)

    # -- inside ----------------------------------------------------------------------------------

    def _are_ghosts(self, keys: torch.Tensor) -> torch.Tensor:
        entries = self._entries[keys]
        extents = ((entries & _SLOT_MASK) - 1).clamp(min=0) // self.rows_per_extent
        age = (self._generation[extents] - (entries >> _SLOT_BITS)) & GENERATION_MASK
        young = (age >= 1) & (age <= GHOST_GENERATIONS)
        return (entries != 0) & (self._zone[extents] == PROBATION) & young

    def _take_fresh(self, to_fresh: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        """Unused slots of grown main extents for the rows of the mask, in their order."""
        if self._fresh.numel() == 0:
            return torch.full_like(rank, -1)
        rows = self.rows_per_extent
        total = self._fresh.numel() * rows
        position = (self.state[FRESH_POSITION] + rank).clamp(0, total - 1)
        extents = self._fresh[position // rows]
        offset = position % rows
        self._raise_fill(to_fresh, extents, offset)
        self.state[FRESH_POSITION] += to_fresh.sum()
        return torch.where(to_fresh, extents * rows + offset, -1)

    def _overwrite(self, to_ring: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Next slots of the ring for the rows of the mask: (slots, keys of the rows there or -1,
        which of them have been hit)."""
        if self._ring.numel() == 0:
            none = torch.full(to_ring.shape, -1, dtype=torch.int64, device=self.device)
            return none, none, torch.zeros_like(to_ring)
        rows = self.rows_per_extent
        rank = (torch.cumsum(to_ring, 0) - 1).clamp(min=0)
        total = self._ring.numel() * rows
        position = (self.state[RING_POSITION] + rank) % total
        extents = self._ring[position // rows]
        offset = position % rows
        slots = extents * rows + offset
        held = to_ring & (offset < self._fill[extents])
        old_keys = torch.where(held, self._slot_key[slots].long(), NO_KEY)
        promoted = (old_keys >= 0) & (self._slot_count[slots] > 0)
        starts = torch.where(to_ring & (offset == 0), extents, self.max_extents)
        self._generation.index_add_(0, starts, torch.ones_like(starts))
        self._raise_fill(to_ring, extents, offset)
        self.state[RING_POSITION] = (self.state[RING_POSITION] + to_ring.sum()) % total
        return torch.where(to_ring, slots, -1), old_keys, promoted

    def _raise_fill(self, mask: torch.Tensor, extents: torch.Tensor, offset: torch.Tensor) -> None:
        places = torch.where(mask, extents, self.max_extents)
        self._fill.scatter_reduce_(0, places, offset + 1, "amax")

    def _holes(self, wanted: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
        """A slot of main for each row of the mask, -1 for the others and when main is too small
        (rule 4): the hand passes a window, takes what has count 0 in its order, then the lowest.

        `filled` says how many slots of each extent held something before this batch."""
        rows = self.rows_per_extent
        total = self._order.numel() * rows
        window = min(total, WINDOW_PER_HOLE * wanted.numel() + WINDOW_LEAST)
        steps = torch.arange(window, device=self.device)
        position = (self.state[HAND_POSITION] + steps) % total
        extents = self._order[position // rows]
        slots = extents * rows + position % rows
        counts = self._slot_count[slots].long()
        counts = torch.where(position % rows < filled[extents], counts, UNUSED)
        needed = wanted.sum()
        taken = torch.argsort(counts * window + steps)
        rank = torch.cumsum(wanted, 0) - 1
        choice = taken[rank.clamp(0, window - 1)]
        found = wanted & (rank < window) & (counts[choice] < UNUSED)
        # The hand stops behind the last hole it took, or has passed the whole window.
        zeros = torch.cumsum(counts == 0, 0)
        advance = torch.searchsorted(zeros, needed) + 1
        advance = torch.where(needed > 0, advance.clamp(max=window), 0)
        passed = (steps < advance) & (counts > 0) & (counts < UNUSED)
        places = torch.where(passed, slots, self._spare_slot)
        self._slot_count[places] = (counts - 1).to(torch.int8)
        self.state[HAND_POSITION] = (self.state[HAND_POSITION] + advance) % total
        self.state[SWEPT] += advance
        holes = torch.where(found, slots[choice], -1)
        self.state[EVICTIONS] += (found & (self._slot_key[holes.clamp(min=0)] >= 0)).sum()
        return holes

    def _place(self, keys: torch.Tensor, slots: torch.Tensor, counts: torch.Tensor) -> None:
        """Writes slot metadata and entries of rows that have a slot."""
        placed = slots >= 0
        places = torch.where(placed, slots, self._spare_slot)
        self._slot_key[places] = keys.to(torch.int32)
        self._slot_count[places] = counts.to(torch.int8)
        generation = self._generation[slots.clamp(min=0) // self.rows_per_extent]
        entries = ((generation & GENERATION_MASK) << _SLOT_BITS) | (slots + 1)
        self._entries[torch.where(placed, keys, self._spare_key)] = entries
