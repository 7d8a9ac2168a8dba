"""Files of fixed layout: made whole or not at all, opened only when they are ours."""

from __future__ import annotations

import errno
import os
import resource
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hbm_pool.contracts.control_block import (
    SERVER_LAYOUT,
    SIDECAR_LAYOUT,
    ServerBlock,
    ServerView,
    SidecarBlock,
)
from hbm_pool.contracts.mapped_file import (
    ControlBlockError,
    ControlBlockMismatch,
    ControlBlockMissing,
    FileLayout,
    MappedFile,
    new_boot_epoch,
)
from hbm_pool.contracts.records import (
    ABI_VERSION,
    TELEMETRY,
    RequestSample,
    ResidencySnapshot,
    ServerInfo,
)
from hypothesis import given
from hypothesis import strategies as st

LAYOUT = FileLayout("small.cb", 7, {"one": 100, "two": 5000}, "records")
HEADER = LAYOUT.header(0x1234)
PATH = Path("small.cb")
CANNOT_MOUNT = 77


def test_a_file_is_made_in_place_readable_for_all_and_backed(run_dir: Path) -> None:
    def fill(file: MappedFile) -> None:
        assert not (run_dir / "small.cb").exists()
        file.region("two")[:5] = b"hello"

    umask = os.umask(0o077)
    try:
        made = MappedFile.create(run_dir, LAYOUT, fill)
    finally:
        os.umask(umask)
    assert os.listdir(run_dir) == ["small.cb"]
    status = (run_dir / "small.cb").stat()
    assert stat.S_IMODE(status.st_mode) == 0o644
    assert status.st_size == LAYOUT.file_bytes <= status.st_blocks * 512
    found = MappedFile.open(run_dir, LAYOUT)
    assert found.boot_epoch == made.boot_epoch
    assert bytes(found.region("two")[:5]) == b"hello"
    assert bytes(found.region("one")) == bytes(100)
    with pytest.raises(TypeError):
        found.region("one")[0] = 1  # mapped read-only
    assert not found.replaced()
    MappedFile.create(run_dir, LAYOUT)
    assert found.replaced()
    os.unlink(run_dir / "small.cb")
    assert not found.replaced()


def test_regions_share_no_page() -> None:
    places = [SERVER_LAYOUT.region(name) for name in SERVER_LAYOUT._regions]
    places += [SIDECAR_LAYOUT.region(name) for name in SIDECAR_LAYOUT._regions]
    assert all(place.start % 4096 == 0 for place in places)


def test_the_sizes_of_this_version_are_known() -> None:
    """A change here is a change of the ABI: raise `ABI_VERSION` with it."""
    assert (ABI_VERSION, SERVER_LAYOUT.file_bytes, SIDECAR_LAYOUT.file_bytes) == (
        3,
        13_320_192,
        778_240,
    )


def test_boot_epochs_differ_and_fit_a_signed_number() -> None:
    epochs = {new_boot_epoch() for _ in range(100)}
    assert len(epochs) > 1
    assert all(0 < epoch < 2**63 for epoch in epochs)


def test_a_missing_file_and_a_missing_directory_are_told_apart(run_dir: Path) -> None:
    with pytest.raises(ControlBlockMissing, match="is not there"):
        MappedFile.open(run_dir, LAYOUT)
    with pytest.raises(ControlBlockError, match="run directory must exist"):
        MappedFile.create(run_dir / "nowhere", LAYOUT)
    (run_dir / "file").touch()
    with pytest.raises(ControlBlockError, match="run directory must exist"):
        MappedFile.create(run_dir / "file", LAYOUT)
    with pytest.raises(ControlBlockError, match="cannot open"):
        MappedFile.open(run_dir / "file", LAYOUT)


def test_what_a_killed_owner_left_behind_is_cleared(run_dir: Path) -> None:
    (run_dir / ".small.cb.new").write_bytes(b"half a file")
    MappedFile.create(run_dir, LAYOUT)
    assert os.listdir(run_dir) == ["small.cb"]


def test_a_failure_while_filling_leaves_the_older_file(run_dir: Path) -> None:
    older = MappedFile.create(run_dir, LAYOUT)

    def fill(file: MappedFile) -> None:
        raise KeyError("fault")

    with pytest.raises(KeyError):
        MappedFile.create(run_dir, LAYOUT, fill)
    assert os.listdir(run_dir) == ["small.cb"]
    assert not older.replaced()


@given(st.integers(0, 8 * len(HEADER) - 1))
def test_every_flipped_bit_of_a_header_is_noticed(bit: int) -> None:
    header = bytearray(HEADER)
    header[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ControlBlockMismatch):
        LAYOUT.check_header(bytes(header), PATH)


@given(st.binary(max_size=200) | st.builds(lambda tail: HEADER[:8] + tail, st.binary(max_size=99)))
def test_foreign_bytes_are_no_header(raw: bytes) -> None:
    with pytest.raises(ControlBlockMismatch):
        LAYOUT.check_header(raw, PATH)


@given(st.integers(0, len(HEADER) - 1))
def test_a_cut_header_is_noticed(length: int) -> None:
    with pytest.raises(ControlBlockMismatch):
        LAYOUT.check_header(HEADER[:length], PATH)
    assert LAYOUT.check_header(HEADER + bytes(100), PATH) == 0x1234


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (LAYOUT.header(1, abi_version=ABI_VERSION + 1), "version 4, this program speaks 3: run"),
        (FileLayout("x", 8, {"one": 100, "two": 5000}, "records").header(1), "another side"),
        (FileLayout("x", 7, {"one": 100, "two": 9000}, "records").header(1), "another layout"),
        (FileLayout("x", 7, {"one": 101, "two": 5000}, "records").header(1), "another layout"),
        (FileLayout("x", 7, {"one": 100, "two": 5000}, "other").header(1), "another layout"),
        (b"#!/bin/sh\n" + bytes(100), "is no control block"),
    ],
)
def test_a_header_of_another_layout_is_named(header: bytes, message: str) -> None:
    with pytest.raises(ControlBlockMismatch, match=message):
        LAYOUT.check_header(header, PATH)


@pytest.mark.parametrize("change", [-1, 1, -4096, 4096, -LAYOUT.file_bytes])
def test_a_file_of_another_size_is_refused(run_dir: Path, change: int) -> None:
    MappedFile.create(run_dir, LAYOUT)
    os.truncate(run_dir / "small.cb", LAYOUT.file_bytes + change)
    with pytest.raises(ControlBlockMismatch, match=r"bytes instead of|is no control block"):
        MappedFile.open(run_dir, LAYOUT)


def test_a_sparse_file_is_refused(run_dir: Path) -> None:
    with (run_dir / "small.cb").open("wb") as file:
        file.write(HEADER)
        file.truncate(LAYOUT.file_bytes)
    with pytest.raises(ControlBlockMismatch, match="sparse"):
        MappedFile.open(run_dir, LAYOUT)


def test_links_pipes_and_directories_are_refused(run_dir: Path) -> None:
    path = run_dir / "small.cb"
    MappedFile.create(run_dir, LAYOUT)
    os.rename(path, run_dir / "target")
    path.symlink_to(run_dir / "target")
    with pytest.raises(ControlBlockMismatch, match="not a regular file"):
        MappedFile.open(run_dir, LAYOUT)
    path.unlink()
    os.mkfifo(path)
    for writable in (False, True):
        with pytest.raises(ControlBlockMismatch, match="not a regular file"):
            MappedFile.open(run_dir, LAYOUT, writable=writable)
    path.unlink()
    path.mkdir()
    for writable in (False, True):
        with pytest.raises(ControlBlockMismatch, match="not a regular file"):
            MappedFile.open(run_dir, LAYOUT, writable=writable)


@given(st.binary(max_size=64), st.integers(0, 200))
def test_only_our_errors_come_out_of_a_damaged_file(noise: bytes, at: int) -> None:
    raw = bytearray(HEADER)
    raw[at : at + len(noise)] = noise
    if raw[: len(HEADER)] != HEADER:
        with pytest.raises(ControlBlockError):
            LAYOUT.check_header(bytes(raw), PATH)


def _mount_small_tmpfs(directory: Path, size: str) -> None:
    """Mounts a tmpfs that only this process sees; exits with CANNOT_MOUNT where that is refused."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, new_user, recursive_private = 0x00020000, 0x10000000, 0x4000 | 0x40000
    uid, gid = os.getuid(), os.getgid()
    flags = new_namespace if uid == 0 else new_namespace | new_user
    if libc.unshare(flags) != 0:
        os._exit(CANNOT_MOUNT)
    if flags & new_user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    if (
        libc.mount(b"none", b"/", None, recursive_private, None) != 0
        or libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", 0, f"size={size}".encode()) != 0
    ):
        os._exit(CANNOT_MOUNT)


def _run_on_small_tmpfs(
    fork: Callable[..., Any], directory: Path, size: str, body: Callable[[], None]
) -> None:
    def child() -> None:
        _mount_small_tmpfs(directory, size)
        body()

    status = fork(child).wait()
    if status == CANNOT_MOUNT:
        pytest.skip("neither root nor a user namespace may mount a tmpfs here")
    assert status == 0


def _fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def test_without_room_nothing_is_made(
    run_dir: Path, info: ServerInfo, fork: Callable[..., Any]
) -> None:
    def body() -> None:
        with pytest.raises(ControlBlockError, match=r"no room for .*server\.cb.*13320192 bytes"):
            ServerBlock.create(run_dir, info)
        with pytest.raises(ControlBlockError, match=r"no room for .*sidecar\.cb"):
            SidecarBlock.create(run_dir)
        assert os.listdir(run_dir) == []

    _run_on_small_tmpfs(fork, run_dir, "256k", body)


def test_without_room_for_a_second_file_the_first_stays(
    run_dir: Path, info: ServerInfo, fork: Callable[..., Any]
) -> None:
    def body() -> None:
        first = ServerBlock.create(run_dir, info)
        first.telemetry["alpha"] = 0.25
        first.publish_telemetry()
        with pytest.raises(ControlBlockError, match="no room"):
            ServerBlock.create(run_dir, info)
        assert os.listdir(run_dir) == ["server.cb"]
        view = ServerView.open(run_dir)
        into = np.zeros((), TELEMETRY)
        assert view.read_telemetry(into)
        assert into["alpha"] == 0.25
        assert view.boot_epoch == first.boot_epoch

    _run_on_small_tmpfs(fork, run_dir, "14m", body)


def test_a_volume_that_fills_up_later_kills_nobody(
    run_dir: Path,
    info: ServerInfo,
    fork: Callable[..., Any],
    make_sample: Callable[..., RequestSample],
) -> None:
    def body() -> None:
        server, sidecar = ServerBlock.create(run_dir, info), SidecarBlock.create(run_dir)
        view = ServerView.open(run_dir)
        _fill_up(run_dir / "filler")
        # Every page of both files is touched: the rings lapped, both snapshot buffers filled.
        users = np.arange(1 << 17, dtype=np.int64)
        for sequence in (1, 2):
            tokens, shards = np.ones(len(users), np.uint32), np.ones(1 << 14, np.uint32)
            snapshot = ResidencySnapshot(0, sequence, users, tokens, shards)
            for _ in server.write_snapshot(snapshot):
                pass
        for number in range(200):
            server.push_request(make_sample(number, 5000))
        for user in range(70_000):
            server.push_user_cached(user, 1)
        for _ in range(5000):
            sidecar.push_decision(sidecar.decision)
        server.publish_telemetry()
        sidecar.write_command(sidecar.command)
        sidecar.request_snapshot()
        assert view.read_requests(1000)[0]
        assert view.read_snapshot() is not None

    _run_on_small_tmpfs(fork, run_dir, "14m", body)


def test_a_file_size_limit_is_no_room_either(run_dir: Path, fork: Callable[..., Any]) -> None:
    def body() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(ControlBlockError, match=r"no room for .*small\.cb"):
            MappedFile.create(run_dir, LAYOUT)
        assert os.listdir(run_dir) == []

    assert fork(body).wait() == 0


def test_the_file_is_little_endian_on_this_machine() -> None:
    assert sys.byteorder == "little"
    assert struct.unpack_from("<8sI", HEADER) == (b"HBM-CB\r\n", ABI_VERSION)
