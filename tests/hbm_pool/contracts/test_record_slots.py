"""Two slots: one whole record survives any kill and any damage to the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hbm_pool.contracts import records
from hbm_pool.contracts.mapped_file import ControlBlockError
from hbm_pool.contracts.record_slots import SlotReader, SlotWriter, slot_bytes, slots_bytes
from hbm_pool.contracts.records import COMMAND, TELEMETRY
from hypothesis import given
from hypothesis import strategies as st

from tests.hbm_pool.contracts.torn_writes import fill, number_of, write

SIZE = slots_bytes(TELEMETRY)
WORDS = TELEMETRY.itemsize // 8


def test_nothing_is_read_before_the_first_write() -> None:
    into = np.zeros((), TELEMETRY)
    fill(into, 9)
    assert not SlotReader(memoryview(bytes(SIZE)), TELEMETRY).read(into)
    assert number_of(into) == 9


@given(st.integers(1, 20))
def test_the_newest_record_is_read(writes: int) -> None:
    region = memoryview(bytearray(SIZE))
    writer, reader = SlotWriter(region, TELEMETRY), SlotReader(region, TELEMETRY)
    into = np.zeros(1, TELEMETRY)
    for number in range(1, writes + 1):
        write(writer, number)
        assert reader.read(into)
        assert reader.read(into)
        assert number_of(into) == number
    # A restarted writer goes on, and readers old and new follow.
    write(SlotWriter(region, TELEMETRY), 99)
    for each in (reader, SlotReader(region, TELEMETRY)):
        assert each.read(into)
        assert number_of(into) == 99


def test_a_record_of_the_caller_is_copied() -> None:
    region = memoryview(bytearray(slots_bytes(COMMAND)))
    writer, reader = SlotWriter(region, COMMAND), SlotReader(region, COMMAND)
    mine = np.zeros(3, COMMAND)
    mine["alpha"] = (0.1, 0.2, 0.3)
    into = np.zeros((), COMMAND)
    for index, shape in ((1, (1,)), (2, ())):
        writer.load(mine[index : index + 1].reshape(shape))
        writer.write()
        assert reader.read(into)
        assert into["alpha"] == mine["alpha"][index]


@pytest.mark.parametrize(
    "record", [np.zeros(2, COMMAND), np.zeros((), TELEMETRY), np.zeros(COMMAND.itemsize, np.uint8)]
)
def test_another_record_is_refused(record: Any) -> None:
    region = memoryview(bytearray(slots_bytes(COMMAND)))
    with pytest.raises(ControlBlockError, match="must be one of"):
        SlotWriter(region, COMMAND).load(record)
    with pytest.raises(ControlBlockError, match="must be one of"):
        SlotReader(region, COMMAND).read(record)


def test_a_record_that_cannot_be_written_to_is_refused() -> None:
    reader = SlotReader(memoryview(bytearray(slots_bytes(COMMAND))), COMMAND)
    frozen = np.zeros((), COMMAND)
    frozen.flags.writeable = False
    with pytest.raises(ControlBlockError, match="writable and contiguous"):
        reader.read(frozen)


def test_only_whole_integer_fields_are_words() -> None:
    writer = SlotWriter(memoryview(bytearray(SIZE)), TELEMETRY)
    writer.word("batches")[0] = 7
    writer.word("queue_depth")[0] = -7
    assert (writer.record["batches"], writer.record["queue_depth"]) == (7, -7)
    for field in ("alpha", "class_misses"):
        with pytest.raises(ControlBlockError, match=field):
            writer.word(field)


@given(st.integers(2, 9), st.data())
def test_damage_never_makes_up_a_record(writes: int, data: st.DataObject) -> None:
    raw = bytearray(SIZE)
    region = memoryview(raw)
    writer = SlotWriter(region, TELEMETRY)
    for number in range(1, writes + 1):
        write(writer, number)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, SIZE - 1))
        noise = data.draw(st.binary(min_size=1, max_size=24))
        region[at : at + len(noise)] = noise[: SIZE - at]
    into = np.zeros((), TELEMETRY)
    fill(into, 0)
    reader = SlotReader(region, TELEMETRY)
    found = reader.read(into)
    assert number_of(into) in ((writes, writes - 1) if found else (0,))
    # Whatever was damaged, the next write is read.
    write(SlotWriter(region, TELEMETRY), 77)
    assert reader.read(into)
    assert number_of(into) == 77


@given(st.binary(min_size=SIZE, max_size=SIZE))
def test_foreign_bytes_are_no_record(raw: bytes) -> None:
    into = np.zeros((), TELEMETRY)
    assert not SlotReader(memoryview(raw), TELEMETRY).read(into)
    assert number_of(into) == 0


@given(st.integers(1, 6), st.integers(0, 2 * 8 * slot_bytes(TELEMETRY) - 1))
def test_one_flipped_bit_leaves_a_record(writes: int, bit: int) -> None:
    raw = bytearray(SIZE)
    writer = SlotWriter(memoryview(raw), TELEMETRY)
    for number in range(1, writes + 1):
        write(writer, number)
    raw[bit // 8] ^= 1 << bit % 8
    into = np.zeros((), TELEMETRY)
    if SlotReader(memoryview(raw), TELEMETRY).read(into):
        assert number_of(into) in (writes, writes - 1)
    else:
        assert writes == 1  # there was but one to be damaged


@pytest.mark.parametrize(("dtype", "written"), [("COMMAND", 0), ("COMMAND", 1), ("TELEMETRY", 2)])
def test_a_kill_at_every_byte_of_a_write_leaves_the_record_before(
    run_dir: Path, dtype: str, written: int
) -> None:
    script = Path(__file__).with_name("torn_writes.py")
    done = subprocess.run(
        [sys.executable, script, dtype, str(written), run_dir / "slots"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > getattr(records, dtype).itemsize  # so many writers were killed
