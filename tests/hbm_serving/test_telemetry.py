"""The server's end of the control block, against the real block on the other side."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from hbm_pool.contracts.control_block import ServerView, SidecarBlock
from hbm_pool.contracts.history import page_fingerprints, table_rows
from hbm_pool.contracts.identity import row_key, sampled
from hbm_pool.contracts.records import COMMAND, TELEMETRY, ServerInfo, UserCached, UserEvicted
from hbm_serving.batching import RankResult
from hbm_serving.config import Config
from hbm_serving.engine import Engine
from hbm_serving.features import RankRequest
from hbm_serving.telemetry import ControlLink, LatencyWindow, ServedRequest, request_sample
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def info(config: Config) -> ServerInfo:
    engine = Engine(config)
    engine.close()
    return engine.info


@pytest.fixture
def link(tmp_path: Path, info: ServerInfo, config: Config) -> Iterator[ControlLink]:
    made = ControlLink.create(tmp_path, info, config.model)
    assert made is not None
    yield made
    made.close()


def command(block: SidecarBlock, link: ControlLink, generation: int, **change: float) -> None:
    record = np.zeros((), dtype=COMMAND)
    record["boot_epoch"] = link.boot_epoch
    record["generation"] = generation
    record["alpha"] = 0.5
    record["refill_bytes_per_s"] = 1e6
    for name, value in change.items():
        record[name] = value
    block.write_command(record)


def test_sample_rate_leaves_enough_sampled_slots(info: ServerInfo, config: Config) -> None:
    assert 0.0 < info.sample_rate <= 1.0
    fewest = min(kind.rows_per_extent for kind in info.classes)
    slots = int(info.alpha_min * info.extents) * fewest
    assert info.sample_rate == 1.0 or slots * info.sample_rate >= config.server.sample_slots * 0.5


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rate=st.sampled_from([0.05, 0.3, 1.0]))
def test_sample_lists_every_sampled_row_of_the_whole_history(
    config: Config, seed: int, rate: float
) -> None:
    generator = np.random.default_rng(seed)
    tokens = int(generator.integers(0, 30))
    items = generator.integers(0, config.model.items, tokens)
    candidates = generator.integers(0, config.model.items, 5)
    times = np.arange(tokens)
    pages = page_fingerprints(items, times, None, 4)
    request = RankRequest(7, items, times, None, candidates, 0, tokens)
    sample = request_sample(ServedRequest(request, pages), config.model, rate)

    def keys(of: np.ndarray) -> list[tuple[int, int]]:
        found = []
        for position, item in enumerate(of):
            for index, table in enumerate(config.model.tables):
                (row,) = table_rows(np.array([item]), index, table.rows, hashed=index > 0)
                key = np.array([row_key(index, int(row))], dtype=np.uint64)
                if sampled(key, rate)[0]:
                    found.append((position, int(key[0])))
        return found

    history = keys(items)
    assert sample.history_positions.tolist() == [position for position, _ in history]
    assert sample.history_keys.tolist() == [key for _, key in history]
    assert sample.candidate_keys.tolist() == [key for _, key in keys(candidates)]
    assert sample.history_rows_total == tokens * len(config.model.tables)
    assert sample.rows_total == (tokens + 5) * len(config.model.tables)
    assert sample.page_fingerprints.tolist() == pages.tolist()


def test_events_samples_and_telemetry_arrive(
    link: ControlLink, tmp_path: Path, config: Config
) -> None:
    view = ServerView.open(tmp_path)
    view.read_requests(10)
    link.events.extend([(5, 16), (6, 4), (5, 8), (6, 0), (9, 0)])
    items = np.arange(8)
    request = RankRequest(5, items, items, None, items[:2], 0, 8)
    served = ServedRequest(request, page_fingerprints(items, items, None, 4))
    link.offer([served])
    link.offer([served] * 5000)  # more than may wait: counted as lost
    link.publish(lambda record: record.__setitem__("queue_depth", 3))
    events, gap = view.read_residency()
    assert not gap
    # User 9 was never announced: its eviction is no news.
    assert events == [
        UserCached(1, 5, 16),
        UserCached(2, 6, 4),
        UserCached(3, 5, 8),
        UserEvicted(4, 6),
    ]
    samples, lost = view.read_requests(10)
    assert (len(samples), lost) == (1, 5000)
    assert samples[0].user == 5
    record = np.zeros((), dtype=TELEMETRY)
    assert view.read_telemetry(record)
    assert record["queue_depth"] == 3
    assert record["residency_sequence"] == 4


def test_commands_are_taken_once_and_only_within_bounds(link: ControlLink, tmp_path: Path) -> None:
    assert link.read_command(0.0) is None  # no sidecar yet
    block = SidecarBlock.create(tmp_path)
    assert link.read_command(10.0) is None  # a sidecar without a command
    command(block, link, 1)
    taken = link.read_command(10.1)
    assert taken is not None
    assert (taken.alpha, taken.refill_bytes_per_s, taken.drop_only) == (0.5, 1e6, False)
    assert link.read_command(10.2) is None
    for wrong in (
        {"alpha": 0.95},
        {"alpha": float("nan")},
        {"refill_bytes_per_s": -1.0},
        {"refill_bytes_per_s": float("inf")},
    ):
        command(block, link, 2, **wrong)
        assert link.read_command(10.3) is None
    assert link.ignored == 4
    command(block, link, 3, boot_epoch=link.boot_epoch + 1)
    assert link.read_command(10.4) is None
    command(block, link, 4, drop_only=1)
    taken = link.read_command(10.5)
    assert taken is not None
    assert taken.drop_only
    assert link.command_generation == 4


def test_a_new_sidecar_is_found_and_may_start_counting_anew(
    link: ControlLink, tmp_path: Path
) -> None:
    block = SidecarBlock.create(tmp_path)
    command(block, link, 9)
    assert link.read_command(0.0) is not None
    (tmp_path / "sidecar.cb").unlink()
    assert link.read_command(1.0) is None
    block = SidecarBlock.create(tmp_path)
    command(block, link, 1)
    assert link.read_command(2.0) is not None


def test_foreign_bytes_in_the_sidecars_place_are_survived(
    link: ControlLink, tmp_path: Path
) -> None:
    (tmp_path / "sidecar.cb").write_bytes(b"\x00" * 100)
    assert link.read_command(0.0) is None
    (tmp_path / "sidecar.cb").write_bytes(np.random.default_rng(0).bytes(1 << 20))
    assert link.read_command(1.0) is None


def test_snapshot_is_written_when_asked_for(link: ControlLink, tmp_path: Path) -> None:
    view = ServerView.open(tmp_path)
    block = SidecarBlock.create(tmp_path)
    link.events.extend((user, 4 * user) for user in range(1, 6))
    link.events.append((3, 0))
    link.publish(lambda record: None)
    link.read_command(0.0)
    link.step_snapshot(lambda: np.array([7, 8], dtype=np.uint32))
    assert view.read_snapshot() is None
    block.request_snapshot()
    for _ in range(10):
        link.step_snapshot(lambda: np.array([7, 8], dtype=np.uint32))
    snapshot = view.read_snapshot()
    assert snapshot is not None
    assert snapshot.boot_epoch == link.boot_epoch
    assert snapshot.sequence == 6
    assert dict(zip(snapshot.users.tolist(), snapshot.tokens.tolist(), strict=True)) == {
        1: 4,
        2: 8,
        4: 16,
        5: 20,
    }
    assert snapshot.shard_rows.tolist() == [7, 8]


def test_an_unusable_run_directory_does_not_stop_the_server(
    tmp_path: Path, info: ServerInfo, config: Config
) -> None:
    assert ControlLink.create(tmp_path / "absent" / "deep", info, config.model) is None
    file = tmp_path / "file"
    file.write_text("")
    assert ControlLink.create(file, info, config.model) is None


def test_latency_window_keeps_the_newest() -> None:
    window = LatencyWindow(size=10)
    assert window.percentiles() == (0.0, 0.0, 0)
    for value in range(100):
        window.add(float(value))
    p50, p99, count = window.percentiles()
    assert count == 10
    assert p50 == pytest.approx(94.5)
    assert 98.0 <= p99 <= 99.0


def test_a_node_that_was_overloaded_once_does_not_say_so_for_ever(
    config: Config, draw: Callable[..., RankRequest], tmp_path: Path
) -> None:
    engine = Engine(config, run_dir=tmp_path)
    engine.start()
    generator = np.random.default_rng(1)
    answers: SimpleQueue[RankResult | Exception] = SimpleQueue()
    held = threading.Event()

    def ask(user: int) -> None:
        engine.submit(draw(generator, 24, 8, user=user), 60_000.0, answers.put)

    try:
        ask(1)
        assert isinstance(answers.get(timeout=60), RankResult)
        holding = engine.between_batches(lambda: held.wait(60))
        for user in range(2, 12):
            ask(user)
        assert engine.waiting_ms >= 9 * engine.counters.request_ms > 0.0
        held.set()
        assert holding.result(60)
        for _ in range(10):
            assert isinstance(answers.get(timeout=60), RankResult)
        view, record = ServerView.open(tmp_path), np.zeros((), dtype=TELEMETRY)
        deadline_s = time.monotonic() + 60
        while record["requests"] < 11 or record["queue_ms"] > 0.0:
            assert time.monotonic() < deadline_s, record
            view.read_telemetry(record)
            time.sleep(0.005)
    finally:
        held.set()
        engine.close()


def test_a_server_that_is_ready_has_compiled_what_its_first_move_needs() -> None:
    code = (
        "from hbm_serving.config import load_config; from hbm_serving.engine import Engine; "
        "import hbm_pool.host.class_shares as shares; Engine(load_config('tiny')).close(); "
        "print(len(shares._growth.signatures), len(shares._shrinkage.signatures))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.split()[-2:] == ["1", "1"]
