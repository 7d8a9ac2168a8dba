"""Residency events and snapshots: a reader always ends with what the writer holds."""

from __future__ import annotations

import numpy as np
import pytest
from hbm_pool.contracts import residency
from hbm_pool.contracts.mapped_file import ControlBlockError
from hbm_pool.contracts.records import ResidencySnapshot, UserCached, UserEvicted
from hbm_pool.contracts.residency import (
    EventRingReader,
    EventRingWriter,
    SnapshotReader,
    SnapshotWriter,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

EVENTS = 64
EVENT_BYTES = residency.EVENTS_BYTES // residency.RING_EVENTS


def _ring() -> memoryview:
    return memoryview(bytearray(EVENTS * EVENT_BYTES))


def _snapshot_region() -> memoryview:
    return memoryview(bytearray(residency.SNAPSHOT_BYTES))


def _snapshot(users: int, sequence: int, shards: int = 5) -> ResidencySnapshot:
    return ResidencySnapshot(
        boot_epoch=1,
        sequence=sequence,
        users=np.arange(users, dtype=np.int64) - 7,
        tokens=np.full(users, sequence, dtype=np.uint32),
        shard_rows=np.arange(shards, dtype=np.uint32) + np.uint32(sequence),
    )


def _check(snapshot: ResidencySnapshot | None, users: int, sequence: int, shards: int = 5) -> None:
    assert snapshot is not None
    wanted = _snapshot(users, sequence, shards)
    assert snapshot.sequence == sequence
    for got, want in zip(snapshot[2:], wanted[2:], strict=True):
        assert got.dtype == want.dtype
        assert np.array_equal(got, want)


def _exhaust(writer: SnapshotWriter, snapshot: ResidencySnapshot, step: int = 4096) -> int:
    return sum(1 for _ in writer.write(snapshot, step))


def test_events_come_in_order_and_name_their_sequence() -> None:
    region = _ring()
    writer, reader = EventRingWriter(region), EventRingReader(region)
    assert reader.read() == ([], False)
    assert [writer.push(-5, 640), writer.push(2**63 - 1, 1), writer.push(-5, 0)] == [1, 2, 3]
    events = [UserCached(1, -5, 640), UserCached(2, 2**63 - 1, 1), UserEvicted(3, -5)]
    assert reader.read() == (events, False)
    assert reader.read() == ([], False)
    assert EventRingReader(region).read() == (events, False)


@pytest.mark.parametrize("pushed", [EVENTS, EVENTS + 1, 3 * EVENTS + 5])
def test_an_overrun_is_a_gap_and_then_reading_goes_on(pushed: int) -> None:
    region = _ring()
    writer, reader = EventRingWriter(region), EventRingReader(region)
    for user in range(pushed):
        writer.push(user, 1)
    events, gap = reader.read()
    assert gap == (pushed > EVENTS)
    assert len(events) == (0 if gap else EVENTS)
    writer.push(9, 9)
    assert reader.read() == ([UserCached(pushed + 1, 9, 9)], False)


@pytest.mark.parametrize(("user", "tokens"), [(2**63, 1), (1, -1), (1, 2**32)])
def test_what_is_no_event_is_refused_and_takes_no_place(user: int, tokens: int) -> None:
    region = _ring()
    writer = EventRingWriter(region)
    with pytest.raises(ControlBlockError, match=f"user {user} with {tokens} tokens"):
        writer.push(user, tokens)
    assert writer.sequence == 0
    assert EventRingReader(region).read() == ([], False)


@given(st.integers(0, 200), st.integers(0, 200), st.data())
def test_damage_is_a_gap_and_never_an_event(before: int, after: int, data: st.DataObject) -> None:
    region = _ring()
    writer, reader = EventRingWriter(region), EventRingReader(region)
    truth = {}
    for user in range(before):
        truth[writer.push(user, user % 3)] = (user, user % 3)
    reader.read()
    for user in range(after):
        truth[writer.push(user, user % 3)] = (user, user % 3)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(region) - 1))
        noise = data.draw(st.binary(min_size=1, max_size=40))
        region[at : at + len(noise)] = noise[: len(region) - at]
    events, gap = reader.read()
    for event in events:
        assert truth[event.sequence] == (event.user, getattr(event, "tokens", 0))
    assert gap or len(events) <= after
    # Damage to the newest is told by the events behind it; then all is well again.
    for user in range(EVENTS + 1):
        writer.push(user, 1)
    reader.read()
    sequence = writer.push(3, 3)
    assert reader.read() == ([UserCached(sequence, 3, 3)], False)


@given(st.binary(min_size=EVENTS * EVENT_BYTES, max_size=EVENTS * EVENT_BYTES))
def test_foreign_bytes_are_no_events(raw: bytes) -> None:
    assert EventRingReader(memoryview(raw)).read() == ([], False)


def test_an_event_that_takes_long_to_write_is_no_gap() -> None:
    """Its bytes become whole after the reader gave up on them and looked for newer ones."""
    region = _ring()
    writer = EventRingWriter(region)

    class LateReader(EventRingReader):
        def _newest(self) -> int:
            region[:] = finished
            return super()._newest()

    reader = LateReader(region)
    writer.push(1, 64)
    half = bytearray(region)
    half[EVENT_BYTES + 12 : 2 * EVENT_BYTES] = bytes(EVENT_BYTES - 12)
    finished = bytes(region)
    region[:] = half
    assert reader.read() == ([UserCached(1, 1, 64)], False)


@pytest.mark.parametrize("before", [0, 5, EVENTS, 2 * EVENTS + 3])
def test_a_kill_at_every_byte_of_an_event_tears_none(before: int) -> None:
    region = _ring()
    writer, reader = EventRingWriter(region), EventRingReader(region)
    for user in range(before):
        writer.push(user, 1)
        reader.read()
    old = bytes(region)
    sequence = writer.push(-77, 640)
    new = bytes(region)
    place = sequence % EVENTS * EVENT_BYTES
    for length in range(EVENT_BYTES):
        region[:] = old
        region[place : place + length] = new[place : place + length]
        if bytes(region) != new:
            assert reader.read() == ([], False)
    region[:] = new
    assert reader.read() == ([UserCached(sequence, -77, 640)], False)


@given(
    st.lists(
        st.tuples(st.integers(0, 10_000), st.integers(0, 300), st.integers(1, 5000)), max_size=5
    )
)
@settings(max_examples=40)
def test_a_snapshot_is_read_once_and_whole(writes: list[tuple[int, int, int]]) -> None:
    region = _snapshot_region()
    writer, reader = SnapshotWriter(region), SnapshotReader(region)
    assert reader.read(1) is None
    for sequence, (users, shards, step) in enumerate(writes, start=1):
        slices = _exhaust(writer, _snapshot(users, sequence, shards), step)
        assert slices == -(-users // step) * 2 + -(-shards // step)
        _check(reader.read(1), users, sequence, shards)
        assert reader.read(1) is None
        _check(SnapshotReader(region).read(1), users, sequence, shards)


def test_the_largest_snapshot_fits_and_a_larger_one_is_refused() -> None:
    region = _snapshot_region()
    writer, reader = SnapshotWriter(region), SnapshotReader(region)
    _exhaust(writer, _snapshot(residency.MAX_USERS, 1, residency.MAX_SHARDS))
    _exhaust(writer, _snapshot(residency.MAX_USERS, 2, residency.MAX_SHARDS))
    _check(reader.read(1), residency.MAX_USERS, 2, residency.MAX_SHARDS)
    with pytest.raises(ControlBlockError, match=f"{residency.MAX_USERS + 1} users"):
        writer.write(_snapshot(residency.MAX_USERS + 1, 3), 4096)
    with pytest.raises(ControlBlockError, match=f"{residency.MAX_SHARDS + 1} shards"):
        writer.write(_snapshot(1, 3, residency.MAX_SHARDS + 1), 4096)
    with pytest.raises(ControlBlockError, match="10 users and 9 tokens"):
        writer.write(_snapshot(10, 3)._replace(tokens=np.zeros(9, np.uint32)), 4096)
    with pytest.raises(ControlBlockError, match="0 elements at a time"):
        writer.write(_snapshot(10, 3), 0)
    assert reader.read(1) is None


def test_an_unfinished_snapshot_is_not_there_and_a_later_one_supersedes_it() -> None:
    region = _snapshot_region()
    writer, reader = SnapshotWriter(region), SnapshotReader(region)
    _exhaust(writer, _snapshot(100, 1))
    abandoned = writer.write(_snapshot(100, 2), 10)
    next(abandoned)
    _check(reader.read(1), 100, 1)
    _exhaust(writer, _snapshot(100, 3))
    assert list(abandoned) == []
    _check(reader.read(1), 100, 3)
    # At any slice of a write the snapshot before it is whole.
    for _ in writer.write(_snapshot(200, 4), 7):
        _check(SnapshotReader(region).read(1), 100, 3)
    _check(reader.read(1), 200, 4)


@given(st.integers(1, 3), st.data())
def test_damage_to_a_snapshot_is_no_snapshot(writes: int, data: st.DataObject) -> None:
    region = _snapshot_region()
    writer = SnapshotWriter(region)
    for sequence in range(1, writes + 1):
        _exhaust(writer, _snapshot(50, sequence))
    places = st.integers(0, 200) | st.integers(4096, 4096 + 700)
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(places) + data.draw(st.sampled_from([0, residency._BUFFER_BYTES]))
        noise = data.draw(st.binary(min_size=1, max_size=40))
        region[at : at + len(noise)] = noise
    found = SnapshotReader(region).read(1)
    if found is not None:
        _check(found, 50, found.sequence)
        assert found.sequence in (writes, writes - 1)


class Follower(RuleBasedStateMachine):
    """A server and a reader as admin is one: whatever is lost, the reader ends with the truth."""

    @initialize()
    def start(self) -> None:
        events, snapshots = _ring(), _snapshot_region()
        self.events, self.snapshots = EventRingWriter(events), SnapshotWriter(snapshots)
        self.reader, self.snapshot_reader = EventRingReader(events), SnapshotReader(snapshots)
        self.resident: dict[int, int] = {}
        self.known: dict[int, int] | None = {}

    @rule(users=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=150))
    def change(self, users: list[tuple[int, int]]) -> None:
        for user, tokens in users:
            self.events.push(user, tokens)
            if tokens:
                self.resident[user] = tokens
            else:
                self.resident.pop(user, None)

    @rule(changes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=80))
    def snapshot(self, changes: list[tuple[int, int]]) -> None:
        """Users come and go while it is written: it says what was so when it was begun."""
        snapshot = ResidencySnapshot(
            1,
            self.events.sequence,
            np.array(list(self.resident), dtype=np.int64),
            np.array(list(self.resident.values()), dtype=np.uint32),
            np.zeros(2, np.uint32),
        )
        slices = self.snapshots.write(snapshot, 1)
        next(slices, None)
        self.change(changes)
        for _ in slices:
            pass

    @rule()
    def follow(self) -> None:
        snapshot = self.snapshot_reader.read(1)
        if snapshot is not None:
            self.reader.expected = snapshot.sequence + 1
            self.known = dict(zip(snapshot.users.tolist(), snapshot.tokens.tolist(), strict=True))
        events, gap = self.reader.read()
        for event in events:
            if self.known is None:
                continue
            if isinstance(event, UserCached):
                self.known[event.user] = event.tokens
            else:
                self.known.pop(event.user, None)
        if gap:
            self.known = None
        if self.known is not None and len(events) < EVENTS:
            assert self.known == self.resident

    def teardown(self) -> None:
        if hasattr(self, "events"):
            self.snapshot([])
            self.follow()
            assert self.known == self.resident


TestFollower = Follower.TestCase
TestFollower.settings = settings(max_examples=60, stateful_step_count=20)
