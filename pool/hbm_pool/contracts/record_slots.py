"""A record in two alternating slots: the newer valid one wins.

A writer fills the slot that does not hold the newest record, so a kill at any byte of a write
leaves the record before it. The CRC covers sequence and payload: what a reader gets was written
by one write, whatever the order in which the stores became visible.

Slot: `crc u32 | payload bytes u32 | sequence u64 | payload`, padded to whole cache lines.
"""

from __future__ import annotations

from typing import Any, Final
from zlib import crc32

import numpy as np
import numpy.typing as npt

from hbm_pool.contracts.mapped_file import ControlBlockError

READ_RETRIES: Final = 64
"""Reads that may fail in a row before the last good value is kept. An unbounded retry spins for
as long as the writer is descheduled in the middle of a write."""

_HEAD_BYTES: Final = 16
_LINE_BYTES: Final = 64


def slot_bytes(dtype: np.dtype[Any]) -> int:
    """Bytes of one slot for records of a dtype."""
    return -(-(_HEAD_BYTES + dtype.itemsize) // _LINE_BYTES) * _LINE_BYTES


def slots_bytes(dtype: np.dtype[Any]) -> int:
    """Bytes of the region for one record."""
    return 2 * slot_bytes(dtype)


def check_record(record: npt.NDArray[Any], dtype: np.dtype[Any]) -> None:
    """Raises `ControlBlockError` unless `record` is exactly one contiguous record of the dtype."""
    if record.dtype != dtype or record.size != 1:
        raise ControlBlockError(
            f"the record has {record.size} elements of {record.dtype}; it must be one of {dtype}"
        )


class SlotWriter:
    """The one writer of a record. `record` is its staging copy, shape `()`: fill and `write()`."""

    def __init__(self, region: memoryview, dtype: np.dtype[Any]) -> None:
        """Goes on after the newest valid record in `region`."""
        size = slot_bytes(dtype)
        self._dtype = dtype
        self._slots = (region[:size], region[size : 2 * size])
        buffer = memoryview(bytearray(size))
        self._staging = buffer
        self._checked = buffer[4 : _HEAD_BYTES + dtype.itemsize]
        self._payload = buffer[_HEAD_BYTES : _HEAD_BYTES + dtype.itemsize]
        self._crc = buffer[:4].cast("I")
        self._head = buffer[:_HEAD_BYTES].cast("Q")
        buffer[4:8].cast("I")[0] = dtype.itemsize
        self.record: npt.NDArray[Any] = np.frombuffer(self._payload, dtype, 1).reshape(())
        reader = SlotReader(region, dtype)
        reader.read(self.record)
        self.sequence = reader.sequence

    def word(self, field: str) -> memoryview:
        """A field of the staging record as one writable element: several times cheaper to store
        than through numpy. The field is an 8-byte integer."""
        kind, offset = self._dtype.fields[field][:2] if self._dtype.fields else (None, 0)
        if kind not in ("<i8", "<u8"):
            raise ControlBlockError(f"{field} of {self._dtype} is no 8-byte integer")
        return self._payload[offset : offset + 8].cast("q" if kind == "<i8" else "Q")

    def write(self) -> None:
        """Publishes the staging record."""
        sequence = self.sequence + 1
        self._head[1] = sequence
        self._crc[0] = crc32(self._checked)
        self._slots[sequence & 1][:] = self._staging
        self.sequence = sequence

    def load(self, record: npt.NDArray[Any]) -> None:
        """Takes a copy of a record into the staging record, unless it is that."""
        if record is self.record:
            return
        if record.dtype is not self._dtype or record.size != 1:
            check_record(record, self._dtype)
        self._payload[:] = record.tobytes()


class SlotReader:
    """Reads a record. One reader per thread; any number of readers per record."""

    def __init__(self, region: memoryview, dtype: np.dtype[Any]) -> None:
        size = slot_bytes(dtype)
        end = _HEAD_BYTES + dtype.itemsize
        self._dtype = dtype
        self._slots = (region[:end], region[size : size + end])
        self._sequences = region[: 2 * size].cast("Q")
        self._second = size // 8 + 1
        scratch = memoryview(bytearray(end))
        self._scratch = scratch
        self._checked = scratch[4:]
        self._payload = scratch[_HEAD_BYTES:]
        self._crc_and_size = scratch[:8].cast("I")
        self._head = scratch[:_HEAD_BYTES].cast("Q")
        self._into: npt.NDArray[Any] | None = None
        self._into_bytes = scratch[:0]
        self.sequence = 0
        """Of the record that was read last; 0 before the first."""

    def read(self, into: npt.NDArray[Any]) -> bool:
        """Copies the newest valid record into `into` (one record of the dtype).

        False, `into` untouched: no slot could be read. That is so before the first write; later it
        means damage, or a writer that is far faster than this reader, and the caller keeps what
        it has.
        """
        if into is not self._into:
            self._bind(into)
        sequences = self._sequences
        for _ in range(READ_RETRIES):
            first, second = sequences[1], sequences[self._second]
            if not first and not second:
                return False
            # While the newer slot is being written the other one holds the newest whole record.
            newer = first < second
            if self._load(newer) or self._load(not newer):
                self._into_bytes[:] = self._payload
                return True
        return False

    def _load(self, index: int) -> bool:
        self._scratch[:] = self._slots[index]
        crc, size = self._crc_and_size
        sequence = self._head[1]
        if (
            crc32(self._checked) != crc
            or size != len(self._payload)
            or sequence & 1 != index
            or not sequence
        ):
            return False
        self.sequence = sequence
        return True

    def _bind(self, into: npt.NDArray[Any]) -> None:
        check_record(into, self._dtype)
        if not into.flags.c_contiguous or not into.flags.writeable:
            raise ControlBlockError("the record to read into must be writable and contiguous")
        self._into_bytes = into.reshape(1).view(np.uint8).data
        self._into = into
