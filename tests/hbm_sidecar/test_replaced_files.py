"""Files that are replaced under the processes that write and read them."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hbm_pool.contracts.control_block import ControlBlockError, SidecarBlock, SidecarView
from hbm_pool.contracts.digest import MAX_DIGEST_USERS, decode_digest
from hbm_pool.contracts.identity import digest_key
from hbm_pool.contracts.records import COMMAND, CURVES, INTENT, UserCached, UserEvicted
from hbm_sidecar.admin import Admin
from hbm_sidecar.config import SidecarConfig
from hbm_sidecar.decide import Decider
from hbm_sidecar.log import configure
from hbm_sidecar.partition import PartitionChange
from hbm_sidecar.twin import SAMPLES_PER_CYCLE, TwinProcess

LOG = configure("test")
BACKLOG = 3 * SAMPLES_PER_CYCLE


@pytest.fixture
def config(run_dir: Path) -> SidecarConfig:
    return SidecarConfig(
        run_dir=run_dir, node="node-1", mode="fixed", alpha_fixed=0.4, heartbeat_ms=20.0
    )


def replaced(run_dir: Path) -> SidecarView:
    """A view of a new, empty sidecar.cb in the place of the one before."""
    (run_dir / "sidecar.cb").unlink(missing_ok=True)
    SidecarBlock.create(run_dir)
    return SidecarView.open(run_dir)


def curves_of(view: SidecarView) -> np.ndarray:
    record = np.zeros((), dtype=CURVES)
    view.read_curves(record)
    return record


@pytest.fixture
def twin(config: SidecarConfig) -> TwinProcess:
    """Its clock goes on by a second each time it looks: every cycle publishes."""
    seconds = itertools.count(1)
    return TwinProcess(config, LOG, clock_ns=lambda: next(seconds) * 1_000_000_000)


def test_the_twin_writes_into_the_file_that_is_there(twin, server_class, run_dir) -> None:
    server = server_class(run_dir, seed=1)
    first = replaced(run_dir)
    twin.step()
    server.traffic = 5
    server.cycle()
    twin.step()
    assert curves_of(first)["requests"] == 5
    second = replaced(run_dir)
    twin.step()
    assert curves_of(second)["requests"] == 5
    assert curves_of(second)["boot_epoch"] == server.block.boot_epoch


def test_the_twin_loses_nothing_while_its_file_cannot_be_used(twin, server_class, run_dir) -> None:
    server = server_class(run_dir, seed=1)
    replaced(run_dir)
    twin.step()
    foreign = run_dir / "foreign"
    foreign.write_bytes(b"no control block" * 1000)
    foreign.rename(run_dir / "sidecar.cb")
    server.traffic = 5
    server.cycle()
    with pytest.raises(ControlBlockError, match=r"sidecar\.cb"):
        twin.step()
    view = replaced(run_dir)
    twin.step()
    assert (curves_of(view)["requests"], curves_of(view)["requests_lost"]) == (5, 0)


def test_what_the_boot_before_left_unread_is_no_loss_of_the_new_one(
    twin, server_class, run_dir
) -> None:
    first = server_class(run_dir, seed=1)
    view = replaced(run_dir)
    twin.step()
    first.traffic = BACKLOG
    first.cycle()
    twin.step()
    assert curves_of(view)["requests"] == SAMPLES_PER_CYCLE
    second = server_class(run_dir, seed=2)
    second.cycle()
    twin.step()
    second.traffic = 5
    second.cycle()
    twin.step()
    found = curves_of(view)
    assert found["boot_epoch"] == second.block.boot_epoch
    assert (found["requests"], found["requests_lost"]) == (5, 0)


def decided(decider: Decider, view: SidecarView) -> bool:
    """One tick; whether `view` shows a command."""
    decider.prepare()
    decider.tick(due_ns=0)
    return view.read_command(np.zeros((), dtype=COMMAND))


@pytest.fixture
def wish(config: SidecarConfig) -> Callable[[], None]:
    def wish() -> None:
        record = np.zeros((), dtype=INTENT)
        config.partition().fill_intent(record, generation=1, monotonic_ns=1)
        SidecarBlock.open(config.run_dir).write_intent(record)

    return wish


def test_decide_writes_into_the_file_that_is_there(config, server_class, run_dir, wish) -> None:
    server = server_class(run_dir, seed=1)
    server.cycle()
    decider, first = Decider(config, LOG), replaced(run_dir)
    wish()
    assert not decided(decider, first), "the first sound reading only takes the server over"
    assert decided(decider, first)
    generation = newest_generation(first)
    second = replaced(run_dir)
    wish()
    assert decided(decider, second)
    assert newest_generation(second) >= generation


def test_a_restarted_decide_goes_on_counting(config, server_class, run_dir, wish) -> None:
    server_class(run_dir, seed=1).cycle()
    view = replaced(run_dir)
    wish()
    for _ in range(2):
        decider = Decider(config, LOG)
        for _ in range(5):
            decided(decider, view)
    decisions = view.read_decisions(10)
    assert decisions["tick"].tolist() == list(range(1, 11))
    assert np.all(np.diff(decisions["generation"].astype(int)[decisions["generation"] > 0]) >= 0)


def test_decide_reopens_its_side_when_the_other_side_was_quicker(
    config, server_class, run_dir, wish
) -> None:
    server = server_class(run_dir, seed=1)
    server.cycle()
    decider = Decider(config, LOG)
    replaced(run_dir)
    wish()
    decider.prepare()
    view = replaced(run_dir)
    wish()
    # As after a tick on which reading the new file worked and opening it for writing did not.
    assert decider._wishes is not None
    assert decider._wishes.refresh()
    decided(decider, view)
    assert decided(decider, view)


def newest_generation(view: SidecarView) -> int:
    record = np.zeros((), dtype=COMMAND)
    view.read_command(record)
    return int(record["generation"])


def intent_of(view: SidecarView) -> tuple[int, float]:
    record = np.zeros((), dtype=INTENT)
    view.read_intent(record)
    return int(record["generation"]), float(record["alpha_fixed"])


async def test_admin_tells_a_new_file_the_wish_and_asks_in_it(
    config, server_class, run_dir
) -> None:
    server = server_class(run_dir, seed=1)
    server.cycle()
    first, admin = replaced(run_dir), Admin(config, LOG)
    watching = asyncio.create_task(admin.watch())
    try:
        await until(lambda: intent_of(first)[1] == 0.4, server.cycle)
        admin.change(PartitionChange(mode="fixed", alpha_fixed=0.6))
        generation, alpha = intent_of(first)
        assert alpha == 0.6
        await until(lambda: admin.observer.mirror.exact, server.cycle)
        second = replaced(run_dir)
        await until(lambda: intent_of(second)[1] == 0.6, server.cycle)
        assert intent_of(second)[0] > generation
        await until(lambda: second.snapshot_requests() > 0, server.cycle)
    finally:
        watching.cancel()


async def until(condition: Callable[[], Any], meanwhile: Callable[[], Any]) -> None:
    """Wait for a condition, letting the server live; fails after a minute."""
    async with asyncio.timeout(60.0):
        while not condition():
            meanwhile()
            await asyncio.sleep(0.005)


async def test_of_too_many_users_those_with_most_tokens_are_published(
    config, server_class, run_dir
) -> None:
    server = server_class(run_dir, seed=1)
    server.cached(-2, 16)
    server.cached(-1, 16)
    server.cycle()
    replaced(run_dir)
    admin = Admin(config, LOG)
    await until(lambda: look(admin, server).mirror.exact, server.cycle)
    mirror, sequence = admin.observer.mirror, server.sequence
    crowd = [UserCached(sequence + 1 + user, user, 32) for user in range(MAX_DIGEST_USERS - 1)]
    mirror.feed(crowd, gap=False, newest=crowd[-1].sequence)
    users = published(admin, server)
    assert len(users) == MAX_DIGEST_USERS
    # Of the two with the fewest tokens, the one that was heard of last.
    assert digest_key(-1) in users
    assert digest_key(-2) not in users
    assert b"hbm_sidecar_digest_users_cut 1.0" in admin.metrics()
    mirror.feed([UserCached(crowd[-1].sequence + 1, -2, 48)], gap=False, newest=0)
    users = published(admin, server)
    assert digest_key(-2) in users
    assert digest_key(-1) not in users
    mirror.feed([UserEvicted(crowd[-1].sequence + 2, 0)], gap=False, newest=0)
    assert digest_key(-1) in published(admin, server)
    assert b"hbm_sidecar_digest_users_cut 0.0" in admin.metrics()


async def test_a_digest_that_cannot_be_made_leaves_heartbeats_alone(
    config, server_class, run_dir
) -> None:
    server = server_class(run_dir, seed=1)
    server.cached(1, 16)
    server.cycle()
    replaced(run_dir)
    admin = Admin(config, LOG)
    await until(lambda: look(admin, server).mirror.exact, server.cycle)
    look(admin, server)
    known = admin.beat(True)
    assert decode_digest(known.digest).tokens.tolist() == [16]
    described = admin.observer.server.info
    admin.observer.server.info = dataclasses.replace(
        described, page_tokens=1 << 40
    )  # a foreign server's
    server.cached(2, 16)
    look(admin, server)
    kept = admin.beat(False)
    assert kept.digest is None
    assert kept.state.digest_sequence == known.state.digest_sequence
    assert kept.state.digest_crc == known.state.digest_crc
    assert kept.state.sequence > known.state.sequence
    assert b"hbm_sidecar_digest_errors_total 1.0" in admin.metrics()
    admin.observer.server.info = described
    server.cached(3, 16)
    look(admin, server)
    again = admin.beat(False)
    assert len(decode_digest(again.digest).keys) == 3
    assert again.state.digest_sequence > known.state.digest_sequence


def published(admin: Admin, server: Any) -> list[int]:
    """Keys in the digest of the next heartbeat."""
    look(admin, server)  # however long it took to get here, the server has just been seen
    keys: list[int] = decode_digest(admin.beat(False).digest).keys.tolist()
    return keys


def look(admin: Admin, server: Any) -> Any:
    """Admin and server see each other once; what admin sees."""
    server.cycle()
    admin.observer.look(snapshot_refresh_s=0.0)
    return admin.observer
