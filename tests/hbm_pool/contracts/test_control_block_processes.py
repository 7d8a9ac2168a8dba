"""Server and sidecar as processes: other users, kills at any instant, readers beside a writer."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hbm_pool.contracts.control_block import (
    ControlBlockError,
    ServerBlock,
    ServerView,
    SidecarBlock,
    SidecarView,
)
from hbm_pool.contracts.records import (
    COMMAND,
    RequestSample,
    ResidencySnapshot,
    ServerInfo,
    UserCached,
)

from tests.hbm_pool.contracts.telemetry_records import empty_telemetry, number_of, publish

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can run as two other users")
# Server to sidecar.


def _serve(directory: Path, info: ServerInfo, make_sample: Callable[..., RequestSample]) -> None:
    """A server that writes all its regions without pause until it is killed."""
    block = ServerBlock.create(directory, info)
    number = 0
    while True:
        block.push_request(make_sample(number, number % 30))
        block.push_user_cached(number, number % 1000 + 1)
        number += 1
        publish(block, number)
        if number % 50 == 0:
            users = np.arange(number % 997, dtype=np.int64)
            tokens = np.full(len(users), number, np.uint32)
            snapshot = ResidencySnapshot(0, number, users, tokens, tokens[:10])
            for _ in block.write_snapshot(snapshot, 100):
                pass


@needs_root
def test_each_user_reads_the_other_file_and_writes_its_own_only(
    run_dir: Path, info: ServerInfo, fork: Callable[..., Any]
) -> None:
    server_uid, sidecar_uid = 1000, 65532

    def make_server() -> None:
        os.umask(0o077)
        publish(ServerBlock.create(run_dir, info), 11)

    def make_sidecar() -> None:
        os.umask(0o077)
        block = SidecarBlock.create(run_dir)
        block.command["generation"] = 12
        block.write_command(block.command)
        assert SidecarBlock.open(run_dir).command["generation"] == 12

    def read_server() -> None:
        into = empty_telemetry()
        assert ServerView.open(run_dir).read_telemetry(into)
        assert number_of(into) == 11
        for mode in (os.O_RDWR, os.O_WRONLY):
            with pytest.raises(PermissionError):
                os.open(run_dir / "server.cb", mode)

    def read_sidecar() -> None:
        into = np.zeros((), COMMAND)
        view = SidecarView.open(run_dir)
        assert view.read_command(into)
        assert into["generation"] == 12
        with pytest.raises(ControlBlockError, match="Permission denied"):
            SidecarBlock.open(run_dir)

    assert fork(make_server, server_uid).wait() == 0
    assert fork(make_sidecar, sidecar_uid).wait() == 0
    assert fork(read_server, sidecar_uid).wait() == 0
    assert fork(read_sidecar, server_uid).wait() == 0
    for name, uid in (("server.cb", server_uid), ("sidecar.cb", sidecar_uid)):
        status = (run_dir / name).stat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (uid, 0o644)


@needs_root
def test_a_directory_of_another_user_is_named(
    run_dir: Path, info: ServerInfo, fork: Callable[..., Any]
) -> None:
    run_dir.chmod(0o755)

    def body() -> None:
        with pytest.raises(ControlBlockError, match="Permission denied; the run directory must"):
            ServerBlock.create(run_dir, info)

    assert fork(body, 65532).wait() == 0


def test_a_killed_server_leaves_whole_records_at_any_instant(
    run_dir: Path,
    info: ServerInfo,
    make_sample: Any,
    same_sample: Any,
    fork: Callable[..., Any],
    wait_until: Callable[..., Any],
) -> None:
    instants = random.Random(5)
    view: ServerView | None = None
    into = empty_telemetry()
    seen_epochs = set()
    for _ in range(25):
        server = fork(lambda: _serve(run_dir, info, make_sample))
        if view is None:
            wait_until((run_dir / "server.cb").exists, "server.cb")
            view = ServerView.open(run_dir)
        else:
            wait_until(view.refresh, "the file of the restarted server")
        seen_epochs.add(view.boot_epoch)
        target = instants.randrange(1, 400)
        while not (view.read_telemetry(into) and number_of(into) >= target):
            assert server.alive()
        for _ in range(instants.randrange(2000)):
            pass
        server.kill()
        assert view.read_telemetry(into)
        number = number_of(into)
        assert number >= target
        samples, lost = view.read_requests(100_000)
        assert len(samples) + lost in (number, number + 1)  # it may have died before publishing
        for sample in samples:
            written = sample.user + (1 << 62)
            assert same_sample(sample, make_sample(written, written % 30))
        events, _ = view.read_residency()
        for event in events:
            assert event == UserCached(event.sequence, event.sequence - 1, event.user % 1000 + 1)
        snapshot = view.read_snapshot()
        assert number == 50 or (snapshot is not None) == (number > 50)
        if snapshot is not None:
            assert len(snapshot.users) == snapshot.sequence % 997
            assert (snapshot.tokens == snapshot.sequence).all()
        # A reader that comes later finds the same.
        assert ServerView.open(run_dir).read_telemetry(into)
        assert number_of(into) == number
    assert len(seen_epochs) == 25


def test_no_torn_record_in_100_000_reads_beside_a_writer(
    run_dir: Path,
    info: ServerInfo,
    fork: Callable[..., Any],
    wait_until: Callable[..., Any],
) -> None:
    block = ServerBlock.create(run_dir, info)

    def write() -> None:
        number = 0
        while True:
            number += 1
            publish(block, number)

    writer = fork(write)
    view, into = ServerView.open(run_dir), empty_telemetry()
    wait_until(lambda: view.read_telemetry(into), "telemetry")
    reads, newest, changes = 0, 0, 0
    while reads < 100_000 or changes < 100:
        if view.read_telemetry(into):
            reads += 1
            number = number_of(into)
            assert number >= newest
            changes += number != newest
            newest = number
    writer.kill()


def test_every_request_and_event_of_a_writer_is_read_or_counted(
    run_dir: Path,
    info: ServerInfo,
    make_sample: Any,
    same_sample: Any,
    fork: Callable[..., Any],
    wait_until: Callable[..., Any],
) -> None:
    total = 60_000
    block = ServerBlock.create(run_dir, info)

    def write() -> None:
        for number in range(total):
            block.push_request(make_sample(number, number % 50))
            block.push_user_cached(number, 1)

    view = ServerView.open(run_dir)
    writer = fork(write)
    place, read = 0, 0
    sequence, gaps = 0, 0

    def follow() -> bool:
        nonlocal place, read, sequence, gaps
        samples, lost = view.read_requests(500)
        for sample in samples[:: max(1, len(samples) // 20)]:
            number = sample.user + (1 << 62)
            assert same_sample(sample, make_sample(number, number % 50))
        if not lost:
            assert [sample.user + (1 << 62) for sample in samples] == list(
                range(place, place + len(samples))
            )
        place += len(samples) + lost
        read += len(samples)
        events, gap = view.read_residency()
        assert [event.sequence for event in events] == list(
            range(sequence + 1, sequence + 1 + len(events))
        )
        sequence += len(events)
        assert all(event.user == event.sequence - 1 for event in events)
        gaps += gap
        return place == total and (gap or sequence == total)

    wait_until(follow, "every sample and event")
    assert writer.wait() == 0
    assert gaps == 0  # the ring holds more events than this
    assert read > 0
    assert view.read_requests(10) == ([], 0)
