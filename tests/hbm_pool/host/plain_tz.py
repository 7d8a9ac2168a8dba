"""Rules 1 to 6 of TZ in plain Python, written from the rules and not from the kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

Slot = tuple[int, int]  # extent, offset


def probation_share(total: int) -> int:
    return 0 if total < 2 else max(1, int(total / 10 + 0.5))


@dataclass
class PlainTz:
    rows: int
    ring: list[int] = field(default_factory=list)  # next to be overwritten first
    ring_offset: int = 0
    main: list[int] = field(default_factory=list)  # under the hand first
    hand_offset: int = 0
    held: dict[Slot, list[int]] = field(default_factory=dict)  # slot -> [key, count]
    used: dict[int, int] = field(default_factory=dict)  # extent -> slots ever filled
    generation: dict[int, int] = field(default_factory=dict)
    entries: dict[int, tuple[Slot, int]] = field(default_factory=dict)  # also stale ones
    fresh: list[int] = field(default_factory=list)  # main extents with unused slots
    grown: list[int] = field(default_factory=list)  # main extents not swept since, oldest first
    draining: list[int] = field(default_factory=list)
    drain_offset: int = 0

    def resident(self) -> dict[int, Slot]:
        return {key: slot for slot, (key, _) in self.held.items()}

    def access(self, key: int) -> bool:
        entry = self.entries.get(key)
        if entry is not None and self.held.get(entry[0], [None])[0] == key:
            row = self.held[entry[0]]
            row[1] = min(3, row[1] + 1)
            return True
        self.insert(key)
        return False

    def is_ghost(self, key: int) -> bool:
        if key not in self.entries:
            return False
        (extent, _), generation = self.entries[key]
        return extent in self.ring and 1 <= self.generation[extent] - generation <= 9

    def insert(self, key: int) -> None:
        if not self.ring and not self.main:
            return
        if not self.ring or (self.is_ghost(key) and self.main):
            self.put(key, 0, self.main_hole())
        elif self.fresh:
            self.put(key, 0, self.unused_slot())
        else:
            self.overwrite_ring(key)

    def overwrite_ring(self, key: int) -> None:
        extent = self.ring[0]
        if self.ring_offset == 0:
            self.generation[extent] += 1
        slot = (extent, self.ring_offset)
        self.used[extent] = max(self.used[extent], self.ring_offset + 1)
        if slot in self.held:
            old, count = self.held.pop(slot)
            if count >= 1 and self.main:
                self.put(old, 0, self.main_hole())
        self.put(key, 0, slot)
        self.ring_offset += 1
        if self.ring_offset == self.rows:
            self.ring_offset = 0
            self.ring.append(self.ring.pop(0))

    def unused_slot(self) -> Slot:
        extent = self.fresh[0]
        slot = (extent, self.used[extent])
        self.used[extent] += 1
        if self.used[extent] == self.rows:
            self.fresh.pop(0)
        return slot

    def main_hole(self) -> Slot:
        if self.fresh:
            return self.unused_slot()
        lowest: tuple[int, Slot] | None = None
        for _ in range(16):
            slot = (self.main[0], self.hand_offset)
            row = self.held.get(slot)
            count = row[1] if row else 0
            self.hand_offset += 1
            if self.hand_offset == self.rows:
                self.hand_offset = 0
                swept = self.main.pop(0)
                self.main.append(swept)
                if swept in self.grown:
                    self.grown.remove(swept)
            if lowest is None or count < lowest[0]:
                lowest = (count, slot)
            if count == 0:
                break
            assert row is not None
            row[1] -= 1
        assert lowest is not None
        self.held.pop(lowest[1], None)
        return lowest[1]

    def put(self, key: int, count: int, slot: Slot) -> None:
        self.held[slot] = [key, count]
        self.entries[key] = (slot, self.generation[slot[0]])

    def to_ring(self, extents: list[int]) -> None:
        at = 1 if self.ring and self.ring_offset > 0 else 0
        self.ring[at:at] = extents

    def behind_hand(self, extents: list[int]) -> None:
        """The hand comes to them last; into an empty main they go as they are."""
        self.main.extend(extents)

    def grow(self, extents: list[int]) -> None:
        total = len(self.ring) + len(self.main) + len(extents)
        count = min(len(extents), max(0, probation_share(total) - len(self.ring)))
        for extent in extents:
            self.used[extent] = 0
            self.generation[extent] = self.generation.get(extent, 0) + 10
        self.to_ring(extents[:count])
        self.behind_hand(extents[count:])
        self.fresh += extents[count:]
        self.grown += extents[count:]

    def take(self, count: int) -> list[int]:
        total = len(self.ring) + len(self.main)
        count = min(count, total)
        from_ring = min(len(self.ring), max(0, len(self.ring) - probation_share(total - count)))
        from_main = min(count - from_ring, len(self.main))
        from_ring = count - from_main
        begun = 1 if self.ring_offset > 0 else 0
        victims = (self.ring[begun:] + self.ring[:begun])[:from_ring]
        newest = self.grown[::-1]
        victims += (newest + [e for e in self.main if e not in newest])[:from_main]
        if self.ring and self.ring[0] in victims:
            self.ring_offset = 0
        if self.main and self.main[0] in victims:
            self.hand_offset = 0
        for extents in (self.ring, self.main, self.fresh, self.grown):
            extents[:] = [extent for extent in extents if extent not in victims]
        return victims

    def void(self, extents: list[int]) -> None:
        for slot in [slot for slot in self.held if slot[0] in extents]:
            del self.held[slot]

    def drop(self, count: int) -> list[int]:
        released = []
        while self.draining and len(released) < count:
            released.append(self.draining.pop())
        if not self.draining:
            self.drain_offset = 0
        released += self.take(count - len(released))
        self.void(released)
        return released

    def plan_shrink(self, count: int) -> int:
        victims = self.take(count)
        self.draining += victims
        return len(victims)

    def shrink_slice(self, limit: int) -> list[int]:
        released = []
        while self.draining and limit > 0:
            extent = self.draining[0]
            while self.drain_offset < self.used[extent] and limit > 0:
                row = self.held.pop((extent, self.drain_offset), None)
                if row is not None and row[1] > 0 and self.main:
                    self.put(row[0], row[1] - 1, self.main_hole())
                self.drain_offset += 1
                limit -= 1
            if self.drain_offset >= self.used[extent]:
                released.append(self.draining.pop(0))
                self.drain_offset = 0
        return released

    def cancel_shrink(self) -> int:
        back, self.draining, self.drain_offset = self.draining, [], 0
        total = len(self.ring) + len(self.main) + len(back)
        count = min(len(back), max(0, probation_share(total) - len(self.ring)))
        for extent in back:
            self.used[extent] = self.rows
        self.to_ring(back[:count])
        self.behind_hand(back[count:])
        return len(back)
