"""Writes a record and is killed, once at every byte. `python torn_writes.py DTYPE WRITTEN FILE`.

A process of its own: it forks once per byte, and a fork costs by what the process has mapped.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from hbm_pool.contracts import records
from hbm_pool.contracts.record_slots import SlotReader, SlotWriter, slot_bytes, slots_bytes

_EACH = 0x0101010101010101


def fill(record: Any, number: int) -> None:
    """Every 8 bytes of the record say the same, so that two writes cannot be mixed up."""
    record.reshape(1).view(np.uint64)[:] = number * _EACH


def number_of(record: Any) -> int:
    """What `fill` was given; fails for a record of two writes."""
    words = record.reshape(1).view(np.uint64)
    assert np.all(words == words[0]), "a torn record"
    return int(words[0]) // _EACH


def write(writer: SlotWriter, number: int) -> None:
    """One whole write."""
    fill(writer.record, number)
    writer.write()


def tear(dtype: Any, written: int, path: Path) -> int:
    """Kills a writer at every byte of a write after `written` whole ones; returns how many."""
    size = slots_bytes(dtype)
    path.write_bytes(bytes(size))
    with path.open("r+b") as file:
        region = memoryview(mmap.mmap(file.fileno(), size))
    writer = SlotWriter(region, dtype)
    for number in range(1, written + 1):
        write(writer, number)
    before = bytes(region)
    write(writer, written + 1)
    after = bytes(region)
    last = max(at for at in range(size) if before[at] != after[at])
    start = (written + 1 & 1) * slot_bytes(dtype)
    into = np.zeros((), dtype)
    for stop in range(start, start + slot_bytes(dtype) + 1):
        region[:] = before
        child = os.fork()
        if child == 0:
            region[start:stop] = after[start:stop]
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        fill(into, 0)
        whole = stop > last
        assert SlotReader(region, dtype).read(into) == (whole or written > 0)
        assert number_of(into) == (written + 1 if whole else written)
        # Its successor carries on over the torn slot.
        write(SlotWriter(region, dtype), 50)
        assert SlotReader(region, dtype).read(into)
        assert number_of(into) == 50
    return slot_bytes(dtype) + 1


if __name__ == "__main__":
    print(tear(getattr(records, sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
