"""The KV index against a plain model of it, and the rules one by one."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from hbm_pool.errors import HandleError
from hbm_pool.host.extents import ExtentLedger, Owner
from hbm_pool.host.fences import EpochClock, Lane
from hbm_pool.host.kv_handle import KVHandle, KVStatus
from hbm_pool.host.kv_index import KVIndex
from hbm_pool.host.row_lag import RowLag
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

PAGE = 4
PAGES_PER_EXTENT = 2
EXTENT_TOKENS = PAGE * PAGES_PER_EXTENT


class _Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_index(
    extents: int,
    eviction: Literal["tail", "whole"] = "tail",
    max_lag_s: float = 300.0,
    time: _Time | None = None,
) -> tuple[KVIndex, dict[int, int]]:
    """An index over a ledger of its own, and what its events say is resident."""
    index = KVIndex(
        ExtentLedger(extents),
        EpochClock(),
        page_tokens=PAGE,
        pages_per_extent=PAGES_PER_EXTENT,
        max_sequence_tokens=64,
        rows=RowLag(max_lag_s, time or _Time()),
        eviction=eviction,
    )
    told: dict[int, int] = {}

    def on_event(user: int, tokens: int) -> None:
        assert told.get(user, 0) != tokens, "an event says something new"
        told[user] = tokens
        if tokens == 0:
            del told[user]

    index.on_event = on_event
    return index, told


def fingerprints(
    history: int, tokens: int, changed_from: int | None = None
) -> npt.NDArray[np.uint32]:
    """Fingerprints of a made-up history; `changed_from` is the page at which it forks."""
    pages = np.arange(tokens // PAGE, dtype=np.uint32)
    prints = pages + np.uint32(1000 * history)
    if changed_from is not None:
        prints[changed_from:] += np.uint32(500)
    return prints


def serve(index: KVIndex, user: int, tokens: int) -> KVHandle:
    """One request from acquire to commit."""
    handle = index.acquire(user, fingerprints(user, tokens), tokens)
    assert handle is not None
    index.commit(handle)
    return handle


def violations(index: KVIndex) -> list[str]:
    return index.violations() + index.ledger.violations()


class TestReuse:
    def test_whole_pages_of_an_equal_prefix(self) -> None:
        index, told = make_index(16)
        first = serve(index, 7, 18)
        assert (first.cached_tokens, first.num_pages) == (0, 5)
        assert told == {7: 16}
        handle = index.acquire(7, fingerprints(7, 26), 26)
        assert handle is not None
        assert handle.cached_tokens == 16
        assert handle.page_ids[:4].tolist() == first.page_ids[:4].tolist()
        assert len(set(handle.page_ids.tolist())) == handle.num_pages == 7

    @pytest.mark.parametrize("fork", range(9))
    def test_stops_where_the_history_differs(self, fork: int) -> None:
        index, _ = make_index(16)
        serve(index, 7, 32)
        handle = index.acquire(7, fingerprints(7, 32, changed_from=fork), 32)
        assert handle is not None
        assert handle.cached_tokens == fork * PAGE

    def test_a_shorter_history_gives_its_tail_back(self) -> None:
        index, told = make_index(8)
        serve(index, 7, 64)
        handle = index.acquire(7, fingerprints(7, 20), 20)
        assert handle is not None
        assert handle.cached_tokens == 20
        index.commit(handle)
        assert told == {7: 20}
        assert index.evictable_extents == 8
        assert violations(index) == []

    def test_anonymous_requests_are_never_cached(self) -> None:
        index, told = make_index(8)
        handle = index.acquire(0, fingerprints(0, 20), 20)
        assert handle is not None
        assert handle.status is KVStatus.UNCACHED
        assert len(handle.page_ids) == 0
        index.commit(handle)
        assert (told, index.counters().lookups, index.ledger.num_free) == ({}, 0, 8)

    def test_less_than_a_page_is_not_kept(self) -> None:
        index, told = make_index(8)
        serve(index, 7, 3)
        assert told == {}
        assert serve(index, 7, 3).cached_tokens == 0
        assert violations(index) == []

    @pytest.mark.parametrize(
        ("tokens", "prints", "message"),
        [(65, 16, "65 tokens"), (-1, 0, "-1 tokens"), (16, 3, "3 fingerprints for 16 tokens")],
    )
    def test_refuses_a_malformed_request(self, tokens: int, prints: int, message: str) -> None:
        index, _ = make_index(8)
        with pytest.raises(ValueError, match=message):
            index.acquire(7, np.zeros(prints, dtype=np.uint32), tokens)


class TestOrderPerUser:
    def test_a_second_acquire_is_told_to_wait(self) -> None:
        index, _ = make_index(8)
        first = index.acquire(7, fingerprints(7, 16), 16)
        second = index.acquire(7, fingerprints(7, 16), 16)
        assert first is not None
        assert second is not None
        assert second.status is KVStatus.BUSY
        assert index.is_open(7)
        index.abort(second)
        index.commit(first)
        assert not index.is_open(7)
        third = index.acquire(7, fingerprints(7, 16), 16)
        assert third is not None
        assert third.cached_tokens == 16
        assert index.counters().busy == 1

    def test_a_handle_is_closed_once(self) -> None:
        index, _ = make_index(8)
        other, _ = make_index(8)
        handle = index.acquire(7, fingerprints(7, 16), 16)
        assert handle is not None
        with pytest.raises(HandleError, match="another cache"):
            other.commit(handle)
        index.commit(handle)
        for close in (index.commit, index.abort):
            with pytest.raises(HandleError, match="before"):
                close(handle)
        assert violations(index) == []

    def test_abort_keeps_what_was_cached_before(self) -> None:
        index, told = make_index(8)
        serve(index, 7, 16)
        handle = index.acquire(7, fingerprints(7, 40), 40)
        assert handle is not None
        index.abort(handle)
        assert told == {7: 16}
        assert index.cached_tokens(7) == 16
        assert serve(index, 7, 16).cached_tokens == 16

    def test_abort_of_a_new_user_leaves_nothing(self) -> None:
        index, told = make_index(8)
        handle = index.acquire(7, fingerprints(7, 40), 40)
        assert handle is not None
        index.abort(handle)
        assert told == {}
        assert index.evictable_extents + index.ledger.num_free == 8
        assert violations(index) == []


class TestEviction:
    def test_the_coldest_user_loses_its_tail_first(self) -> None:
        index, told = make_index(8)
        for user in (1, 2):
            serve(index, user, 32)
        serve(index, 1, 32)
        serve(index, 3, 16)
        assert told == {1: 32, 2: 16, 3: 16}
        # What is left of the history is still a prefix.
        assert serve(index, 2, 16).cached_tokens == 16
        assert index.counters().trimmed_users == 1

    def test_or_all_of_it(self) -> None:
        index, told = make_index(8, eviction="whole")
        for user in (1, 2):
            serve(index, user, 32)
        serve(index, 3, 16)
        assert told == {2: 32, 3: 16}
        assert index.counters().evicted_users == 1
        # The rest of the victim is kept for the next user, nobody else is evicted for it.
        serve(index, 4, 16)
        assert told == {2: 32, 3: 16, 4: 16}

    def test_takes_no_more_than_the_allocation_needs(self) -> None:
        """Freeing a count is not the same as freeing enough to allocate (SGLang #33091)."""
        index, told = make_index(8)
        for user in (1, 2, 3):
            serve(index, user, 16)
        assert index.ledger.num_free == 2
        serve(index, 4, 24)
        assert told == {1: 8, 2: 16, 3: 16, 4: 24}

    def test_evicts_nobody_for_a_request_that_cannot_fit(self) -> None:
        index, told = make_index(8)
        serve(index, 1, 16)
        pinned = index.acquire(2, fingerprints(2, 24), 24)
        assert pinned is not None
        assert index.shortfall(3, 48) == 1
        assert index.acquire(3, fingerprints(3, 48), 48) is None
        assert told == {1: 16}
        index.commit(pinned)
        assert index.acquire(3, fingerprints(3, 48), 48) is not None

    def test_pinned_users_are_skipped(self) -> None:
        index, told = make_index(8)
        serve(index, 1, 32)
        serve(index, 2, 32)
        pinned = index.acquire(1, fingerprints(1, 32), 32)
        assert pinned is not None
        before = pinned.page_ids.tolist()
        serve(index, 3, 32)
        assert told == {1: 32, 3: 32}
        index.commit(pinned)
        again = serve(index, 1, 32)
        assert again.cached_tokens == 32
        assert again.page_ids.tolist() == before

    def test_keeps_to_its_limit_while_extents_are_free(self) -> None:
        index, told = make_index(16)
        index.limit = 4
        serve(index, 1, 32)
        serve(index, 2, 16)
        assert index.ledger.count(Owner.KV) == 4
        assert told == {1: 16, 2: 16}

    def test_release_gives_spare_extents_before_users(self) -> None:
        index, told = make_index(8)
        aborted = index.acquire(1, fingerprints(1, 16), 16)
        assert aborted is not None
        index.abort(aborted)
        serve(index, 2, 8)
        assert len(index.release(1)) == 1
        assert told == {2: 8}
        pinned = index.acquire(2, fingerprints(2, 8), 8)
        assert pinned is not None
        assert len(index.release(5)) == 0


class TestVersions:
    def test_a_new_model_voids_everything(self) -> None:
        index, told = make_index(16)
        serve(index, 1, 32)
        running = index.acquire(2, fingerprints(2, 32), 32)
        assert running is not None
        index.set_model_version(1)
        assert told == {}
        assert violations(index) == []
        # What the running request computed with the old model is not published either.
        index.commit(running)
        assert told == {}
        assert serve(index, 2, 32).cached_tokens == 0
        assert serve(index, 1, 32).cached_tokens == 0
        index.set_model_version(1)
        assert serve(index, 1, 32).cached_tokens == 32

    def test_kv_may_lag_behind_pushed_rows_for_a_while(self) -> None:
        time = _Time()
        index, _ = make_index(16, max_lag_s=10.0, time=time)
        serve(index, 1, 16)
        index.rows.push()
        time.now += 9
        handle = serve(index, 1, 32)
        assert (handle.cached_tokens, handle.row_lag_s) == (16, 9.0)
        time.now += 2
        # The oldest reused page decides, also for tokens computed later.
        handle = serve(index, 1, 32)
        assert (handle.cached_tokens, handle.row_lag_s) == (0, 0.0)
        assert serve(index, 1, 32).cached_tokens == 32

    def test_rows_pushed_during_a_request_count_as_newer(self) -> None:
        index, _ = make_index(16, max_lag_s=0.0)
        handle = index.acquire(1, fingerprints(1, 16), 16)
        assert handle is not None
        index.rows.push()
        index.commit(handle)
        assert serve(index, 1, 16).cached_tokens == 0
        assert serve(index, 1, 16).cached_tokens == 16

    def test_kv_that_lags_too_much_is_given_up_without_being_asked_for(self) -> None:
        time = _Time()
        index, told = make_index(16, max_lag_s=10.0, time=time)
        serve(index, 1, 16)
        pinned = index.acquire(2, fingerprints(2, 8), 8)
        index.rows.push()
        serve(index, 3, 8)
        assert index.void_lagging() == 0
        time.now += 11
        assert index.void_lagging() == 1
        assert told == {3: 8}
        assert pinned is not None
        index.commit(pinned)
        assert serve(index, 2, 8).cached_tokens == 0
        assert index.void_lagging() == 0


class _PlainUser:
    def __init__(self) -> None:
        self.extents = 0
        self.prints: list[int] = []
        self.pages = 0


class KVIndexMachine(RuleBasedStateMachine):
    """Random requests against a model that evicts extent by extent from a plain list."""

    TOTAL = 12
    eviction: Literal["tail", "whole"] = "tail"

    def __init__(self) -> None:
        super().__init__()
        self.index, self.told = make_index(self.TOTAL, self.eviction)
        self.coldest_first: list[int] = []
        self.users: dict[int, _PlainUser] = {}
        self.open: dict[int, KVHandle] = {}
        self.forks = itertools.count(1)
        self.fork_of: dict[int, tuple[int, int]] = {}
        self.pages_of: dict[int, list[int]] = {}

    def prints(self, user: int, tokens: int) -> npt.NDArray[np.uint32]:
        at, fork = self.fork_of.get(user, (0, 0))
        prints = np.arange(tokens // PAGE, dtype=np.uint32)
        prints[at:] += np.uint32(1000 * fork)
        return prints

    @rule(user=st.integers(1, 6), page=st.integers(0, 8))
    def edit_history(self, user: int, page: int) -> None:
        self.fork_of[user] = (page, next(self.forks))

    @rule(user=st.integers(1, 6), tokens=st.integers(0, 48))
    def acquire(self, user: int, tokens: int) -> None:
        prints = self.prints(user, tokens)
        handle = self.index.acquire(user, prints, tokens)
        if user in self.open:
            assert handle is not None
            assert handle.status is KVStatus.BUSY
            self.index.abort(handle)
            return
        needed = -(-tokens // EXTENT_TOKENS)
        known = self.users.get(user)
        own = known.extents if known is not None else 0
        free = self.TOTAL - sum(u.extents for u in self.users.values())
        idle = sum(self.users[u].extents for u in self.coldest_first if u != user)
        if needed - own > free + idle:
            assert handle is None
            return
        assert handle is not None
        if known is not None:
            self.coldest_first.remove(user)
        else:
            known = self.users[user] = _PlainUser()
        known.pages = self.matching(known, prints)
        known.extents = needed
        while sum(u.extents for u in self.users.values()) > self.TOTAL:
            victim = self.users[self.coldest_first[0]]
            victim.extents = victim.extents - 1 if self.eviction == "tail" else 0
            victim.pages = min(victim.pages, victim.extents * PAGES_PER_EXTENT)
            if victim.extents == 0:
                del self.users[self.coldest_first.pop(0)]
        assert handle.status is KVStatus.READY
        assert handle.cached_tokens == known.pages * PAGE
        assert handle.num_pages == len(handle.page_ids) == -(-tokens // PAGE)
        kept = self.pages_of.get(user, [])[: known.pages]
        assert handle.page_ids[: known.pages].tolist() == kept
        self.open[user] = handle

    @staticmethod
    def matching(known: _PlainUser, prints: npt.NDArray[np.uint32]) -> int:
        same = 0
        while same < min(known.pages, len(prints)) and known.prints[same] == prints[same]:
            same += 1
        return same

    @precondition(lambda self: self.open)
    @rule(data=st.data(), publish=st.booleans())
    def close(self, data: st.DataObject, publish: bool) -> None:
        user = data.draw(st.sampled_from(sorted(self.open)))
        handle = self.open.pop(user)
        known = self.users[user]
        self.pages_of[user] = handle.page_ids.tolist()
        if publish:
            self.index.commit(handle)
            known.pages = handle.tokens // PAGE
            known.prints = handle.fingerprints.tolist()
            known.extents = known.extents if known.pages else 0
        else:
            self.index.abort(handle)
            known.pages = handle.cached_tokens // PAGE
            known.extents = -(-known.pages // PAGES_PER_EXTENT)
        if known.extents:
            self.coldest_first.append(user)
        else:
            del self.users[user]

    @rule(n=st.integers(0, 4))
    def give_up(self, n: int) -> None:
        given = self.index.release(n)
        self.index.ledger.give_back(given, None)
        assert len(given) <= n
        short = len(given) - self.spare_before
        while short > 0:
            victim = self.users[self.coldest_first[0]]
            lost = min(short, victim.extents) if self.eviction == "tail" else victim.extents
            victim.extents -= lost
            victim.pages = min(victim.pages, victim.extents * PAGES_PER_EXTENT)
            short -= lost
            if victim.extents == 0:
                del self.users[self.coldest_first.pop(0)]

    @invariant()
    def books_balance(self) -> None:
        assert violations(self.index) == []
        self.spare_before = self.index.counters().spare_extents

    @invariant()
    def events_tell_what_is_resident(self) -> None:
        settled = {u: p.pages * PAGE for u, p in self.users.items() if u not in self.open}
        told = {u: t for u, t in self.told.items() if u not in self.open}
        assert told == {u: t for u, t in settled.items() if t}
        users, tokens = self.index.residents()
        assert dict(zip(users.tolist(), tokens.tolist(), strict=True)) == self.told

    def teardown(self) -> None:
        for handle in self.open.values():
            self.index.abort(handle)
        assert violations(self.index) == []
        assert self.index.clock.open_spans(Lane.KV) == 0


class WholeUsersMachine(KVIndexMachine):
    eviction = "whole"


_SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTailEviction = KVIndexMachine.TestCase
TestTailEviction.settings = _SETTINGS
TestWholeEviction = WholeUsersMachine.TestCase
TestWholeEviction.settings = _SETTINGS
