"""A lossy byte ring of request samples: one writer, any number of readers, none of which it knows.

Positions count bytes since the start and never wrap; a record lies at `position % ring bytes`,
aligned to 16 bytes, and never crosses the end. Every sample the server offered has a sequence
number, so a reader counts what it lost exactly, whether it was overrun, the sample was too large
or the bytes are damaged. A reader that lost its place goes on at the next mark: the first record
of each segment of the ring is noted down.

Record: `crc u32 | payload bytes u32 | sequence u64 | payload`; the CRC covers all behind it.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple
from zlib import crc32

import numpy as np

from hbm_pool.contracts.mapped_file import ControlBlockError
from hbm_pool.contracts.record_slots import SlotReader, SlotWriter, slots_bytes
from hbm_pool.contracts.records import RequestSample

RING_BYTES: Final = 8 << 20
SEGMENTS: Final = 32
MAX_RECORD_SHARE: Final = 8
"""A sample larger than this part of the ring is lost: it would push out too many others."""

_RECORD: Final = struct.Struct("<IIQ")
_ALIGN: Final = 16
_SKIP: Final = 0xFFFFFFFF  # payload bytes of the record that says "go on at the start of the ring"
_MARK: Final = struct.Struct("<QQI")
_MARK_BYTES: Final = 24
# user, history_tokens, candidates, rows_total, history_rows_total, then the number of
# fingerprints, history keys and candidate keys
_SAMPLE: Final = struct.Struct("<qIIIIIIII")
_SAMPLE_HEAD: Final = 48  # arrays of 8-byte keys start aligned

CURSOR: Final = np.dtype(
    [
        ("head", "<u8"),  # bytes written since the start
        ("next_sequence", "<u8"),  # samples offered since the start, too large ones included
    ],
    align=True,
)

_CURSOR_BYTES: Final = slots_bytes(CURSOR)
_RESERVE_OFFSET: Final = _CURSOR_BYTES
_MARKS_OFFSET: Final = _RESERVE_OFFSET + 64
_DATA_OFFSET: Final = 4096
REGION_BYTES: Final = _DATA_OFFSET + RING_BYTES


def encode_sample(sample: RequestSample) -> bytes:
    """A sample as bytes. `ControlBlockError` when its numbers or arrays do not fit together."""
    history_keys = np.ascontiguousarray(sample.history_keys, dtype="<u8")
    positions = np.ascontiguousarray(sample.history_positions, dtype="<u4")
    candidate_keys = np.ascontiguousarray(sample.candidate_keys, dtype="<u8")
    fingerprints = np.ascontiguousarray(sample.page_fingerprints, dtype="<u4")
    if len(positions) != len(history_keys):
        raise ControlBlockError(
            f"a request sample has {len(history_keys)} history keys and {len(positions)} "
            "positions; every key has one"
        )
    try:
        head = _SAMPLE.pack(
            sample.user,
            sample.history_tokens,
            sample.candidates,
            sample.rows_total,
            sample.history_rows_total,
            len(fingerprints),
            len(history_keys),
            len(candidate_keys),
            0,
        )
    except struct.error as error:
        raise ControlBlockError(
            f"a request sample does not fit into the ring ({error}): user {sample.user}, "
            f"{sample.history_tokens} history tokens, {sample.candidates} candidates, "
            f"{sample.history_rows_total} of {sample.rows_total} rows in the history"
        ) from error
    return b"".join(
        (
            head.ljust(_SAMPLE_HEAD, b"\0"),
            history_keys.tobytes(),
            candidate_keys.tobytes(),
            positions.tobytes(),
            fingerprints.tobytes(),
        )
    )


def decode_sample(payload: bytes) -> RequestSample | None:
    """The sample in `payload`; None when the bytes are no sample. The arrays are read-only."""
    if len(payload) < _SAMPLE_HEAD:
        return None
    (
        user,
        history_tokens,
        candidates,
        rows_total,
        history_rows_total,
        n_fingerprints,
        n_history,
        n_candidates,
        _,
    ) = _SAMPLE.unpack_from(payload)
    if len(payload) != _SAMPLE_HEAD + 12 * n_history + 8 * n_candidates + 4 * n_fingerprints:
        return None
    candidates_at = _SAMPLE_HEAD + 8 * n_history
    positions_at = candidates_at + 8 * n_candidates
    fingerprints_at = positions_at + 4 * n_history
    return RequestSample(
        user=user,
        history_tokens=history_tokens,
        candidates=candidates,
        rows_total=rows_total,
        history_rows_total=history_rows_total,
        page_fingerprints=np.frombuffer(payload, "<u4", n_fingerprints, fingerprints_at),
        history_keys=np.frombuffer(payload, "<u8", n_history, _SAMPLE_HEAD),
        history_positions=np.frombuffer(payload, "<u4", n_history, positions_at),
        candidate_keys=np.frombuffer(payload, "<u8", n_candidates, candidates_at),
    )


class _Ring:
    """The parts of the region. The size of the ring follows from the size of the region."""

    def __init__(self, region: memoryview) -> None:
        self._cursor_slots = region[:_CURSOR_BYTES]
        self._reserve = region[_RESERVE_OFFSET : _RESERVE_OFFSET + 8].cast("Q")
        self._marks = region[_MARKS_OFFSET : _MARKS_OFFSET + SEGMENTS * _MARK_BYTES]
        self._data = region[_DATA_OFFSET:]
        self._ring_bytes = len(self._data)
        self._segment_bytes = self._ring_bytes // SEGMENTS
        if self._ring_bytes == 0 or self._ring_bytes % (SEGMENTS * _ALIGN):
            raise ControlBlockError(
                f"a request ring of {self._ring_bytes} bytes is no multiple of {SEGMENTS * _ALIGN}"
            )


class RequestRingWriter(_Ring):
    """Appends samples. One thread; it never waits for a reader."""

    def __init__(self, region: memoryview) -> None:
        """`region` is all zeros: a server makes a new file at each boot."""
        super().__init__(region)
        self._cursor = SlotWriter(self._cursor_slots, CURSOR)
        self._segment = -1
        self._head_word = self._cursor.word("head")
        self._next_sequence_word = self._cursor.word("next_sequence")
        self.head = 0
        self.next_sequence = 0
        self.lost = 0
        """Samples that were not stored: too large, or dropped before."""

    def push(self, sample: RequestSample) -> bool:
        """Appends a sample; False when it is too large, which counts as lost."""
        payload = encode_sample(sample)
        size = _RECORD.size + len(payload)
        stored = size <= self._ring_bytes // MAX_RECORD_SHARE
        if stored:
            self._append(payload, -(-size // _ALIGN) * _ALIGN)
        self._advance(1, stored)
        return stored

    def lose(self, count: int) -> None:
        """Counts samples as lost that were dropped before they came here."""
        if count < 0:
            raise ControlBlockError(f"{count} samples cannot be lost")
        self._advance(count, False)

    def _advance(self, count: int, stored: bool) -> None:
        if not stored:
            self.lost += count
        self.next_sequence += count
        self._head_word[0] = self.head
        self._next_sequence_word[0] = self.next_sequence
        self._cursor.write()

    def _append(self, payload: bytes, total: int) -> None:
        position = self.head
        offset = position % self._ring_bytes
        room = self._ring_bytes - offset
        sequence = self.next_sequence
        # Readers hear of the overwriting before it begins; CRC and sequence are the proof.
        if total > room:
            self._reserve[0] = position + room + total
            self._store(offset, _SKIP, sequence, b"")
            position += room
            offset = 0
        else:
            self._reserve[0] = position + total
        self._store(offset, len(payload), sequence, payload)
        segment = position // self._segment_bytes
        if segment != self._segment:
            self._segment = segment
            place = segment % SEGMENTS * _MARK_BYTES
            mark = _MARK.pack(position, sequence, 0)[:16]
            self._marks[place : place + 20] = mark + crc32(mark).to_bytes(4, "little")
        self.head = position + total

    def _store(self, offset: int, size: int, sequence: int, payload: bytes) -> None:
        behind = _RECORD.pack(0, size, sequence)[4:] + payload
        record = crc32(behind).to_bytes(4, "little") + behind
        self._data[offset : offset + len(record)] = record


class _Mark(NamedTuple):
    position: int
    sequence: int


class RequestRingReader(_Ring):
    """Reads samples from its own place on; independent of other readers and of the writer."""

    def __init__(self, region: memoryview, *, from_start: bool) -> None:
        """`from_start`: everything since the boot counts (a reader that saw the boot before);
        otherwise it begins with what the ring still holds, and nothing is lost yet."""
        super().__init__(region)
        self._cursor = SlotReader(self._cursor_slots, CURSOR)
        self._state = np.zeros((), dtype=CURSOR)
        self._position = 0
        self._expected = 0
        if not from_start:
            head, next_sequence = self._read_cursor()
            if head > self._ring_bytes:
                marks = self._marks_within(0, head)
                self._position, self._expected = marks[0] if marks else (head, next_sequence)

    def unread(self) -> int:
        """Samples offered by the writer that this reader has neither got nor counted as lost."""
        return max(0, self._read_cursor()[1] - self._expected)

    def read(self, limit: int) -> tuple[list[RequestSample], int]:
        """At most `limit` samples in order, and how many were lost since the last call."""
        head, next_sequence = self._read_cursor()
        samples: list[RequestSample] = []
        lost = 0
        while len(samples) < limit and self._position < head:
            position = self._position
            if head - position > self._ring_bytes:
                self._position = self._resume(position, head)
                continue
            offset = position % self._ring_bytes
            size, sequence, payload = self._load(position, offset)
            if size == _SKIP:
                self._position = position + self._ring_bytes - offset
                continue
            sample = None
            if payload is not None and self._expected <= sequence < next_sequence:
                sample = decode_sample(payload)
            if sample is None:
                # Overrun meanwhile, or damaged. What lies between here and the next mark is
                # counted when the next sample names its sequence.
                self._position = self._resume(position, head)
                continue
            lost += sequence - self._expected
            samples.append(sample)
            self._expected = sequence + 1
            self._position = position + -(-(_RECORD.size + size) // _ALIGN) * _ALIGN
        if self._position >= head and next_sequence > self._expected:
            lost += next_sequence - self._expected
            self._expected = next_sequence
        return samples, lost

    def _read_cursor(self) -> tuple[int, int]:
        self._cursor.read(self._state)
        head = int(self._state["head"])
        return head - head % _ALIGN, int(self._state["next_sequence"])

    def _load(self, position: int, offset: int) -> tuple[int, int, bytes | None]:
        """(payload bytes, sequence, payload); payload None when there is no valid record."""
        crc, size, sequence = _RECORD.unpack_from(self._data, offset)
        length = 0 if size == _SKIP else size
        if length > self._ring_bytes - offset - _RECORD.size:
            return 0, 0, None
        raw = bytes(self._data[offset + 4 : offset + _RECORD.size + length])
        if self._reserve[0] - position > self._ring_bytes or crc32(raw) != crc:
            return 0, 0, None
        # The sequence is taken from the bytes that were checked.
        size = int.from_bytes(raw[:4], "little")
        sequence = int.from_bytes(raw[4:12], "little")
        if (0 if size == _SKIP else size) != length:
            return 0, 0, None
        return size, sequence, raw[12:]

    def _resume(self, position: int, head: int) -> int:
        marks = self._marks_within(position, head)
        return marks[0].position if marks else head

    def _marks_within(self, position: int, head: int) -> list[_Mark]:
        """Valid marks behind `position`, oldest first, that will not be overwritten at once."""
        oldest = max(position + 1, head - self._ring_bytes + 2 * self._segment_bytes)
        marks = []
        raw = bytes(self._marks)
        for place in range(0, SEGMENTS * _MARK_BYTES, _MARK_BYTES):
            at, sequence, crc = _MARK.unpack_from(raw, place)
            if oldest <= at < head and at % _ALIGN == 0 and crc32(raw[place : place + 16]) == crc:
                marks.append(_Mark(at, sequence))
        return sorted(marks)
