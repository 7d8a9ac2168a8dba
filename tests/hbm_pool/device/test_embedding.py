"""The embedding cache: whatever happens, the rows of a gather are those of the tables."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hbm_pool.device.embedding import EmbeddingCache
from hbm_pool.device.staging import staging_ring
from hbm_pool.errors import RowStoreError
from hbm_pool.host.config import TableSpec
from hbm_pool.host.fences import EpochClock, Lane
from hbm_pool.host.file_store import FileRowStore, create_file
from hbm_pool.host.link import LinkModel
from hbm_pool.host.row_store import seeded_rows
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule


def _beside(name: str) -> Any:
    """A module of this folder (tests are imported by file, not as packages)."""
    full = f"hbm_pool_tests_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


emb_world = _beside("emb_world")
EmbWorld = emb_world.EmbWorld
DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["host", "device"])
def index(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Interleavings(RuleBasedStateMachine):
    """Everything the cache can be asked, in any order; checked after each step."""

    index = "host"

    @initialize(seed=st.integers(0, 999), extents=st.integers(0, 30))
    def start(self, seed: int, extents: int) -> None:
        self.world = EmbWorld(seed, index=self.index)
        self.world.grow(extents)
        self.promised = 0

    @rule(count=st.integers(1, 120), skew=st.sampled_from([0.4, 1.0, 2.0]))
    def gather(self, count: int, skew: float) -> None:
        self.world.gather_and_check(self.world.batch(count, skew))

    @rule(count=st.integers(1, 60))
    def prefetch(self, count: int) -> None:
        ids = self.world.batch(count)
        self.world.cache.prefetch(ids)

    @rule(count=st.integers(0, 8))
    def grow(self, count: int) -> None:
        self.world.grow(min(count, len(self.world.free)))

    @rule(count=st.integers(0, 10))
    def plan_shrink(self, count: int) -> None:
        held = self.world.cache.num_extents
        planned = self.world.cache.plan_shrink(count)
        assert planned == min(count, held - self.promised)
        self.promised += planned

    @rule(budget_us=st.sampled_from([0.0, 200.0, 1e6]))
    def shrink_step(self, budget_us: float) -> None:
        released = self.world.cache.shrink_step(budget_us)
        self.promised -= released.size
        assert self.promised >= 0
        if budget_us == 1e6:
            assert self.promised == 0
        self.world.give_back(released)

    @rule()
    def cancel_shrink(self) -> None:
        assert self.world.cache.cancel_shrink() == self.promised
        self.promised = 0

    @rule(count=st.integers(0, 12))
    def drop(self, count: int) -> None:
        held = self.world.cache.num_extents
        released = self.world.cache.drop(count)
        assert released.size == min(count, held)
        self.promised = max(0, self.promised - released.size)
        self.world.give_back(released)

    @rule()
    def rebalance(self) -> None:
        held = self.world.cache.num_extents
        self.world.cache.rebalance(500.0)
        assert self.world.cache.num_extents == held

    @rule()
    def reset(self) -> None:
        held = self.world.cache.num_extents
        self.world.cache.reset()
        self.promised = 0
        assert self.world.cache.num_extents == held
        assert all(self.world.cache.resident_ids(name).size == 0 for name in self.world.values)

    @rule()
    def refill(self) -> None:
        evicted = self.world.cache.counters().evictions
        for number, keys in self.world.cache.refill_candidates(40, least=1):
            self.world.cache.refill(number, keys)
        assert self.world.cache.counters().evictions == evicted

    @rule(name=st.sampled_from(["item", "shop", "text", "tiny"]), count=st.integers(0, 40))
    def push_rows(self, name: str, count: int) -> None:
        world = self.world
        ids = world.draw(name, count)
        new = torch.from_numpy(world.rng.integers(-99, 99, (count, world.values[name].shape[1])))
        new = new.to(world.values[name].dtype)
        before = world.cache.row_epoch
        assert world.cache.push_rows(name, ids, new) == before + (count > 0)
        for place, row in enumerate(ids.tolist()):
            world.values[name][row] = new[place]

    @rule(name=st.sampled_from(["item", "text"]))
    def failed_read(self, name: str) -> None:
        world = self.world
        ids = world.batch(60, 0.4)
        world.stores[name].fail_reads = True
        misses = world.cache.counters().misses
        problem = ""
        try:
            world.cache.gather(ids, world.buffers(ids))
        except RowStoreError as error:
            problem = str(error)
        world.stores[name].fail_reads = False
        if problem:
            assert "the disk is gone" in problem
            assert f"'{name}'" in problem
            assert world.cache.counters().misses == misses

    @rule(count=st.integers(2, 20))
    def failed_push(self, count: int) -> None:
        world = self.world
        ids = np.unique(world.draw("item", count).numpy())
        new = torch.full((ids.size, 16), 55.0)
        world.stores["item"].fail_writes = True
        with pytest.raises(RowStoreError, match="the disk is full"):
            world.cache.push_rows("item", ids, new)
        world.stores["item"].fail_writes = False
        world.values["item"][ids[: ids.size // 2]] = 55.0  # what got through
        resident = set(world.cache.resident_ids("item").tolist())
        assert not resident & set(ids.tolist())

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "world"):
            self.world.check()


class InterleavingsOnDevice(Interleavings):
    index = "device"


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(
    max_examples=50, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestInterleavingsOnDevice = InterleavingsOnDevice.TestCase
TestInterleavingsOnDevice.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_hot_rows_stay(index: str) -> None:
    world = EmbWorld(1, index=index)
    world.grow(30)
    for _ in range(60):
        world.gather_and_check(world.batch(100))
    stats = [world.gather_and_check(world.batch(100)) for _ in range(20)]
    assert sum(s.misses for s in stats) < 0.2 * sum(s.accesses for s in stats)
    counters = world.cache.counters()
    assert counters.hits + counters.misses == counters.accesses
    assert counters.evictions > 0
    assert counters.ghost_hits > 0
    assert len(counters.classes) == 3


def test_both_indices_miss_alike() -> None:
    misses = {}
    for index in ("host", "device"):
        world = EmbWorld(2, index=index)
        world.grow(25)
        misses[index] = sum(world.gather_and_check(world.batch(80)).misses for _ in range(150))
    assert misses["device"] == pytest.approx(misses["host"], rel=0.1)


def test_repeated_rows_are_fetched_once(index: str) -> None:
    world = EmbWorld(3, index=index)
    world.grow(30)
    stats = world.gather_and_check({"item": torch.tensor([5, 9, 5, 5, 9])})
    assert (stats.accesses, stats.unique, stats.misses, stats.hits) == (5, 2, 2, 3)
    assert stats.bytes == 2 * 64
    assert stats.class_misses == (2, 0, 0)
    assert world.gather_and_check({"item": torch.tensor([9, 5])}).misses == 0


def test_without_extents_every_row_is_a_conflict(index: str) -> None:
    world = EmbWorld(4, index=index)
    ids = {"item": torch.tensor([1, 2, 3])}
    assert world.gather_and_check(ids).misses == 3
    assert world.gather_and_check(ids).misses == 3
    world.gather_and_check(ids)
    assert world.cache.counters().conflict_misses >= 6


def test_fault_is_that_batch_s_alone(index: str) -> None:
    world = EmbWorld(5, index=index)
    world.grow(30)
    world.gather_and_check({"item": torch.arange(50)})
    world.stores["item"].fail_reads = True
    hits = {"item": torch.arange(50)}
    world.gather_and_check(hits)
    with pytest.raises(RowStoreError, match="table 'item': 1 rows could not be read"):
        world.cache.gather({"item": torch.tensor([3, 700])}, {"item": torch.empty(2, 16)})
    world.stores["item"].fail_reads = False
    world.check()
    assert world.gather_and_check({"item": torch.tensor([3, 700])}).misses == 1


def test_planned_shrink_keeps_what_is_referenced(index: str) -> None:
    world = EmbWorld(6, index=index, tables=(TableSpec("item", 1500, 16),))
    world.grow(30)
    hot = torch.arange(700, 800)  # in extents that are given up
    world.gather_and_check({"item": torch.arange(900)})
    for _ in range(3):
        world.gather_and_check({"item": hot})
    assert world.cache.plan_shrink(20) == 20
    while world.cache.num_extents > 10:
        world.give_back(world.cache.shrink_step(50.0))
        world.check()
    assert world.gather_and_check({"item": hot}).misses == 0
    assert world.cache.counters().relocated_rows > 0


def test_rows_in_extents_being_emptied_are_pushed_too(index: str) -> None:
    world = EmbWorld(23, index=index, tables=(TableSpec("item", 1500, 16),))
    world.grow(10)
    ids = torch.arange(50)
    world.gather_and_check({"item": ids})
    assert world.cache.plan_shrink(10) == 10
    world.values["item"][:50] = 7.0
    world.cache.push_rows("item", ids, torch.full((50, 16), 7.0))
    assert world.gather_and_check({"item": ids}).misses == 0


def test_ghosts_and_promotions_beside_unused_slots(index: str) -> None:
    """Batches that use the last unused slots up and need holes of main as well."""
    world = EmbWorld(24, index=index, tables=(TableSpec("item", 1500, 16),))
    world.grow(5)
    for step in range(120):
        world.gather_and_check({"item": world.draw("item", 60, 0.5)})
        if step % 5 == 0 and world.free:
            world.grow(1)
        if step % 7 == 0:
            world.give_back(world.cache.drop(1))
        world.check()


def test_extents_on_their_way_to_another_class_can_be_given_up() -> None:
    world = EmbWorld(7)
    world.grow(40)
    # All the demand is on one class, so that the others have too much.
    for _ in range(80):
        world.gather_and_check({"text": world.draw("text", 200, 0.3)})
    before = world.cache.class_extents()
    for _ in range(200):
        world.cache.rebalance(200.0)
        world.check()
    after = world.cache.class_extents()
    assert after[1] > before[1]
    assert sum(after) == 40
    world.cache.set_row_prices([1000.0, 1e-6, 1e-6])
    world.gather_and_check({"item": world.draw("item", 200, 0.3)})
    world.cache.rebalance(0.0)
    assert world.cache.plan_shrink(15) == 15
    released = [world.cache.shrink_step(1e6)]
    world.give_back(np.concatenate(released))
    assert world.cache.num_extents == 25
    world.check()


def test_prefetched_rows_hit(index: str) -> None:
    world = EmbWorld(8, index=index)
    world.grow(30)
    ids = {"item": torch.arange(40), "text": torch.arange(10)}
    assert world.cache.prefetch(ids) == 50
    assert world.cache.prefetch(ids) == 0
    assert world.gather_and_check(ids).misses == 0


def test_refill_brings_the_hottest_rows_into_won_extents(index: str) -> None:
    world = EmbWorld(9, index=index, tables=(TableSpec("item", 1500, 16),))
    world.grow(4)
    hot = torch.arange(300)
    for _ in range(4):
        world.gather_and_check({"item": hot})
    assert world.cache.refill_candidates(1000) == []
    world.grow(20)
    candidates = world.cache.refill_candidates(1000)
    assert [number for number, _ in candidates] == [0]
    keys = candidates[0][1]
    assert set(keys.tolist()) <= set(range(300))
    kept = world.cache.refill(0, keys)
    assert kept == keys.size
    world.check()
    assert world.gather_and_check({"item": torch.from_numpy(np.sort(keys))}).misses == 0


def test_refill_stops_when_no_slot_is_unused(index: str) -> None:
    world = EmbWorld(10, index=index, tables=(TableSpec("item", 1500, 16),))
    world.grow(3)
    free = world.cache.free_slots()
    assert free > 0
    resident = world.cache.resident_ids("item").size
    assert world.cache.refill(0, np.arange(1000, dtype=np.int64)) == free
    assert world.cache.resident_ids("item").size == resident + free
    assert world.cache.refill(0, np.arange(1000, 1100, dtype=np.int64)) == 0
    world.check()


def test_shard_rows_count_every_resident_row(index: str) -> None:
    world = EmbWorld(11, index=index)
    world.grow(30)
    world.gather_and_check(world.batch(200))
    shards = world.cache.shard_rows(16)
    resident = sum(world.cache.resident_ids(name).size for name in world.values)
    assert shards.dtype == np.uint32
    assert int(shards.sum()) == resident > 0


def test_link_is_charged_for_pushed_rows_that_are_resident() -> None:
    link = LinkModel(None)
    world = EmbWorld(3, link=link)
    world.grow(20)
    world.gather_and_check({"text": torch.arange(10)})
    values = torch.zeros((20, 64), dtype=torch.bfloat16)
    world.cache.push_rows("text", torch.arange(20), values)
    assert link.counters().push_bytes == 10 * 128


def test_link_is_charged_for_misses_alone() -> None:
    link = LinkModel(None)
    world = EmbWorld(12, link=link)
    world.grow(30)
    stats = world.gather_and_check({"item": torch.arange(20)})
    assert link.counters().foreground_bytes == stats.bytes == 20 * 64
    world.gather_and_check({"item": torch.arange(20)})
    assert link.counters().foreground_bytes == 20 * 64
    world.grow(5)
    world.cache.refill(0, np.arange(100, 110, dtype=np.int64))
    assert link.counters().refill_bytes == 10 * 64


def test_lock_is_free_while_a_store_is_read() -> None:
    """A gather of resident rows, growth and a drop go on while another gather waits for its
    store."""
    world = EmbWorld(13)
    world.grow(20)
    world.gather_and_check({"item": torch.arange(30)})
    entered, leave = threading.Event(), threading.Event()
    plain_read = world.stores["item"].read

    def slow_read(ids: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        entered.set()
        assert leave.wait(DEADLINE_S)
        plain_read(ids, out)

    world.stores["item"].read = slow_read
    out = torch.empty(1, 16)
    waiting = threading.Thread(
        target=world.cache.gather, args=({"item": torch.tensor([900])}, {"item": out})
    )
    waiting.start()
    assert entered.wait(DEADLINE_S)
    assert world.gather_and_check({"item": torch.arange(30)}).misses == 0
    world.grow(5)
    world.give_back(world.cache.drop(22))
    world.cache.plan_shrink(1)
    world.give_back(world.cache.shrink_step(1e6))
    leave.set()
    waiting.join(DEADLINE_S)
    assert not waiting.is_alive()
    assert torch.equal(out[0], world.values["item"][900])
    world.stores["item"].read = plain_read
    world.check()


def test_push_beside_a_read_is_taken_over() -> None:
    """The store is read before the push and the row inserted after it: the new value counts."""
    world = EmbWorld(14)
    world.grow(20)
    plain_read = world.stores["item"].read

    def read_then_push(ids: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        plain_read(ids, out)
        world.stores["item"].read = plain_read
        world.cache.push_rows("item", np.array([900]), torch.full((1, 16), 33.0))

    world.stores["item"].read = read_then_push
    out = torch.empty(2, 16)
    world.cache.gather({"item": torch.tensor([901, 900])}, {"item": out})
    assert (out[1] == 33.0).all()
    assert torch.equal(out[0], world.values["item"][901])
    world.values["item"][900] = 33.0
    world.check()
    world.gather_and_check({"item": torch.tensor([900, 901])})


def test_failed_push_beside_a_read_is_read_again() -> None:
    world = EmbWorld(15)
    world.grow(20)
    plain_read = world.stores["item"].read

    def read_then_fail(ids: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        plain_read(ids, out)
        world.stores["item"].read = plain_read
        world.stores["item"].fail_writes = True
        with pytest.raises(RowStoreError):
            world.cache.push_rows("item", np.array([900, 901]), torch.full((2, 16), 33.0))
        world.stores["item"].fail_writes = False

    world.stores["item"].read = read_then_fail
    out = torch.empty(2, 16)
    world.cache.gather({"item": torch.tensor([901, 900])}, {"item": out})
    world.values["item"][900] = 33.0  # the half that got through
    assert torch.equal(out, world.values["item"][[901, 900]])
    world.check()


def test_spans_cover_what_reads_extents() -> None:
    clock = EpochClock()
    world = EmbWorld(16, clock=clock)
    world.grow(20)
    seen: list[int] = []
    plain_read = world.stores["item"].read

    def look(ids: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        seen.append(clock.open_spans(Lane.EMB))
        plain_read(ids, out)

    world.stores["item"].read = look
    world.gather_and_check({"item": torch.arange(5)})
    world.stores["item"].fail_reads = True
    with pytest.raises(RowStoreError):
        world.cache.gather({"item": torch.tensor([99])}, {"item": torch.empty(1, 16)})
    assert seen
    assert min(seen) == 1
    assert clock.open_spans(Lane.EMB) == 0


def test_many_threads(index: str) -> None:
    """Gathers, pushes, moves and refill at once. Every row of a gather is whole and never older
    than the newest value whose push had returned before the gather began."""
    rows, width = 400, 16
    world = EmbWorld(17, index=index, tables=(TableSpec("item", rows, width),))
    # A row's value is its version, in every column; version v is only ever followed by v + 1.
    start = torch.zeros(rows, width)
    world.cache.push_rows("item", torch.arange(rows), start)
    world.grow(20)
    published = np.zeros(rows, np.int64)  # newest version whose push has returned
    stop = threading.Event()
    errors: list[BaseException] = []
    rounds = 600 if index == "host" else 150

    def guarded(work: Any) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)
                stop.set()

        return threading.Thread(target=run)

    def gather(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(rounds):
            if stop.is_set():
                return
            ids = (rng.pareto(0.8, 150) * 20).astype(np.int64) % rows
            floor = published[ids].copy()
            out = torch.empty(150, width)
            world.cache.gather({"item": torch.from_numpy(ids)}, {"item": out})
            found = out.numpy()
            assert (found == found[:, :1]).all(), "half a row"
            assert (found[:, 0] >= floor).all(), "a stale row"

    def push() -> None:
        rng = np.random.default_rng(99)
        version = 0
        while not stop.is_set():
            version += 1
            ids = np.unique(rng.integers(0, rows, 30))
            world.cache.push_rows("item", ids, torch.full((ids.size, width), float(version)))
            published[ids] = version

    def move() -> None:
        rng = np.random.default_rng(98)
        while not stop.is_set():
            choice = int(rng.integers(0, 5))
            if choice == 0:
                world.grow(min(4, len(world.free)))
            elif choice == 1:
                world.cache.plan_shrink(4)
            elif choice == 2:
                world.give_back(world.cache.drop(2))
            else:
                world.give_back(world.cache.shrink_step(300.0))

    def refill() -> None:
        while not stop.is_set():
            for number, keys in world.cache.refill_candidates(50, least=1):
                world.cache.refill(number, keys)

    gathers = [guarded(lambda seed=seed: gather(seed)) for seed in range(3)]
    others = [guarded(work) for work in (push, move, refill)]
    for thread in gathers + others:
        thread.start()
    for thread in gathers:
        thread.join(DEADLINE_S)
    stop.set()
    for thread in others:
        thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in gathers + others)
    assert not errors, errors
    world.values["item"] = torch.from_numpy(published.astype(np.float32))[:, None].expand(-1, width)
    world.cache.cancel_shrink()
    world.check()


@pytest.mark.parametrize(
    ("ids", "out", "message"),
    [
        ({"nothing": torch.zeros(1, dtype=torch.int64)}, {}, "table 'nothing' does not exist"),
        ({"item": torch.zeros(1, dtype=torch.int32)}, {}, r"must be \[n\] int64"),
        ({"item": torch.zeros(1, 1, dtype=torch.int64)}, {}, r"must be \[n\] int64"),
        ({"item": torch.tensor([0])}, {}, "no buffer for the rows of table 'item'"),
        ({"item": torch.tensor([1500])}, {"item": (1, 16)}, "has no row 1500"),
        ({"item": torch.tensor([4, -1])}, {"item": (2, 16)}, "has no row -1"),
        ({"item": torch.tensor([0])}, {"item": (1, 15)}, r"must be contiguous, \[1, 16\]"),
        ({"item": torch.tensor([0])}, {"item": (2, 16)}, r"must be contiguous, \[1, 16\]"),
    ],
)
def test_bad_requests_change_nothing(
    ids: dict[str, torch.Tensor], out: dict[str, tuple[int, ...]], message: str
) -> None:
    world = EmbWorld(18)
    world.grow(10)
    good = {"shop": torch.arange(10)}
    buffers = {name: torch.empty(shape) for name, shape in out.items()}
    with pytest.raises(ValueError, match=message):
        world.cache.gather({**good, **ids}, {**world.buffers(good), **buffers})
    assert world.cache.counters().accesses == 0
    assert world.cache.resident_ids("shop").size == 0


def test_buffer_of_another_dtype_or_layout_is_refused() -> None:
    world = EmbWorld(19)
    ids = {"item": torch.arange(4)}
    for buffer in (torch.empty(4, 16, dtype=torch.float64), torch.empty(16, 4).T):
        with pytest.raises(ValueError, match="must be contiguous"):
            world.cache.gather(ids, {"item": buffer})


def test_bad_pushes_are_refused() -> None:
    world = EmbWorld(20)
    push = world.cache.push_rows
    with pytest.raises(ValueError, match="has no row 1500"):
        push("item", np.array([1500]), torch.zeros(1, 16))
    with pytest.raises(ValueError, match=r"must be \[1, 16\] torch.float32"):
        push("item", np.array([1]), torch.zeros(1, 15))
    with pytest.raises(ValueError, match=r"must be \[1, 16\] torch.float32"):
        push("item", np.array([1]), torch.zeros(1, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"must be \[n\] int64"):
        push("item", np.array([1.5]), torch.zeros(1, 16))
    assert world.cache.row_epoch == 0


def test_stores_must_fit_the_tables() -> None:
    world = EmbWorld(21)
    stores = dict(world.stores)
    del stores["tiny"]
    with pytest.raises(ValueError, match="one store per table"):
        EmbeddingCache(world.shape, world.arena, stores)
    with pytest.raises(ValueError, match="table 'tiny' has 300 rows of 5 bytes, its store 1500"):
        EmbeddingCache(world.shape, world.arena, {**stores, "tiny": world.stores["item"]})


def test_rows_come_from_a_file_through_a_bounded_ring(tmp_path: Path) -> None:
    tables = (TableSpec("item", 5000, 16),)
    path = tmp_path / "item.rows"
    create_file(path, 5000, 64, lambda start, stop: seeded_rows(3, start, stop, 16))
    world = EmbWorld(25, tables=tables)
    store = FileRowStore(path, buffers=staging_ring("cpu", buffers=2, buffer_bytes=512))
    cache = EmbeddingCache(world.shape, world.arena, {"item": store})
    cache.grow(np.arange(30, dtype=np.int32))
    whole = torch.from_numpy(seeded_rows(3, 0, 5000, 16))
    for _ in range(20):
        ids = torch.from_numpy(world.rng.integers(0, 5000, 300))
        out = torch.empty(300, 16)
        cache.gather({"item": ids}, {"item": out})
        assert torch.equal(out, whole[ids])
    cache.push_rows("item", torch.arange(100), torch.ones(100, 16))
    out = torch.empty(100, 16)
    cache.reset()
    cache.gather({"item": torch.arange(100)}, {"item": out})
    assert (out == 1.0).all()
    assert cache.check_rows() == []
    store.close()
    with pytest.raises(RowStoreError, match="could not be read"):
        cache.gather({"item": torch.arange(1000, 1200)}, {"item": torch.empty(200, 16)})
    with pytest.raises(ValueError, match="0 staging buffers"):
        staging_ring("cpu", buffers=0)


def test_prices_must_fit_the_classes() -> None:
    world = EmbWorld(22)
    with pytest.raises(ValueError, match="give 3 positive numbers"):
        world.cache.set_row_prices([1.0, 2.0])
    with pytest.raises(ValueError, match="cannot give up -1"):
        world.cache.drop(-1)
