"""Server and sidecar over their two files: records, restarts, damage."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hbm_pool.contracts import control_block
from hbm_pool.contracts.control_block import (
    SERVER_LAYOUT,
    SIDECAR_LAYOUT,
    ControlBlockMismatch,
    ControlBlockMissing,
    ServerBlock,
    ServerView,
    SidecarBlock,
    SidecarView,
    age_s,
)
from hbm_pool.contracts.records import (
    ABI_VERSION,
    COMMAND,
    CURVES,
    INTENT,
    ResidencySnapshot,
    ServerInfo,
    UserCached,
    UserEvicted,
)

from tests.hbm_pool.contracts.telemetry_records import STAMPED, empty_telemetry, number_of, publish

# Server to sidecar.


def test_what_the_server_says_is_read(
    run_dir: Path, info: ServerInfo, make_sample: Any, same_sample: Any
) -> None:
    block = ServerBlock.create(run_dir, info)
    view = ServerView.open(run_dir)
    assert view.info == info
    assert view.boot_epoch == block.boot_epoch
    into = empty_telemetry()
    assert not view.read_telemetry(into)
    assert view.telemetry_age_s() == math.inf
    block.telemetry["alpha"] = 0.375
    block.telemetry["class_misses"] = (1, 2, 3, 4)
    before = time.monotonic_ns()
    block.push_user_cached(7, 640)
    block.push_request(make_sample(1))
    block.push_request(make_sample(2, 200_000))  # too large
    block.lose_requests(2)
    block.publish_telemetry()
    assert view.read_telemetry(into)
    assert before <= into["monotonic_ns"] <= time.monotonic_ns()
    assert 0 <= view.telemetry_age_s() <= (time.monotonic_ns() - before) / 1e9
    assert into["alpha"] == 0.375
    assert into["class_misses"].tolist() == [1, 2, 3, 4]
    assert [into[name] for name in STAMPED[1:]] == [block.boot_epoch, 1, 3]
    samples, lost = view.read_requests(10)
    assert lost == 3
    assert same_sample(samples[0], make_sample(1))
    assert view.read_residency() == ([UserCached(1, 7, 640)], False)
    assert view.read_snapshot() is None


def test_residency_goes_on_behind_a_snapshot(run_dir: Path, info: ServerInfo) -> None:
    block = ServerBlock.create(run_dir, info)
    view = ServerView.open(run_dir)
    for user in range(5):
        assert block.push_user_cached(user, 64) == user + 1
    snapshot = ResidencySnapshot(
        block.boot_epoch, 3, np.arange(3), np.full(3, 64, np.uint32), np.array([9], np.uint32)
    )
    for _ in block.write_snapshot(snapshot):
        pass
    assert len(view.read_residency()[0]) == 5
    found = view.read_snapshot()
    assert found is not None
    assert (found.boot_epoch, found.sequence) == (block.boot_epoch, 3)
    assert found.users.tolist() == [0, 1, 2]
    # What is newer than the snapshot comes again: whoever replaces all by it misses nothing.
    assert view.read_residency() == ([UserCached(4, 3, 64), UserCached(5, 4, 64)], False)
    assert view.read_snapshot() is None
    assert block.push_user_evicted(0) == 6
    assert view.read_residency() == ([UserEvicted(6, 0)], False)


def test_after_close_nothing_is_written(run_dir: Path, info: ServerInfo, make_sample: Any) -> None:
    block = ServerBlock.create(run_dir, info)
    publish(block, 5)
    block.push_user_cached(1, 64)
    block.close()
    block.close()
    publish(block, 6)
    assert not block.push_request(make_sample(1))
    block.lose_requests(3)
    empty = np.zeros(0, np.uint32)
    assert list(block.write_snapshot(ResidencySnapshot(0, 1, empty, empty, empty))) == []
    assert (block.push_user_cached(2, 64), block.push_user_evicted(1)) == (1, 1)
    view, into = ServerView.open(run_dir), empty_telemetry()
    assert view.read_telemetry(into)
    assert number_of(into) == 5
    assert view.read_requests(9) == ([], 0)
    assert view.read_residency() == ([UserCached(1, 1, 64)], False)
    assert view.read_snapshot() is None


def test_independent_readers_lose_nothing_to_each_other(
    run_dir: Path, info: ServerInfo, make_sample: Any
) -> None:
    block = ServerBlock.create(run_dir, info)
    one, other = ServerView.open(run_dir), ServerView.open(run_dir)
    for number in range(10):
        block.push_request(make_sample(number))
    assert len(one.read_requests(10)[0]) == 10
    assert len(other.read_requests(4)[0]) == 4
    assert len(other.read_requests(10)[0]) == 6


# The description of the server.


def test_what_the_sidecar_says_is_read(run_dir: Path) -> None:
    block = SidecarBlock.create(run_dir)
    view = SidecarView.open(run_dir)
    reads: list[tuple[Callable[[Any], bool], Callable[[Any], None], Any, str]] = [
        (view.read_command, block.write_command, COMMAND, "alpha"),
        (view.read_intent, block.write_intent, INTENT, "alpha_min"),
        (view.read_curves, block.write_curves, CURVES, "warm"),
    ]
    for read, write, dtype, field in reads:
        mine, into = np.zeros((), dtype), np.zeros((), dtype)
        assert not read(into)
        assert age_s(into) == math.inf
        mine[field] = 0.25
        write(mine)
        assert read(into)
        assert into[field] == 0.25
        assert 0 <= age_s(into) < math.inf
        assert mine["monotonic_ns"] == 0  # the caller's record is left alone
    assert view.snapshot_requests() == 0
    block.request_snapshot()
    assert view.snapshot_requests() == 1
    assert len(view.read_decisions(5)) == 0
    block.decision["tick"] = 8
    block.push_decision(block.decision)
    assert view.read_decisions(5)["tick"].tolist() == [8]


def test_records_from_before_the_machine_started_are_infinitely_old() -> None:
    record = np.zeros((), COMMAND)
    record["monotonic_ns"] = time.monotonic_ns() + 10**12
    assert age_s(record) == math.inf


def test_each_child_writes_its_own_regions_only(run_dir: Path) -> None:
    SidecarBlock.create(run_dir)
    decide, twin, admin = (SidecarBlock.open(run_dir) for _ in range(3))
    path = run_dir / "sidecar.cb"

    def changed(write: Callable[[], None]) -> set[str]:
        before = path.read_bytes()
        write()
        after = path.read_bytes()
        names = {
            name
            for name in SIDECAR_LAYOUT._regions
            if before[SIDECAR_LAYOUT.region(name)] != after[SIDECAR_LAYOUT.region(name)]
        }
        outside = bytearray(after)
        for name in names:
            outside[SIDECAR_LAYOUT.region(name)] = before[SIDECAR_LAYOUT.region(name)]
        assert bytes(outside) == before
        return names

    for _ in range(3):
        assert changed(lambda: decide.write_command(decide.command)) == {"command"}
        assert changed(lambda: decide.push_decision(decide.decision)) == {"decisions"}
        assert changed(lambda: twin.write_curves(np.zeros((), CURVES))) == {"curves"}
        assert changed(lambda: admin.write_intent(np.zeros((), INTENT))) == {"intent"}
        assert changed(admin.request_snapshot) == {"snapshot_request"}


# Restarts.


def test_the_sidecar_keeps_its_file_over_a_restart(run_dir: Path) -> None:
    first = SidecarBlock.create(run_dir)
    view = SidecarView.open(run_dir)
    for _ in range(3):
        first.command["generation"] += np.uint64(1)
        first.write_command(first.command)
        first.push_decision(first.decision)
        first.request_snapshot()
    second = SidecarBlock.create(run_dir)
    assert second.boot_epoch == first.boot_epoch
    assert second.command["generation"] == 3  # a restarted decide sees what it said last
    second.request_snapshot()
    second.push_decision(second.decision)
    second.command["generation"] += np.uint64(1)
    second.write_command(second.command)
    into = np.zeros((), COMMAND)
    assert not view.refresh()
    assert view.read_command(into)
    assert into["generation"] == 4
    assert view.snapshot_requests() == 4
    assert len(view.read_decisions(9)) == 4


@pytest.mark.parametrize("damage", ["header", "size", "version"])
def test_the_sidecar_replaces_a_file_it_cannot_use(run_dir: Path, damage: str) -> None:
    block = SidecarBlock.create(run_dir)
    block.write_command(block.command)
    view = SidecarView.open(run_dir)
    path = run_dir / "sidecar.cb"
    if damage == "size":
        os.truncate(path, SIDECAR_LAYOUT.file_bytes + 1)
    else:
        header = SIDECAR_LAYOUT.header(block.boot_epoch, ABI_VERSION + (damage == "version"))
        with path.open("r+b") as file:
            file.write(header if damage == "version" else bytes(100))
    with pytest.raises(ControlBlockMismatch):
        SidecarBlock.open(run_dir)
    assert not block.replaced()
    successor = SidecarBlock.create(run_dir)
    assert block.replaced()
    assert not successor.replaced()
    assert view.refresh()
    assert not view.refresh()
    into = np.zeros((), COMMAND)
    into["alpha"] = 0.5
    assert not view.read_command(into)
    assert into["alpha"] == 0.5  # the last good value stays with the reader


def test_a_restarted_server_is_a_new_boot(
    run_dir: Path, info: ServerInfo, make_sample: Any
) -> None:
    first = ServerBlock.create(run_dir, info)
    view, into = ServerView.open(run_dir), empty_telemetry()
    publish(first, 4)
    for number in range(10):
        first.push_request(make_sample(number))
        first.push_user_cached(number, 64)
    assert len(view.read_requests(3)[0]) == 3
    view.read_residency()
    assert view.read_telemetry(into)
    assert not view.refresh()

    second = ServerBlock.create(run_dir, dataclasses.replace(info, node="other"))
    assert second.boot_epoch != first.boot_epoch
    # Until it looks, the view stays with the old file; it then has the new one only.
    assert view.read_telemetry(into)
    assert view.refresh()
    assert not view.refresh()
    assert (view.boot_epoch, view.info.node) == (second.boot_epoch, "other")
    assert not view.read_telemetry(into)
    assert number_of(into) == 4
    assert view.telemetry_age_s() == math.inf
    second.push_request(make_sample(99))
    samples, lost = view.read_requests(10)
    assert (len(samples), lost) == (1, 7)
    assert view.read_residency() == ([], False)
    second.push_user_cached(5, 64)
    assert view.read_residency() == ([UserCached(1, 5, 64)], False)
    publish(second, 8)
    assert view.read_telemetry(into)
    assert (number_of(into), into["boot_epoch"]) == (8, second.boot_epoch)


def test_a_command_names_the_boot_it_is_for(run_dir: Path, info: ServerInfo) -> None:
    sidecar = SidecarBlock.create(run_dir)
    first = ServerBlock.create(run_dir, info)
    sidecar.command["boot_epoch"] = first.boot_epoch
    sidecar.write_command(sidecar.command)
    second = ServerBlock.create(run_dir, info)
    view, into = SidecarView.open(run_dir), np.zeros((), COMMAND)
    assert view.read_command(into)
    assert into["boot_epoch"] == first.boot_epoch != second.boot_epoch


@pytest.mark.parametrize("server_first", [True, False])
def test_either_side_may_start_first(run_dir: Path, info: ServerInfo, server_first: bool) -> None:
    if server_first:
        server = ServerBlock.create(run_dir, info)
        with pytest.raises(ControlBlockMissing, match=r"sidecar\.cb"):
            SidecarView.open(run_dir)
        sidecar = SidecarBlock.create(run_dir)
    else:
        sidecar = SidecarBlock.create(run_dir)
        with pytest.raises(ControlBlockMissing, match=r"server\.cb"):
            ServerView.open(run_dir)
        server = ServerBlock.create(run_dir, info)
    from_server, from_sidecar = ServerView.open(run_dir), SidecarView.open(run_dir)
    telemetry, command = empty_telemetry(), np.zeros((), COMMAND)
    for number in range(1, 4):  # each side restarts in turn, the other one follows
        publish(server, number)
        sidecar.command["generation"] = number
        sidecar.write_command(sidecar.command)
        from_server.refresh()
        from_sidecar.refresh()
        assert from_server.read_telemetry(telemetry)
        assert from_sidecar.read_command(command)
        assert (number_of(telemetry), command["generation"]) == (number, number)
        if number % 2 == server_first:
            server = ServerBlock.create(run_dir, info)
        else:
            (run_dir / "sidecar.cb").unlink()
            sidecar = SidecarBlock.create(run_dir)


def test_a_file_that_vanishes_or_speaks_another_version_leaves_the_last_good(
    run_dir: Path, info: ServerInfo
) -> None:
    block = ServerBlock.create(run_dir, info)
    publish(block, 6)
    view, into = ServerView.open(run_dir), empty_telemetry()
    path = run_dir / "server.cb"
    path.rename(run_dir / "aside")
    assert not view.refresh()
    assert view.read_telemetry(into)
    assert number_of(into) == 6
    newer = bytearray(SERVER_LAYOUT.file_bytes)
    header = SERVER_LAYOUT.header(3, ABI_VERSION + 1)
    newer[: len(header)] = header
    path.write_bytes(newer)
    for _ in range(2):
        with pytest.raises(
            ControlBlockMismatch,
            match=f"version {ABI_VERSION + 1}, this program speaks {ABI_VERSION}",
        ):
            view.refresh()
    with pytest.raises(ControlBlockMismatch, match="run the same release"):
        ServerView.open(run_dir)
    publish(block, 7)
    assert view.read_telemetry(into)
    assert number_of(into) == 7
    assert view.boot_epoch == block.boot_epoch
    ServerBlock.create(run_dir, info)
    assert view.refresh()


@pytest.mark.parametrize("region", ["telemetry", "requests", "residency", "snapshot"])
def test_noise_in_a_region_is_survived_by_all_reads(
    run_dir: Path, info: ServerInfo, make_sample: Any, same_sample: Any, region: str
) -> None:
    noise = random.Random(region)
    block = ServerBlock.create(run_dir, info)
    into = empty_telemetry()
    for _ in range(8):
        publish(block, 3)
        for number in range(20):
            block.push_request(make_sample(number))
            block.push_user_cached(number, 1)
        place = SERVER_LAYOUT.region(region)
        with (run_dir / "server.cb").open("r+b") as file:
            file.seek(place.start)
            file.write(noise.randbytes(min(place.stop - place.start, 100_000)))
        view = ServerView.open(run_dir)
        if view.read_telemetry(into):
            assert number_of(into) == 3
        samples, lost = view.read_requests(1000)
        assert lost >= 0
        for sample in samples:
            assert same_sample(sample, make_sample(sample.user + (1 << 62)))
        for event in view.read_residency()[0]:
            assert isinstance(event, UserCached)
            assert (event.user, event.tokens) == ((event.sequence - 1) % 20, 1)
        assert view.read_snapshot() is None


# Other processes.


def test_the_public_names_are_those_of_the_contract() -> None:
    assert set(control_block.__all__) == {
        "ControlBlockError",
        "ControlBlockMismatch",
        "ControlBlockMissing",
        "ServerBlock",
        "ServerView",
        "SidecarBlock",
        "SidecarView",
        "StampedWriter",
        "age_s",
    }
