"""What crossing the control block costs: records, rings, snapshots; and coding a digest.

Both ends run in this one thread, hot, on a memory-backed directory where there is one. Beside the
records stands a bare copy of as many bytes through the same kind of mapping: no sequence, no
checksum, and what it reads may be torn.
"""

from __future__ import annotations

import gc
import mmap
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hbm_pool.contracts.control_block import ServerBlock, ServerView, SidecarBlock, SidecarView
from hbm_pool.contracts.digest import decode_digest, encode_digest
from hbm_pool.contracts.records import (
    COMMAND,
    TELEMETRY,
    CostModel,
    RequestSample,
    ResidencySnapshot,
    RowClass,
    ServerInfo,
    TableMap,
)

PAGE_TOKENS = 64
HISTORY_TOKENS = 4096
SAMPLE_RATE = 0.01
TABLES = 3
CANDIDATES = 500
SNAPSHOT_USERS = 20_000
SHARDS = 256
DIGEST_USERS = (2_500, 20_000)


def run(quick: bool, seed: int) -> dict[str, Any]:
    """Percentiles in µs, each with its n; the loop's own timer is part of them."""
    random = np.random.default_rng(seed)
    repeats = 2_000 if quick else 100_000
    memory = Path("/dev/shm")
    collecting = gc.isenabled()
    gc.disable()
    try:
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
            path = Path(directory)
            server = ServerBlock.create(path, _info())
            view = ServerView.open(path)
            return {
                "timer": _percentiles(_timed(lambda: None, repeats)),
                "bare_copy": _bare_copy(path, repeats),
                "telemetry": _telemetry(server, view, repeats),
                "command": _command(path, repeats),
                "requests": _requests(server, view, random, repeats // 10),
                "residency": _residency(server, view, random, repeats),
                "snapshot": _snapshot(server, view, random, max(20, repeats // 1000)),
                "digest": _digests(random, max(100, repeats // 100)),
            }
    finally:
        if collecting:
            gc.enable()


def _info() -> ServerInfo:
    tables = tuple(TableMap(f"table{index}", 1_000_000, 0, index > 0) for index in range(TABLES))
    return ServerInfo(
        node="bench",
        model="bench",
        extents=1500,
        extent_bytes=2 << 20,
        page_tokens=PAGE_TOKENS,
        pages_per_extent=2,
        max_sequence_tokens=HISTORY_TOKENS,
        drop_block_tokens=512,
        tables=tables,
        classes=(RowClass(128, 16_384, 3_000_000, tuple(range(TABLES))),),
        cost_model=CostModel.SERIAL,
        sample_rate=SAMPLE_RATE,
        alpha_min=0.1,
        alpha_max=0.9,
        slo_ms=100.0,
        device="cpu",
    )


def _timed(call: Callable[[], Any], repeats: int) -> list[int]:
    clock = time.perf_counter_ns
    samples = []
    for _ in range(repeats):
        begin = clock()
        call()
        samples.append(clock() - begin)
    return samples


def _percentiles(samples_ns: list[int]) -> dict[str, float]:
    values = np.array(samples_ns) / 1000
    found: dict[str, float] = {"n": len(values), "p50_us": float(np.percentile(values, 50))}
    if len(values) >= 1000:
        found["p99_us"] = float(np.percentile(values, 99))
    else:
        found["p95_us"] = float(np.percentile(values, 95))
    return found


def _write_and_read(
    write: Callable[[], Any], read: Callable[[], Any], repeats: int
) -> dict[str, Any]:
    clock = time.perf_counter_ns
    writes, reads, both = [], [], []
    for _ in range(repeats):
        begin = clock()
        write()
        middle = clock()
        read()
        end = clock()
        writes.append(middle - begin)
        reads.append(end - middle)
        both.append(end - begin)
    return {
        "write": _percentiles(writes),
        "read": _percentiles(reads),
        "write_and_read": _percentiles(both),
    }


def _bare_copy(directory: Path, repeats: int) -> dict[str, Any]:
    size = TELEMETRY.itemsize
    with (directory / "bare").open("w+b") as file:
        file.truncate(4096)
        written = memoryview(mmap.mmap(file.fileno(), 4096))[:size]
        mapped = memoryview(mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_READ))[:size]
    source, target = memoryview(bytearray(size)), memoryview(bytearray(size))

    def write() -> None:
        written[:] = source

    def read() -> None:
        target[:] = mapped

    return {"bytes": size, **_write_and_read(write, read, repeats)}


def _telemetry(server: ServerBlock, view: ServerView, repeats: int) -> dict[str, Any]:
    into = np.zeros((), TELEMETRY)
    figures = _write_and_read(server.publish_telemetry, lambda: view.read_telemetry(into), repeats)
    return {
        "bytes": TELEMETRY.itemsize,
        **figures,
        "age": _percentiles(_timed(view.telemetry_age_s, repeats)),
    }


def _command(directory: Path, repeats: int) -> dict[str, Any]:
    block, view = SidecarBlock.create(directory), SidecarView.open(directory)
    into = np.zeros((), COMMAND)

    def write() -> None:
        block.write_command(block.command)

    return {
        "bytes": COMMAND.itemsize,
        **_write_and_read(write, lambda: view.read_command(into), repeats),
        "log_decision": _percentiles(_timed(lambda: block.push_decision(block.decision), repeats)),
    }


def _sample(random: np.random.Generator) -> RequestSample:
    keys = int(HISTORY_TOKENS * TABLES * SAMPLE_RATE)
    candidates = int(CANDIDATES * TABLES * SAMPLE_RATE)
    return RequestSample(
        user=int(random.integers(-(2**63), 2**63 - 1)),
        history_tokens=HISTORY_TOKENS,
        candidates=CANDIDATES,
        rows_total=(HISTORY_TOKENS + CANDIDATES) * TABLES,
        history_rows_total=HISTORY_TOKENS * TABLES,
        page_fingerprints=random.integers(0, 2**32, HISTORY_TOKENS // PAGE_TOKENS, np.uint32),
        history_keys=random.integers(0, 2**42, keys, np.uint64),
        history_positions=np.sort(random.integers(0, HISTORY_TOKENS, keys, np.uint32)),
        candidate_keys=random.integers(0, 2**42, candidates, np.uint64),
    )


def _requests(
    server: ServerBlock, view: ServerView, random: np.random.Generator, repeats: int
) -> dict[str, Any]:
    samples = [_sample(random) for _ in range(64)]
    turn = 0

    def push() -> None:
        nonlocal turn
        turn += 1
        server.push_request(samples[turn & 63])

    figures = _write_and_read(push, lambda: view.read_requests(1), repeats)
    return {
        "history_tokens": HISTORY_TOKENS,
        "sampled_rows": len(samples[0].history_keys) + len(samples[0].candidate_keys),
        "push": figures["write"],
        "pop": figures["read"],
    }


def _residency(
    server: ServerBlock, view: ServerView, random: np.random.Generator, repeats: int
) -> dict[str, Any]:
    users = random.integers(-(2**63), 2**63 - 1, 1024).tolist()
    turn = 0

    def push() -> None:
        nonlocal turn
        turn += 1
        server.push_user_cached(users[turn & 1023], 4096)

    figures = _write_and_read(push, view.read_residency, repeats)
    return {
        "push": figures["write"],
        "pop": figures["read"],
        "poll_without_news": _percentiles(_timed(view.read_residency, repeats)),
    }


def _snapshot(
    server: ServerBlock, view: ServerView, random: np.random.Generator, repeats: int
) -> dict[str, Any]:
    users = random.integers(-(2**63), 2**63 - 1, SNAPSHOT_USERS)
    tokens = random.integers(64, 4096, SNAPSHOT_USERS, dtype=np.uint32)
    shard_rows = random.integers(0, 5000, SHARDS, dtype=np.uint32)
    clock = time.perf_counter_ns
    slices, reads = [], []
    for turn in range(repeats):
        snapshot = ResidencySnapshot(server.boot_epoch, turn, users, tokens, shard_rows)
        writing = server.write_snapshot(snapshot)
        done = False
        while not done:
            begin = clock()
            done = next(writing, 1) is not None
            slices.append(clock() - begin)
        begin = clock()
        view.read_snapshot()
        reads.append(clock() - begin)
    return {
        "users": SNAPSHOT_USERS,
        "slice": _percentiles(slices),
        "read": _percentiles(reads),
    }


def _digests(random: np.random.Generator, repeats: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    shard_rows = random.integers(0, 5000, SHARDS, dtype=np.uint32)
    for count in DIGEST_USERS:
        users = random.integers(-(2**63), 2**63 - 1, count)
        tokens = random.integers(1, 64, count, dtype=np.uint32) * np.uint32(PAGE_TOKENS)

        def encode(users: Any = users, tokens: Any = tokens) -> bytes:
            return encode_digest(
                users, tokens, shard_rows, boot_epoch=1, sequence=1, page_tokens=PAGE_TOKENS
            )

        blob = encode()

        def decode(blob: bytes = blob) -> None:
            decode_digest(blob)

        figures[f"{count}_users"] = {
            "bytes": len(blob),
            "bytes_per_user": len(blob) / count,
            "encode": _percentiles(_timed(encode, repeats)),
            "decode": _percentiles(_timed(decode, repeats)),
        }
    return figures
