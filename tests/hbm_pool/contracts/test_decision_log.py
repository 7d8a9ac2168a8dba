"""The decision log: newest decisions, oldest first, over restarts and damage."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hbm_pool.contracts import decision_log
from hbm_pool.contracts.decision_log import DecisionLogReader, DecisionLogWriter
from hbm_pool.contracts.mapped_file import ControlBlockError
from hbm_pool.contracts.records import COMMAND, DECISION
from hypothesis import given, settings
from hypothesis import strategies as st

ENTRY_BYTES = decision_log.LOG_BYTES // decision_log.LOG_DECISIONS


def _region() -> memoryview:
    return memoryview(bytearray(decision_log.LOG_BYTES))


def _push(writer: DecisionLogWriter, ticks: range) -> None:
    for tick in ticks:
        writer.record["tick"] = tick
        writer.record["alpha"] = tick / 4
        writer.push(writer.record)


def test_an_empty_log_has_no_decisions() -> None:
    decisions = DecisionLogReader(_region()).read(10)
    assert decisions.shape == (0,)
    assert decisions.dtype == DECISION


@pytest.mark.parametrize("pushed", [1, 7, 4096, 4097, 10_000])
def test_the_newest_decisions_come_oldest_first(pushed: int) -> None:
    region = _region()
    _push(DecisionLogWriter(region), range(pushed))
    reader = DecisionLogReader(region)
    for limit in (0, 1, 5, 100_000):
        decisions = reader.read(limit)
        held = min(limit, pushed, decision_log.LOG_DECISIONS)
        assert decisions["tick"].tolist() == list(range(pushed - held, pushed))
        assert np.array_equal(decisions["alpha"], decisions["tick"] / 4)
        assert np.all(np.diff(decisions["monotonic_ns"]) >= 0)
        assert np.all(decisions["monotonic_ns"] <= time.monotonic_ns())


def test_a_restarted_writer_goes_on_behind_the_newest() -> None:
    region = _region()
    for start in (0, 5, 10):
        _push(DecisionLogWriter(region), range(start, start + 5))
    assert DecisionLogReader(region).read(100)["tick"].tolist() == list(range(15))


def test_a_record_of_the_caller_is_copied_and_others_are_refused() -> None:
    region = _region()
    writer = DecisionLogWriter(region)
    mine = np.zeros(1, DECISION)
    mine["tick"] = 12
    writer.push(mine)
    assert DecisionLogReader(region).read(1)["tick"].tolist() == [12]
    for wrong in (np.zeros((), COMMAND), np.zeros(2, DECISION)):
        with pytest.raises(ControlBlockError, match="must be one of"):
            writer.push(wrong)


@given(st.integers(0, 5000), st.data())
@settings(max_examples=30)
def test_damage_drops_decisions_and_makes_up_none(pushed: int, data: st.DataObject) -> None:
    region = _region()
    _push(DecisionLogWriter(region), range(pushed))
    damaged = set()
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(region) - 40))
        noise = data.draw(st.binary(min_size=1, max_size=40))
        region[at : at + len(noise)] = noise
        damaged |= {at // ENTRY_BYTES, (at + len(noise) - 1) // ENTRY_BYTES}
    ticks = DecisionLogReader(region).read(5000)["tick"].tolist()
    held = range(max(0, pushed - decision_log.LOG_DECISIONS), pushed)
    # Tick t has sequence t + 1, and that is its place.
    whole = [tick for tick in held if (tick + 1) % decision_log.LOG_DECISIONS not in damaged]
    assert ticks == sorted(ticks)
    assert set(whole) <= set(ticks) <= set(held)


@given(st.binary(min_size=4096, max_size=8192))
def test_foreign_bytes_are_no_decisions(raw: bytes) -> None:
    region = _region()
    region[: len(raw)] = raw
    assert len(DecisionLogReader(region).read(5000)) == 0


@pytest.mark.parametrize("before", [0, 3, 4096])
def test_a_kill_at_every_byte_of_a_decision_leaves_those_before(before: int) -> None:
    region = _region()
    writer = DecisionLogWriter(region)
    _push(writer, range(before))
    old = bytes(region)
    _push(writer, range(before, before + 1))
    new = bytes(region)
    place = (before + 1) % decision_log.LOG_DECISIONS * ENTRY_BYTES
    for length in range(ENTRY_BYTES + 1):
        region[:] = old
        region[place : place + length] = new[place : place + length]
        newest = before if bytes(region) == new else before - 1
        assert DecisionLogReader(region).read(1)["tick"].tolist() == (
            [newest] if newest >= 0 else []
        )
        _push(DecisionLogWriter(region), range(99, 100))
        assert DecisionLogReader(region).read(1)["tick"].tolist() == [99]
