"""The whole pool under random interleavings, against plain references.

A simulated device runs what the server queues (KV reads and writes) in order but arbitrarily late,
and lets spans of either lane end arbitrarily late. So memory that is handed over too early is
overwritten while it is still being read, and the contents tell.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hbm_pool import KVHandle, KVSpec, KVStatus, Pool, PoolConfig, RamRowStore, TableSpec
from hbm_pool.contracts.history import page_fingerprints
from hbm_pool.errors import RowStoreError
from hbm_pool.host.extents import ExtentLedger, Owner
from hbm_pool.host.fences import EpochClock, Lane
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

PAGE = 4
LONGEST = 32
TABLES = (TableSpec("item", 400, 8), TableSpec("side", 90, 4), TableSpec("more", 60, 8))
KV = KVSpec(layers=2, heads=1, head_dim=2, page_tokens=PAGE)
MAX_LAG_S = 25.0
USERS = 9
EXTENTS = 32


class Device(EpochClock):
    """Runs queued work late: the KV stream in order, the ends of EMB spans in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger: ExtentLedger | None = None
        self.stream: deque[Callable[[], None]] = deque()
        self.gathers: list[Callable[[], None]] = []
        self.read: dict[int, npt.NDArray[np.int32]] = {}

    def begin(self, lane: Lane) -> int:
        epoch = super().begin(lane)
        if lane is Lane.EMB and self.ledger is not None:
            self.read[epoch] = self.ledger.owned(Owner.EMB)
        return epoch

    def launch(self, work: Callable[[], None]) -> None:
        """Queues work on the KV stream."""
        self.stream.append(work)

    def end(self, lane: Lane, epoch: int) -> None:
        def finish() -> None:
            EpochClock.end(self, lane, epoch)
            if lane is Lane.EMB and self.ledger is not None:
                now = self.ledger.owner[self.read.pop(epoch)]
                assert Owner.KV not in now, "an extent went to KV while a gather could read it"

        if lane is Lane.KV:
            self.stream.append(finish)
        else:
            self.gathers.append(finish)

    def run(self, kernels: int, gather: int | None = None) -> None:
        for _ in range(min(kernels, len(self.stream))):
            self.stream.popleft()()
        if gather is not None and self.gathers:
            self.gathers.pop(gather % len(self.gathers))()

    def synchronise(self) -> None:
        self.run(len(self.stream))
        while self.gathers:
            self.run(0, 0)


class FlakyStore(RamRowStore):
    """A table whose reads fail while `broken` is set."""

    broken = False

    def read(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        if self.broken:
            raise RowStoreError("item: the disk is gone")
        super().read(ids, out)


class PoolMachine(RuleBasedStateMachine):
    """One server's calls, one step at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.look_s = 0.0
        self.device = Device()
        self.version = 0
        self.next_item = 1
        self.histories: dict[int, list[int]] = {user: [] for user in range(1, USERS + 1)}
        self.open: dict[int, tuple[KVHandle, list[int], int]] = {}
        self.told: dict[int, int] = {}
        self.pushes_s: list[float] = []

    @initialize(
        seed=st.integers(0, 1 << 16),
        alpha=st.sampled_from([0.3, 0.5, 0.6]),
        eviction=st.sampled_from(["tail", "whole"]),
        strict=st.booleans(),
        look_us=st.sampled_from([0.0, 1.0, 5.0]),
    )
    def start(self, seed: int, alpha: float, eviction: Any, strict: bool, look_us: float) -> None:
        """A look at the clock takes `look_us`: a slice's budget ends never, late or at once."""
        self.look_s = look_us * 1e-6
        generator = np.random.default_rng(seed)
        self.tables = {
            spec.name: generator.random((spec.rows, spec.width), dtype=np.float32)
            for spec in TABLES
        }
        self.store = FlakyStore(self.tables["item"].copy(), "item")
        stores = {
            spec.name: RamRowStore(self.tables[spec.name].copy(), spec.name) for spec in TABLES
        }
        self.max_lag_s = 0.0 if strict else MAX_LAG_S
        config = PoolConfig(
            pool_bytes=EXTENTS * 2 * KV.page_bytes,
            extent_bytes=2 * KV.page_bytes,
            tables=TABLES,
            kv=KV,
            alpha=alpha,
            alpha_min=0.2,
            alpha_max=0.7,
            max_batch_users=1,
            max_sequence_tokens=LONGEST,
            slice_budget_us=5.0,
            max_kv_row_lag_s=self.max_lag_s,
            kv_eviction=eviction,
            refill_bytes_per_s=1e9,
        )
        self.pool = Pool(
            config,
            stores={**stores, "item": self.store},
            background=False,
            clock_s=self.clock_s,
            spans=self.device,
        )
        self.device.ledger = self.pool.ledger
        self.pool.kv.on_event = self.hear

    def clock_s(self) -> float:
        self.now_s += self.look_s
        return self.now_s

    def hear(self, user: int, tokens: int) -> None:
        self.told[user] = tokens
        if tokens == 0:
            del self.told[user]

    # -- histories and requests ------------------------------------------------------------------

    @rule(
        user=st.integers(1, USERS),
        new=st.integers(1, 12),
        fork=st.booleans(),
        at=st.integers(0, 31),
    )
    def history_grows(self, user: int, new: int, fork: bool, at: int) -> None:
        history = self.histories[user]
        if fork:
            del history[at:]
        history.extend(range(self.next_item, self.next_item + new))
        self.next_item += new
        # At the greatest length whole blocks are dropped from the start: every position shifts.
        while len(history) > LONGEST:
            del history[: 4 * PAGE]

    @rule(user=st.integers(1, USERS), new=st.integers(1, 12))
    def serve(self, user: int, new: int) -> None:
        """A whole request whose compute stays queued."""
        self.history_grows(user, new, False, 0)
        self.acquire(user)
        if user in self.open:
            self.close(user, "commit")

    @rule(user=st.integers(1, USERS), new=st.integers(1, 12), midway=st.booleans())
    def fail(self, user: int, new: int, midway: bool) -> None:
        """A request whose compute fails, with or without having overwritten pages."""
        self.history_grows(user, new, False, 0)
        self.acquire(user)
        if user in self.open:
            self.close(user, "abort midway" if midway else "abort")

    @rule(seed=st.integers(0, 1 << 16))
    def traffic(self, seed: int) -> None:
        """A stretch of requests and lookups, hot rows more often: fills and wears both caches."""
        generator = np.random.default_rng(seed)
        for _ in range(6):
            self.serve(int(generator.integers(1, USERS + 1)), int(generator.integers(4, 20)))
            ids = torch.from_numpy(generator.zipf(1.2, 40) % 400)
            side = torch.from_numpy(generator.integers(0, 90, 20))
            self.look_up({"item": ids, "side": side})
            self.device.run(int(generator.integers(0, 8)), int(generator.integers(0, 4)))
            if generator.random() < 0.5:
                self.pool.begin_batch()
                self.pool.refiller.step()

    @rule(user=st.integers(0, USERS))
    def acquire(self, user: int) -> None:
        history = list(self.histories.get(user, [1, 2, 3, 4, 5]))
        items = np.array(history, dtype=np.int64)
        prints = page_fingerprints(items, items, None, PAGE, seed=self.version)
        epoch = len(self.pushes_s)
        handle = self.pool.kv.acquire(user, prints, len(history))
        if user in self.open:
            assert handle.status is KVStatus.BUSY
        if handle.ready:
            assert user not in self.open
            assert user != 0
            assert handle.cached_tokens <= len(history)
            assert handle.cached_tokens % PAGE == 0
            assert handle.row_lag_s <= self.max_lag_s
            self.open[user] = (handle, history, epoch)
        else:
            assert handle.cached_tokens == 0
            self.pool.kv.abort(handle)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), outcome=st.sampled_from(["commit", "commit", "abort", "abort midway"]))
    def finish(self, data: st.DataObject, outcome: str) -> None:
        self.close(data.draw(st.sampled_from(sorted(self.open))), outcome)

    def close(self, user: int, outcome: str) -> None:
        handle, history, epoch = self.open.pop(user)
        self.pool.kv.batch_indices([handle])
        pages = torch.from_numpy(handle.page_ids.astype(np.int64))
        tokens = torch.tensor(history, dtype=torch.int64)
        version = handle.model_version
        if outcome != "abort":
            self.device.launch(
                lambda: self.compute(pages, tokens, handle, version, epoch, outcome == "commit")
            )
        if outcome == "commit":
            self.pool.kv.commit(handle)
        else:
            self.pool.kv.abort(handle)

    def compute(
        self,
        pages: torch.Tensor,
        tokens: torch.Tensor,
        handle: KVHandle,
        version: int,
        epoch: int,
        whole: bool,
    ) -> None:
        """Reads the cached KV as a kernel would, and writes that of the new tokens."""
        owners = self.pool.ledger.owner[pages.numpy() // self.pool.config.pages_per_extent]
        assert Owner.EMB not in owners, "an extent went to EMB while a batch could read it"
        for layer, view in enumerate(self.pool.kv.layer_pages):
            positions = torch.arange(len(tokens))
            expected = (tokens * 31 + positions * 7 + version * 1009 + layer * 13) % 65521
            page, offset = pages[positions // PAGE], positions % PAGE
            cached = handle.cached_tokens
            keys = view[page, 0, offset, 0]
            values = view[page, 1, offset, 0]
            assert torch.equal(keys[:cached, 0], expected[:cached].float())
            assert torch.equal(values[:cached, 0], -expected[:cached].float())
            # The second element is the row epoch it was computed under: never older than stated.
            if cached:
                oldest = int(keys[:cached, 1].min())
                assert oldest >= handle.row_epoch
            new = torch.stack((expected, torch.full_like(expected, epoch)), dim=1).float()
            if not whole:
                new.fill_(-7.0)
            view[page[cached:], 0, offset[cached:], 0] = new[cached:]
            view[page[cached:], 1, offset[cached:], 0] = -new[cached:]

    # -- rows ------------------------------------------------------------------------------------

    @rule(data=st.data())
    def gather(self, data: st.DataObject) -> None:
        """Rows of a batch equal the tables', whatever is resident."""
        ids = {}
        for spec in TABLES:
            # Small ids are hot.
            wanted = data.draw(
                st.lists(
                    st.one_of(st.integers(0, spec.rows // 8), st.integers(0, spec.rows - 1)),
                    max_size=40,
                )
            )
            ids[spec.name] = torch.tensor(wanted, dtype=torch.int64)
        self.look_up(ids)

    def look_up(self, ids: dict[str, torch.Tensor]) -> None:
        widths = {spec.name: spec.width for spec in TABLES}
        out = {name: torch.full((len(part), widths[name]), torch.nan) for name, part in ids.items()}
        stats = self.pool.emb.gather(ids, out)
        assert stats.accesses == sum(len(part) for part in ids.values())
        for name, part in ids.items():
            assert torch.equal(out[name], torch.from_numpy(self.tables[name])[part])

    @rule(ids=st.lists(st.integers(0, 399), min_size=30, max_size=30))
    def gather_from_a_broken_store(self, ids: list[int]) -> None:
        """A failing table fails this batch; the next one is served as before."""
        wanted = torch.tensor(ids, dtype=torch.int64)
        out = torch.full((len(ids), 8), torch.nan)
        self.store.broken = True
        try:
            self.pool.emb.gather({"item": wanted}, {"item": out})
        except RowStoreError:
            pass
        else:
            assert torch.equal(out, torch.from_numpy(self.tables["item"])[wanted])
        finally:
            self.store.broken = False

    @rule(
        spec=st.sampled_from(TABLES),
        ids=st.sets(st.integers(0, 59), max_size=10),
        seed=st.integers(0, 99),
    )
    def push_rows(self, spec: TableSpec, ids: set[int], seed: int) -> None:
        rows = np.array(sorted(ids), dtype=np.int64)
        values = np.random.default_rng(seed).random((len(rows), spec.width), dtype=np.float32)
        self.tables[spec.name][rows] = values
        if ids:
            self.pushes_s.append(self.now_s)
        epoch = self.pool.push_rows(spec.name, torch.from_numpy(rows), torch.from_numpy(values))
        assert epoch == len(self.pushes_s)

    @rule()
    def refill(self) -> None:
        self.pool.refiller.step()

    # -- the split, versions, time ---------------------------------------------------------------

    @rule()
    def batch_boundary(self) -> None:
        self.pool.begin_batch()

    @rule(alpha=st.sampled_from([0.0, 0.2, 0.35, 0.5, 0.6, 1.0]), drop_only=st.booleans())
    def move(self, alpha: float, drop_only: bool) -> None:
        self.pool.set_target_alpha(alpha, drop_only=drop_only)
        assert 0.2 <= self.pool.target_alpha <= 0.7

    @rule(really=st.integers(0, 3))
    def new_model(self, really: int) -> None:
        if really:  # now and then is enough: it voids all KV
            return
        self.version += 1
        self.pool.set_model_version(self.version)
        assert self.told == {}

    @rule(seconds=st.floats(0.0, 40.0))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(kernels=st.integers(0, 6), gather=st.none() | st.integers(0, 5))
    def device_works(self, kernels: int, gather: int | None) -> None:
        self.device.run(kernels, gather)
        assert self.pool.emb.check_rows() == []

    # -- always ----------------------------------------------------------------------------------

    @invariant()
    def integrity(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert self.pool.check_integrity() == []
        stats = self.pool.stats()
        parts = stats.extents_free + stats.extents_kv + stats.extents_emb + stats.extents_pending
        assert parts == EXTENTS
        assert stats.alpha == stats.extents_emb / EXTENTS == self.pool.alpha
        assert sum(stats.class_extents) == stats.extents_emb
        assert stats.row_epoch == len(self.pushes_s)
        users, tokens = self.pool.kv.residents()
        assert dict(zip(users.tolist(), tokens.tolist(), strict=True)) == self.told

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for handle, _, _ in self.open.values():
            self.pool.kv.abort(handle)
        self.device.synchronise()
        for _ in range(3000):
            self.pool.begin_batch()
            self.device.synchronise()
            if not self.pool.moving:
                break
        self.pool.begin_batch()
        stats = self.pool.stats()
        assert not stats.moving, "with nothing pinned every move comes to its end"
        assert (stats.extents_pending, stats.kv_pinned_extents) == (0, 0)
        assert stats.alpha == stats.alpha_target
        assert self.pool.check_integrity() == []
        self.pool.close()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
