"""Moves of the split between the KV index and a row cache, torch-free."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hbm_pool.host.extents import ExtentLedger, Extents, Owner
from hbm_pool.host.fences import EpochClock, Lane
from hbm_pool.host.kv_handle import KVHandle
from hbm_pool.host.kv_index import KVIndex
from hbm_pool.host.replacement import TzCache
from hbm_pool.host.row_lag import RowLag
from hbm_pool.host.split import GROWTH_SLICE_EXTENTS, RAMP_PAUSE_S, Split

PAGE = 4
ROWS = 8
SLOTS_PER_SLICE = 16


class OneClass:
    """The row cache of one width class as the split sees it."""

    def __init__(self, max_extents: int) -> None:
        self.rows = TzCache(num_keys=100_000, rows_per_extent=ROWS, max_extents=max_extents)
        self.dropped = 0

    @property
    def num_extents(self) -> int:
        return self.rows.num_extents + self.rows.draining_extents

    @property
    def draining_extents(self) -> int:
        return self.rows.draining_extents

    def grow(self, extents: Extents) -> None:
        self.rows.grow(extents)

    def plan_shrink(self, n: int) -> int:
        return self.rows.plan_shrink(n)

    def cancel_shrink(self) -> int:
        return self.rows.cancel_shrink()

    def shrink_step(self, budget_us: float) -> Extents:
        assert budget_us > 0
        return self.rows.shrink_slice(SLOTS_PER_SLICE).released

    def drop(self, n: int) -> Extents:
        self.dropped += n
        return self.rows.drop(n)


class Node:
    """Both sides over one ledger, one page per extent."""

    def __init__(self, extents: int = 40, emb: int = 20, low: int = 4, high: int = 32) -> None:
        self.ledger = ExtentLedger(extents)
        self.clock = EpochClock()
        self.kv = KVIndex(
            self.ledger,
            self.clock,
            page_tokens=PAGE,
            pages_per_extent=1,
            max_sequence_tokens=extents * PAGE,
            rows=RowLag(300.0, lambda: 0.0),
        )
        self.emb = OneClass(extents)
        self.now_s = 0.0
        self.split = Split(
            self.ledger,
            self.kv,
            self.emb,
            self.clock,
            emb_extents=emb,
            min_emb_extents=low,
            max_emb_extents=high,
            slice_budget_us=100.0,
            lock=threading.Lock(),
            clock_s=lambda: self.now_s,
        )

    def acquire(self, user: int, pages: int) -> KVHandle | None:
        """As the KV cache does it: on a shortfall the split is asked for room."""
        prints = np.arange(pages, dtype=np.uint32) + np.uint32(1000 * user)
        handle = self.kv.acquire(user, prints, pages * PAGE)
        if handle is None and self.split.reclaim(user, pages * PAGE):
            handle = self.kv.acquire(user, prints, pages * PAGE)
        return handle

    def serve(self, user: int, pages: int) -> KVHandle:
        handle = self.acquire(user, pages)
        assert handle is not None
        self.kv.commit(handle)
        return handle

    def counts(self) -> tuple[int, int, int, int]:
        """FREE, KV, EMB, PENDING."""
        free, kv, emb, pending = (self.ledger.count(owner) for owner in Owner)
        return free, kv, emb, pending

    def settle(self) -> int:
        """Steps until the move is done; returns how many that took."""
        for step in range(1, 1000):
            self.split.step()
            if not self.split.moving:
                return step
        raise AssertionError(f"still moving: {self.split.counters()}")

    def check(self) -> None:
        assert self.ledger.violations() + self.kv.violations() == []
        assert self.emb.rows.check_integrity() == []
        assert self.emb.num_extents == self.ledger.count(Owner.EMB)


def test_starts_at_its_split() -> None:
    node = Node()
    assert node.counts() == (20, 0, 20, 0)
    assert node.split.alpha == 0.5
    assert not node.split.moving
    node.check()


@pytest.mark.parametrize("drop_only", [False, True])
@pytest.mark.parametrize(("alpha", "emb"), [(0.25, 10), (0.75, 30), (0.0, 4), (1.0, 32)])
def test_moves_to_the_target_within_bounds_on_a_full_pool(
    alpha: float, emb: int, drop_only: bool
) -> None:
    node = Node()
    node.emb.rows.access_many(np.arange(20 * ROWS, dtype=np.uint32))
    for user in range(1, 11):
        node.serve(user, 2)
    assert node.counts() == (0, 20, 20, 0)
    node.split.set_target(alpha, drop_only=drop_only)
    assert node.split.moving
    assert node.split.alpha == 0.5, "nothing moves before the next batch boundary"
    steps = node.settle()
    assert node.ledger.count(Owner.EMB) == emb
    assert node.split.alpha == emb / 40
    assert node.split.counters().moves == 1
    assert node.split.counters().moved_extents == abs(emb - 20)
    assert node.kv.limit == 40 - emb
    assert (steps == 1) or not drop_only
    node.check()


def test_a_planned_shrink_keeps_referenced_rows() -> None:
    node = Node()
    hot = np.arange(10 * ROWS, dtype=np.uint32)
    node.emb.rows.access_many(np.arange(5000, 5000 + 10 * ROWS, dtype=np.uint32))
    node.emb.rows.access_many(hot)
    node.emb.rows.access_many(hot)
    node.split.set_target(0.4)
    assert node.settle() > 1
    assert node.emb.rows.counters().relocations > 0
    hits, _ = node.emb.rows.access_many(hot)
    assert hits.mean() > 0.9


def test_an_idle_server_goes_on_until_the_move_is_done() -> None:
    node = Node()
    node.emb.rows.access_many(np.arange(20 * ROWS, dtype=np.uint32))
    node.split.step()
    assert not node.split.has_slices, "nothing was asked for"
    node.split.set_target(0.25)
    slices = 0
    while node.split.has_slices:
        node.split.step()
        slices += 1
    assert slices > 5
    assert not node.split.moving
    assert node.split.alpha == 0.25
    node.check()


def test_an_idle_server_does_not_spin_for_pinned_users() -> None:
    node = Node()
    pinned = node.acquire(1, 20)
    assert pinned is not None
    node.split.set_target(0.75)
    slices = 0
    while node.split.has_slices:
        node.split.step()
        slices += 1
    assert slices < 5
    assert node.split.moving
    node.kv.commit(pinned)
    node.settle()
    assert node.split.alpha == 0.75


def test_a_move_pauses_for_pinned_users_and_never_blocks() -> None:
    node = Node()
    pinned = node.acquire(1, 16)
    assert pinned is not None
    node.serve(2, 4)
    node.split.set_target(0.75)
    for _ in range(5):
        node.split.step()
    assert node.split.moving
    assert node.counts()[1] == 16
    # KV asks for its own meanwhile, and gets it from the side that holds the bytes.
    node.serve(3, 8)
    node.kv.commit(pinned)
    node.settle()
    assert node.ledger.count(Owner.EMB) == 30
    node.check()


def test_extents_in_flight_are_not_handed_over() -> None:
    """No page is reused while a forward pass may still read it (SGLang #39982)."""
    node = Node()
    for user in range(1, 6):
        node.serve(user, 4)
    running = node.clock.begin(Lane.KV)
    node.split.set_target(0.75, drop_only=True)
    for _ in range(3):
        node.split.step()
    assert node.counts() == (0, 10, 20, 10)
    assert node.split.moving
    node.clock.end(Lane.KV, running)
    node.settle()
    assert node.counts() == (0, 10, 30, 0)
    gathering = node.clock.begin(Lane.EMB)
    node.split.set_target(0.5, drop_only=True)
    node.split.step()
    assert node.counts() == (0, 10, 20, 10)
    assert node.split.alpha == 0.5
    node.clock.end(Lane.EMB, gathering)
    node.split.step()
    assert node.counts() == (10, 10, 20, 0)
    node.check()


def test_the_side_that_holds_the_bytes_is_asked() -> None:
    """KV starved at its own limit with all of it pinned, EMB full (SGLang #34441, #36713)."""
    node = Node()
    first = node.acquire(1, 10)
    second = node.acquire(2, 10)
    assert node.counts() == (0, 20, 20, 0)
    third = node.acquire(3, 6)
    assert first is not None
    assert second is not None
    assert third is not None
    assert node.counts() == (0, 26, 14, 0)
    assert node.split.counters().reclaimed_extents == 6
    node.check()
    # Once the pins are gone, the split goes back to where the target says.
    for handle in (first, second, third):
        node.kv.commit(handle)
    node.settle()
    assert node.counts()[2] == 20
    node.check()


def test_emb_is_not_robbed_below_its_bound_and_not_for_nothing() -> None:
    node = Node()
    pinned = node.acquire(1, 20)
    assert pinned is not None
    assert node.acquire(2, 17) is None
    assert node.counts() == (0, 20, 20, 0)
    assert node.emb.dropped == 0
    assert node.acquire(2, 16) is not None
    assert node.counts() == (0, 36, 4, 0)


def test_bytes_promised_to_emb_go_first() -> None:
    node = Node()
    gathering = node.clock.begin(Lane.EMB)
    node.split.set_target(0.25, drop_only=True)
    node.split.step()
    node.split.set_target(0.5)
    node.clock.end(Lane.EMB, gathering)
    pinned = node.acquire(1, 20)
    assert pinned is not None
    node.split.step()
    node.split.set_target(0.25, drop_only=True)
    node.split.step()
    assert node.counts() == (10, 20, 10, 0)
    node.split.set_target(0.5)
    dropped = node.emb.dropped
    assert node.acquire(2, 10) is not None
    assert node.emb.dropped == dropped, "free bytes were there"
    assert node.counts() == (0, 30, 10, 0)


def test_the_joint_predicate_counts_each_byte_once() -> None:
    """FULL 4 + SWA 4 but joint 3 (SGLang #39294, #36729, #39477): one number for both sides."""
    node = Node(extents=40, emb=20, low=18, high=32)
    pinned = node.acquire(1, 17)
    assert pinned is not None
    can = node.split.can_reserve
    assert node.counts() == (3, 17, 20, 0)
    assert can(3, 0)
    assert can(0, 3)
    assert not can(3, 3)
    assert can(1, 2)
    assert not can(2, 2)
    # What EMB could give up counts for KV alone, down to EMB's lower bound.
    assert can(5, 0)
    assert not can(6, 0)
    assert not can(0, 4)
    node.kv.commit(pinned)
    assert can(10, 10)
    assert not can(10, 11)
    assert not can(0, 13), "alpha_max"
    with pytest.raises(ValueError, match="-1"):
        can(-1, 0)


def test_what_the_predicate_promises_can_be_had() -> None:
    node = Node(extents=40, emb=20, low=10, high=32)
    pinned = node.acquire(1, 15)
    assert pinned is not None
    most = max(n for n in range(60) if node.split.can_reserve(n, 0))
    assert node.acquire(2, most) is not None
    assert node.acquire(3, 1) is None
    assert not node.split.can_reserve(1, 0)


def test_a_move_is_gated_while_another_thread_moves() -> None:
    node = Node()
    node.split.set_target(0.75)
    with node.split.moving_lock:
        node.split.step()
    assert node.split.alpha == 0.5
    node.settle()
    assert node.split.alpha == 0.75


def test_a_new_target_replaces_one_under_way() -> None:
    node = Node()
    node.emb.rows.access_many(np.arange(20 * ROWS, dtype=np.uint32))
    node.split.set_target(0.1)
    node.split.step()
    assert node.split.moving
    node.split.set_target(0.6)
    assert node.split.target_emb_extents == 24
    node.settle()
    assert node.split.alpha == 0.6
    assert node.emb.draining_extents == 0
    node.split.set_target(0.6)
    node.split.step()
    assert node.split.counters().moves == 1
    node.check()


def test_a_ramp_is_one_move() -> None:
    """A controller that goes to 0.8 sets one target per tick."""
    node = Node(extents=40, emb=20, low=4, high=36)
    moves = [0]

    def go(*alphas: float, every_s: float = 0.25) -> None:
        for alpha in alphas:
            node.split.set_target(alpha)
            node.settle()
            node.now_s += every_s
        moves.append(node.split.counters().moves)

    go(0.55, 0.6, 0.65, 0.7)
    go(0.65, 0.6)  # another direction
    go(0.6, 0.6)  # no change
    node.now_s += 2 * RAMP_PAUSE_S
    go(0.55, 0.5)  # the same direction after a rest
    node.now_s += 2 * RAMP_PAUSE_S
    go(0.4, 0.3, every_s=2 * RAMP_PAUSE_S)
    assert moves == [0, 1, 2, 2, 3, 5]


def test_extents_lent_to_pinned_users_are_no_move() -> None:
    node = Node()
    pinned = node.acquire(1, 26)
    assert pinned is not None
    assert node.split.alpha < 0.5
    node.kv.commit(pinned)
    node.settle()
    assert node.split.alpha == 0.5
    assert node.split.counters().moves == 0


def test_growth_is_sliced() -> None:
    total = 4 * GROWTH_SLICE_EXTENTS
    node = Node(extents=total, emb=10, low=4, high=total - 4)
    node.serve(1, total - 10)
    node.split.set_target(1.0)
    node.split.step()
    assert node.ledger.count(Owner.EMB) == 10 + GROWTH_SLICE_EXTENTS
    assert node.settle() == 3


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -0.1, 1.1])
def test_refuses_a_target_that_is_no_share(alpha: float) -> None:
    node = Node()
    with pytest.raises(ValueError, match="from 0 to 1"):
        node.split.set_target(alpha)
    assert not node.split.moving
