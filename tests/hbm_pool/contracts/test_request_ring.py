"""The request ring: order, exact loss, damage, and readers that come and go."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hbm_pool.contracts import request_ring
from hbm_pool.contracts.mapped_file import ControlBlockError
from hbm_pool.contracts.record_slots import slots_bytes
from hbm_pool.contracts.records import RequestSample
from hbm_pool.contracts.request_ring import (
    RequestRingReader,
    RequestRingWriter,
    decode_sample,
    encode_sample,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

RING_BYTES = 16384
HEAD_BYTES = request_ring.REGION_BYTES - request_ring.RING_BYTES
TOO_LARGE = 200  # history keys: more than an eighth of this ring
FOR_ANY_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

MakeSample = Callable[..., RequestSample]
SameSample = Callable[[RequestSample, RequestSample], bool]


def _region() -> memoryview:
    return memoryview(bytearray(HEAD_BYTES + RING_BYTES))


def _number(sample: RequestSample) -> int:
    return sample.user + (1 << 62)


def test_samples_come_out_as_they_went_in(make_sample: MakeSample, same_sample: SameSample) -> None:
    region = _region()
    writer = RequestRingWriter(region)
    reader = RequestRingReader(region, from_start=False)
    samples = [make_sample(number, number % 9, number % 5) for number in range(40)]
    assert all(writer.push(sample) for sample in samples)
    first, lost = reader.read(15)
    rest, more_lost = reader.read(1000)
    assert lost == more_lost == 0
    assert len(first) == 15
    assert len(first + rest) == 40
    assert all(map(same_sample, first + rest, samples))
    assert reader.read(10) == ([], 0)


def test_an_anonymous_sample_without_arrays_passes(same_sample: SameSample) -> None:
    nothing = np.empty(0, np.uint64)
    short = np.empty(0, np.uint32)
    sample = RequestSample(0, 0, 0, 0, 0, short, nothing, short, nothing)
    decoded = decode_sample(encode_sample(sample))
    assert decoded is not None
    assert same_sample(decoded, sample)


def test_arrays_of_other_types_and_strides_are_taken(
    make_sample: MakeSample, same_sample: SameSample
) -> None:
    sample = make_sample(5, 10)
    odd = sample._replace(
        history_keys=np.repeat(sample.history_keys.astype(np.int64), 2)[::2],
        history_positions=sample.history_positions.astype(np.int64),
    )
    decoded = decode_sample(encode_sample(odd))
    assert decoded is not None
    assert same_sample(decoded, sample)


def test_a_sample_that_contradicts_itself_is_refused(make_sample: MakeSample) -> None:
    sample = make_sample(1)
    with pytest.raises(ControlBlockError, match="12 history keys and 2 positions"):
        encode_sample(sample._replace(history_positions=np.zeros(2, np.uint32)))
    with pytest.raises(ControlBlockError, match="-1 history tokens"):
        encode_sample(sample._replace(history_tokens=-1))
    with pytest.raises(ControlBlockError, match="does not fit"):
        encode_sample(sample._replace(user=1 << 63))


def test_too_large_a_sample_is_counted_as_lost(make_sample: MakeSample) -> None:
    region = _region()
    writer = RequestRingWriter(region)
    reader = RequestRingReader(region, from_start=False)
    assert not writer.push(make_sample(0, TOO_LARGE))
    assert writer.lost == 1
    assert reader.read(10) == ([], 1)
    assert writer.push(make_sample(1))
    assert not writer.push(make_sample(2, TOO_LARGE))
    assert writer.push(make_sample(3))
    samples, lost = reader.read(10)
    assert ([_number(sample) for sample in samples], lost) == ([1, 3], 1)


def test_samples_dropped_before_the_ring_are_counted_as_lost(make_sample: MakeSample) -> None:
    region = _region()
    writer = RequestRingWriter(region)
    reader = RequestRingReader(region, from_start=False)
    writer.push(make_sample(0))
    writer.lose(5)
    samples, lost = reader.read(10)
    assert (len(samples), lost, writer.lost) == (1, 5, 5)
    writer.lose(2)
    writer.push(make_sample(8))
    samples, lost = reader.read(10)
    assert ([_number(sample) for sample in samples], lost) == ([8], 2)
    with pytest.raises(ControlBlockError, match="-1 samples"):
        writer.lose(-1)


def test_an_overrun_reader_goes_on_in_the_ring_and_counts(make_sample: MakeSample) -> None:
    region = _region()
    writer = RequestRingWriter(region)
    reader = RequestRingReader(region, from_start=False)
    for number in range(500):
        writer.push(make_sample(number))
    samples, lost = reader.read(1000)
    numbers = [_number(sample) for sample in samples]
    assert numbers == list(range(lost, 500))
    # It does not throw away what the ring still holds.
    stored = sum(len(encode_sample(sample)) for sample in samples)
    assert stored > RING_BYTES / 2


def test_a_new_reader_begins_with_what_is_there_and_has_lost_nothing(
    make_sample: MakeSample,
) -> None:
    region = _region()
    writer = RequestRingWriter(region)
    for number in range(500):
        writer.push(make_sample(number))
    samples, lost = RequestRingReader(region, from_start=False).read(1000)
    assert lost == 0
    numbers = [_number(sample) for sample in samples]
    assert numbers == list(range(numbers[0], 500))
    all_of_them, lost = RequestRingReader(region, from_start=True).read(1000)
    assert lost + len(all_of_them) == 500


def test_what_a_reader_left_unread_is_known(make_sample: MakeSample) -> None:
    region = _region()
    writer = RequestRingWriter(region)
    reader = RequestRingReader(region, from_start=True)
    for number in range(300):
        writer.push(make_sample(number))
    samples, lost = reader.read(3)
    assert reader.unread() == 300 - 3 - lost
    assert len(samples) == 3


class Rings(RuleBasedStateMachine):
    """Any order of pushes and reads: each reader gets, or counts as lost, every sample once."""

    make: MakeSample
    same: SameSample

    @initialize()
    def start(self) -> None:
        self.region = _region()
        self.writer = RequestRingWriter(self.region)
        self.samples: list[RequestSample] = []
        self.readers: list[tuple[RequestRingReader, list[int]]] = []  # with [first, next]

    @rule(sizes=st.lists(st.sampled_from([0, 1, 7, 50, 130, TOO_LARGE]), max_size=60))
    def push(self, sizes: list[int]) -> None:
        for size in sizes:
            sample = self.make(len(self.samples), size)
            self.samples.append(sample)
            assert self.writer.push(sample) == (size < TOO_LARGE)

    @rule(from_start=st.booleans())
    def attach(self, from_start: bool) -> None:
        reader = RequestRingReader(self.region, from_start=from_start)
        first = 0 if from_start else len(self.samples) - reader.unread()
        self.readers.append((reader, [first]))

    @rule(limit=st.integers(0, 200), index=st.integers(0, 9))
    def read(self, limit: int, index: int) -> None:
        if not self.readers:
            return
        reader, place = self.readers[index % len(self.readers)]
        samples, lost = reader.read(limit)
        assert len(samples) <= limit
        numbers = [_number(sample) for sample in samples]
        assert numbers == sorted(set(numbers))
        assert not numbers or numbers[0] >= place[0]
        assert all(self.same(sample, self.samples[_number(sample)]) for sample in samples)
        place[0] += len(samples) + lost
        assert place[0] + reader.unread() == len(self.samples)

    @invariant()
    def readers_know_what_is_left(self) -> None:
        for reader, place in self.readers:
            assert place[0] + reader.unread() == len(self.samples)


def test_every_reader_accounts_for_every_sample(
    make_sample: MakeSample, same_sample: SameSample
) -> None:
    machine = type(
        "BoundRings",
        (Rings,),
        {"make": staticmethod(make_sample), "same": staticmethod(same_sample)},
    )
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
    machine.TestCase("runTest").runTest()


@FOR_ANY_FIXTURE
@given(pushed=st.integers(1, 300), before=st.integers(0, 300), data=st.data())
def test_damage_in_the_ring_is_skipped_and_counted(
    make_sample: MakeSample,
    same_sample: SameSample,
    pushed: int,
    before: int,
    data: st.DataObject,
) -> None:
    region = _region()
    writer = RequestRingWriter(region)
    reader = RequestRingReader(region, from_start=True)
    lost = delivered = 0
    for number in range(before):
        writer.push(make_sample(number))
    samples, lost = reader.read(1000)
    delivered = len(samples)
    for number in range(before, before + pushed):
        writer.push(make_sample(number))
    # Anything but the cursor: marks, the reserved position, records.
    for _ in range(data.draw(st.integers(1, 10))):
        at = data.draw(st.integers(slots_bytes(request_ring.CURSOR), len(region) - 1))
        noise = data.draw(st.binary(min_size=1, max_size=64))
        region[at : at + len(noise)] = noise[: len(region) - at]
    samples, more_lost = reader.read(1000)
    assert all(same_sample(sample, make_sample(_number(sample))) for sample in samples)
    numbers = [_number(sample) for sample in samples]
    assert numbers == sorted(set(numbers))
    assert delivered + lost + len(samples) + more_lost == before + pushed
    # The damage is behind the reader: new samples arrive.
    region[slots_bytes(request_ring.CURSOR) :][:8] = bytes(8)
    writer.push(make_sample(before + pushed))
    samples, more_lost = reader.read(1000)
    assert [_number(sample) for sample in samples] == [before + pushed]
    assert more_lost == 0


def test_an_old_record_in_a_new_place_is_not_delivered_again(make_sample: MakeSample) -> None:
    region = _region()
    writer = RequestRingWriter(region)
    reader = RequestRingReader(region, from_start=True)
    for number in range(10):
        writer.push(make_sample(number))
    size = writer.head // 10
    assert len(reader.read(5)[0]) == 5
    records = region[HEAD_BYTES:]
    records[5 * size : 6 * size] = records[2 * size : 3 * size]  # whole, but read before
    samples, lost = reader.read(100)
    numbers = [_number(sample) for sample in samples]
    assert all(number > 5 for number in numbers)
    assert len(numbers) + lost == 5


@FOR_ANY_FIXTURE
@given(noise=st.binary(min_size=1, max_size=64), at=st.integers(0, HEAD_BYTES + 2000))
def test_a_damaged_cursor_makes_up_nothing(
    make_sample: MakeSample, same_sample: SameSample, noise: bytes, at: int
) -> None:
    region = _region()
    writer = RequestRingWriter(region)
    reader = RequestRingReader(region, from_start=True)
    for number in range(30):
        writer.push(make_sample(number))
    region[at : at + len(noise)] = noise
    samples, lost = reader.read(100)
    assert all(same_sample(sample, make_sample(_number(sample))) for sample in samples)
    assert len(samples) + lost <= 30
    RequestRingReader(region, from_start=False).read(100)


@FOR_ANY_FIXTURE
@given(
    head=st.integers(0, 2**64 - 1),
    next_sequence=st.integers(0, 2**64 - 1),
    body=st.binary(max_size=200),
    skips=st.booleans(),
)
@example(head=2**64 - 1, next_sequence=2**64 - 1, body=b"", skips=True)
def test_a_lying_writer_holds_no_reader_up(
    head: int, next_sequence: int, body: bytes, skips: bool
) -> None:
    """Valid checksums over nonsense: a reader of another release, or a hostile one, wrote it."""
    region = _region()
    writer = RequestRingWriter(region)
    if skips:
        for offset in range(0, RING_BYTES, 16):
            writer._store(offset, request_ring._SKIP, 0, b"")
    else:
        writer._store(0, len(body), 0, body)
    writer._cursor.record["head"] = head
    writer._cursor.record["next_sequence"] = next_sequence
    writer._cursor.write()
    for from_start in (True, False):
        samples, lost = RequestRingReader(region, from_start=from_start).read(100)
        assert 0 <= lost <= next_sequence
        assert len(samples) <= 1


@given(st.binary(max_size=400))
@example(b"\xff" * 48)
def test_foreign_bytes_are_no_sample(payload: bytes) -> None:
    sample = decode_sample(payload)
    if sample is not None:
        assert encode_sample(sample)[: len(payload)] == payload


def test_a_kill_at_every_byte_of_a_push_tears_no_sample(
    make_sample: MakeSample, same_sample: SameSample
) -> None:
    """Every prefix of the stores of a push, in their order, on a ring that is being lapped."""
    for pushed in (3, 200, 203):
        region = _region()
        writer = RequestRingWriter(region)
        lagging = []
        for number in range(pushed):
            writer.push(make_sample(number))
            if number == pushed - 60:
                lagging = [RequestRingReader(region, from_start=False) for _ in range(2)]
                assert all(reader.read(1000)[1] == 0 for reader in lagging)
        before = bytes(region)
        writer.push(make_sample(pushed))
        after = bytes(region)
        cursor = slots_bytes(request_ring.CURSOR)
        # The order of the writer: reserved position, record, mark, cursor.
        order = [*range(cursor, cursor + 8), *range(HEAD_BYTES, len(region))]
        order += [*range(cursor + 8, HEAD_BYTES), *range(cursor)]
        changed = [at for at in order if before[at] != after[at]]
        region[:] = before
        for done in range(len(changed) + 1):
            if done:
                region[changed[done - 1]] = after[changed[done - 1]]
            for reader in (
                RequestRingReader(region, from_start=True),
                RequestRingReader(region, from_start=False),
                *lagging[:1],
            ):
                samples, _ = reader.read(1000)
                assert all(same_sample(each, make_sample(_number(each))) for each in samples)
                numbers = [_number(sample) for sample in samples]
                assert numbers == sorted(set(numbers))
                newest = pushed if done == len(changed) else pushed - 1
                assert not numbers or numbers[-1] == newest
        for reader in lagging[1:]:
            samples, lost = reader.read(1000)
            assert len(samples) + lost == 60
