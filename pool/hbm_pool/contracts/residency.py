"""Who is resident: a ring of events, and a snapshot for a reader that lost its place.

Event i of a boot (the first has sequence 1) lies at place `i % events of the ring` and names its
own sequence under a CRC, so the ring needs no cursor. The snapshot lies in one of two buffers; a
record in two slots says which one is whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final
from zlib import crc32

import numpy as np
import numpy.typing as npt

from hbm_pool.contracts.mapped_file import ControlBlockError
from hbm_pool.contracts.record_slots import READ_RETRIES, SlotReader, SlotWriter, slots_bytes
from hbm_pool.contracts.records import (
    ResidencyEvent,
    ResidencySnapshot,
    UserCached,
    UserEvicted,
)

RING_EVENTS: Final = 1 << 16
MAX_USERS: Final = 1 << 17
"""Users in a snapshot; a pool with more extents than this is refused at start."""
MAX_SHARDS: Final = 1 << 14

_EVENT: Final = struct.Struct("<QqI")
_EVENT_BYTES: Final = 24
_NEVER_WRITTEN: Final = bytes(_EVENT_BYTES)
_EVENT_DTYPE: Final = np.dtype([("sequence", "<u8"), ("user", "<i8"), ("tokens_crc", "<u8")])
EVENTS_BYTES: Final = RING_EVENTS * _EVENT_BYTES

SNAPSHOT: Final = np.dtype(
    [
        ("sequence", "<u8"),
        ("users", "<u8"),
        ("shards", "<u8"),
        ("crc", "<u8"),  # of users, tokens and shard rows, in this order
    ],
    align=True,
)
_HEAD_BYTES: Final = 4096
_BUFFER_BYTES: Final = MAX_USERS * 12 + MAX_SHARDS * 4
SNAPSHOT_BYTES: Final = _HEAD_BYTES + 2 * _BUFFER_BYTES


class EventRingWriter:
    """Appends residency events. One thread."""

    def __init__(self, region: memoryview) -> None:
        """`region` is all zeros: a server makes a new file at each boot."""
        self._ring = region
        self._capacity = len(region) // _EVENT_BYTES
        self.sequence = 0
        """Of the newest event."""

    def push(self, user: int, tokens: int) -> int:
        """Appends an event (0 tokens: evicted) and returns its sequence."""
        sequence = self.sequence + 1
        try:
            event = _EVENT.pack(sequence, user, tokens)
        except struct.error as error:
            raise ControlBlockError(
                f"user {user} with {tokens} tokens is no residency event: a user is a signed "
                "64-bit hash, tokens lie in [0, 2^32)"
            ) from error
        offset = sequence % self._capacity * _EVENT_BYTES
        self._ring[offset : offset + _EVENT_BYTES] = event + crc32(event).to_bytes(4, "little")
        self.sequence = sequence
        return sequence


class EventRingReader:
    """Reads residency events from its own place on."""

    def __init__(self, region: memoryview) -> None:
        self._ring = region
        self._capacity = len(region) // _EVENT_BYTES
        self._sequences: npt.NDArray[Any] = np.frombuffer(region, dtype=_EVENT_DTYPE)["sequence"]
        self.expected = 1
        """Sequence of the next event."""

    def read(self) -> tuple[list[ResidencyEvent], bool]:
        """Events in order (a ring full at most), and whether some were lost behind them.

        After a loss reading goes on behind the newest event: the reader needs a snapshot.
        """
        events: list[ResidencyEvent] = []
        retries = 0
        while len(events) < self._capacity:
            event = self._load(self.expected)
            if event is None and retries < READ_RETRIES:
                retries += 1  # being written right now, or damaged
                continue
            if event is not None and event.sequence == self.expected:
                events.append(event)
                self.expected += 1
                retries = 0
                continue
            if event is not None and event.sequence < self.expected:
                break  # what was written a lap ago: the next event is still to come
            newest = self._newest()
            if newest < self.expected:
                break
            # It may have been completed since; a page fault can hold a write up for long.
            event = self._load(self.expected)
            if event is not None and event.sequence == self.expected:
                continue
            self.expected = newest + 1
            return events, True
        return events, False

    def _load(self, sequence: int) -> ResidencyEvent | None:
        """What lies in the place of an event: that one or another; None when it is not whole."""
        offset = sequence % self._capacity * _EVENT_BYTES
        raw = bytes(self._ring[offset : offset + _EVENT_BYTES])
        if raw == _NEVER_WRITTEN:
            return UserEvicted(0, 0)
        found, user, tokens = _EVENT.unpack_from(raw)
        if (
            found % self._capacity != sequence % self._capacity
            or not found
            or crc32(raw[:20]) != int.from_bytes(raw[20:], "little")
        ):
            return None
        return UserCached(found, user, tokens) if tokens else UserEvicted(found, user)

    def _newest(self) -> int:
        """Sequence of the newest whole event in the ring; 0 while it is empty."""
        sequences = self._sequences.copy()
        while True:
            place = int(np.argmax(sequences))
            if not sequences[place]:
                return 0
            event = self._load(place)
            if event is not None:
                return event.sequence
            sequences[place] = 0


class SnapshotWriter:
    """Writes snapshots, a slice at a time. One thread."""

    def __init__(self, region: memoryview) -> None:
        self._head = SlotWriter(region[: slots_bytes(SNAPSHOT)], SNAPSHOT)
        self._buffers = _buffers(region)
        self._newest: object = None

    def write(self, snapshot: ResidencySnapshot, step: int) -> Iterator[None]:
        """Writes `step` elements per iteration; the snapshot counts once it is exhausted.

        A write that is begun later supersedes this one, which then ends without effect.
        """
        if step < 1:
            raise ControlBlockError(f"a snapshot is written {step} elements at a time; use >= 1")
        users = np.ascontiguousarray(snapshot.users, dtype="<i8")
        tokens = np.ascontiguousarray(snapshot.tokens, dtype="<u4")
        shard_rows = np.ascontiguousarray(snapshot.shard_rows, dtype="<u4")
        if len(users) != len(tokens):
            raise ControlBlockError(f"a snapshot has {len(users)} users and {len(tokens)} tokens")
        if len(users) > MAX_USERS or len(shard_rows) > MAX_SHARDS:
            raise ControlBlockError(
                f"a snapshot has {len(users)} users and {len(shard_rows)} shards; the control "
                f"block holds {MAX_USERS} and {MAX_SHARDS}"
            )
        self._newest = turn = object()
        parts: tuple[npt.NDArray[Any], ...] = (users, tokens, shard_rows)
        return self._slices(turn, int(snapshot.sequence), parts, step)

    def _slices(
        self, turn: object, sequence: int, parts: tuple[npt.NDArray[Any], ...], step: int
    ) -> Iterator[None]:
        buffer = self._buffers[(self._head.sequence + 1) & 1]
        offset = 0
        crc = 0
        for part in parts:
            for start in range(0, len(part), step):
                if self._newest is not turn:
                    return
                raw = part[start : start + step].tobytes()
                buffer[offset : offset + len(raw)] = raw
                crc = crc32(raw, crc)
                offset += len(raw)
                yield
        if self._newest is not turn:
            return
        head = self._head.record
        head["sequence"] = sequence
        head["users"] = len(parts[0])
        head["shards"] = len(parts[2])
        head["crc"] = crc
        self._head.write()


class SnapshotReader:
    """Reads the newest whole snapshot."""

    def __init__(self, region: memoryview) -> None:
        self._head = SlotReader(region[: slots_bytes(SNAPSHOT)], SNAPSHOT)
        self._state = np.zeros((), dtype=SNAPSHOT)
        self._buffers = _buffers(region)
        self._delivered = 0

    def read(self, boot_epoch: int) -> ResidencySnapshot | None:
        """The newest snapshot, or None when there is no newer one than the last returned."""
        head = self._state
        for _ in range(READ_RETRIES):
            if not self._head.read(head) or self._head.sequence == self._delivered:
                return None
            users, shards = int(head["users"]), int(head["shards"])
            if users > MAX_USERS or shards > MAX_SHARDS:
                return None
            raw = bytes(self._buffers[self._head.sequence & 1][: users * 12 + shards * 4])
            if crc32(raw) == int(head["crc"]):
                self._delivered = self._head.sequence
                return ResidencySnapshot(
                    boot_epoch=boot_epoch,
                    sequence=int(head["sequence"]),
                    users=np.frombuffer(raw, "<i8", users),
                    tokens=np.frombuffer(raw, "<u4", users, users * 8),
                    shard_rows=np.frombuffer(raw, "<u4", shards, users * 12),
                )
        return None


def _buffers(region: memoryview) -> tuple[memoryview, memoryview]:
    second = _HEAD_BYTES + _BUFFER_BYTES
    return region[_HEAD_BYTES:second], region[second : second + _BUFFER_BYTES]
