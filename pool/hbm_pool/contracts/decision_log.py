"""The newest decisions: a ring of records that name their own sequence under a CRC.

Decision i (the first has sequence 1) lies at `i % LOG_DECISIONS`. Readers are rare and see the
whole ring; a restarted writer goes on behind the newest valid one.
"""

from __future__ import annotations

import time
from typing import Any, Final
from zlib import crc32

import numpy as np
import numpy.typing as npt

from hbm_pool.contracts.record_slots import check_record
from hbm_pool.contracts.records import DECISION

LOG_DECISIONS: Final = 4096

_ENTRY: Final = np.dtype([("crc", "<u4"), ("unused", "<u4"), ("sequence", "<u8"), ("it", DECISION)])
LOG_BYTES: Final = LOG_DECISIONS * _ENTRY.itemsize


class DecisionLogReader:
    """Reads the newest decisions."""

    def __init__(self, region: memoryview) -> None:
        self._region = region
        self._sequences: npt.NDArray[Any] = np.frombuffer(region, dtype=_ENTRY)["sequence"]

    def newest(self, limit: int) -> list[tuple[int, bytes]]:
        """At most `limit` valid (sequence, record), newest first."""
        sequences = self._sequences.copy()
        slots = np.arange(LOG_DECISIONS, dtype=np.uint64)
        sequences[sequences % np.uint64(LOG_DECISIONS) != slots] = 0
        found: list[tuple[int, bytes]] = []
        for slot in np.argsort(sequences)[::-1]:
            sequence = int(sequences[slot])
            if len(found) >= limit or sequence == 0:
                break
            start = int(slot) * _ENTRY.itemsize
            raw = bytes(self._region[start : start + _ENTRY.itemsize])
            if (
                crc32(raw[8:]) == int.from_bytes(raw[:4], "little")
                and int.from_bytes(raw[8:16], "little") == sequence
            ):
                found.append((sequence, raw[16:]))
        return found

    def read(self, limit: int) -> npt.NDArray[Any]:
        """At most `limit` newest decisions, `[n] DECISION`, oldest first."""
        records = b"".join(raw for _, raw in reversed(self.newest(limit)))
        return np.frombuffer(records, dtype=DECISION).copy()


class DecisionLogWriter:
    """Appends decisions. One thread. `record` is the staging record, shape `()`."""

    def __init__(self, region: memoryview) -> None:
        self._region = region
        buffer = memoryview(bytearray(_ENTRY.itemsize))
        self._staging = buffer
        self._crc = buffer[:4].cast("I")
        self._words = buffer[:16].cast("Q")
        self._stamp = buffer[16:24].cast("q")
        self._checked = buffer[8:]
        self._payload = buffer[16:]
        self.record: npt.NDArray[Any] = np.frombuffer(buffer, DECISION, 1, 16).reshape(())
        newest = DecisionLogReader(region).newest(1)
        self.sequence = newest[0][0] if newest else 0

    def push(self, record: npt.NDArray[Any]) -> None:
        """Appends a decision (one DECISION record), stamped with the monotonic clock."""
        if record is not self.record:
            if record.dtype is not DECISION or record.size != 1:
                check_record(record, DECISION)
            self._payload[:] = record.tobytes()
        sequence = self.sequence + 1
        self._stamp[0] = time.monotonic_ns()
        self._words[1] = sequence
        self._crc[0] = crc32(self._checked)
        start = sequence % LOG_DECISIONS * len(self._staging)
        self._region[start : start + len(self._staging)] = self._staging
        self.sequence = sequence
