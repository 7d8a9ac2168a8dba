"""The ledger's books balance whatever is taken, given back and delayed."""

import numpy as np
import pytest
from hbm_pool.errors import ExtentError
from hbm_pool.host.extents import ExtentLedger, Owner
from hbm_pool.host.fences import EpochClock, Lane
from hypothesis import given, settings
from hypothesis import strategies as st


def test_hands_out_each_extent_once_lowest_first() -> None:
    ledger = ExtentLedger(8)
    first = ledger.take(Owner.KV, 3)
    second = ledger.take(Owner.EMB, 5)
    assert sorted(first.tolist()) == [0, 1, 2]
    assert sorted(first.tolist() + second.tolist()) == list(range(8))
    assert (ledger.count(Owner.KV), ledger.count(Owner.EMB), ledger.num_free) == (3, 5, 0)
    assert ledger.violations() == []


def test_a_new_owner_voids_what_pointed_into_the_extent() -> None:
    ledger = ExtentLedger(4)
    taken = ledger.take(Owner.KV, 2)
    before = ledger.generation[taken].copy()
    ledger.give_back(taken, None)
    again = ledger.take(Owner.EMB, 2)
    assert sorted(again.tolist()) == sorted(taken.tolist())
    assert (ledger.generation[taken] > before).all()


def test_pending_until_the_fence_is_done() -> None:
    clock = EpochClock()
    ledger = ExtentLedger(4)
    taken = ledger.take(Owner.EMB, 4)
    span = clock.begin(Lane.EMB)
    ledger.give_back(taken[:3], clock.fence(Lane.EMB))
    later = clock.begin(Lane.EMB)
    assert (ledger.num_pending, ledger.num_free, ledger.reap()) == (3, 0, 0)
    clock.end(Lane.EMB, span)
    # A span that began after the extents were given up does not hold them.
    assert (ledger.reap(), ledger.num_free) == (3, 3)
    clock.end(Lane.EMB, later)
    assert ledger.violations() == []


def test_fences_of_one_lane_do_not_wait_for_the_other() -> None:
    clock = EpochClock()
    clock.begin(Lane.KV)
    assert clock.fence(Lane.EMB).done()
    assert not clock.fence(Lane.KV).done()


@pytest.mark.parametrize(
    ("extents", "message"),
    [
        ([-1], "extent -1"),
        ([0, -1], "extent -1"),
        ([4], "extent 4"),
        ([0, 0], "twice"),
        ([3], "FREE"),
        ([0, 2], "EMB, KV"),
    ],
)
def test_refuses_what_is_not_owned_and_changes_nothing(extents: list[int], message: str) -> None:
    """A sentinel such as -1 must not join the free list and be handed out later (SGLang #38836)."""
    ledger = ExtentLedger(4)
    assert ledger.take(Owner.KV, 2).tolist() == [1, 0]
    assert ledger.take(Owner.EMB, 1).tolist() == [2]
    with pytest.raises(ExtentError, match=message):
        ledger.give_back(np.array(extents, dtype=np.int32), None)
    assert [ledger.count(owner) for owner in Owner] == [1, 2, 1, 0]
    assert ledger.generation.tolist() == [0, 0, 0, 0]
    with pytest.raises(ExtentError):
        ledger.hand_over(np.array(extents, dtype=np.int32), Owner.EMB)
    assert ledger.generation.tolist() == [0, 0, 0, 0]
    assert ledger.violations() == []
    handed_out = ledger.take(Owner.KV, 1)
    assert handed_out.tolist() == [3]


def test_hands_over_in_one_step() -> None:
    ledger = ExtentLedger(6)
    taken = ledger.take(Owner.KV, 4)
    ledger.hand_over(taken[:3], Owner.EMB)
    assert [ledger.count(owner) for owner in Owner] == [2, 1, 3, 0]
    assert (ledger.generation[taken[:3]] > 0).all()
    with pytest.raises(ExtentError, match="EMB were given back"):
        ledger.hand_over(taken[:3], Owner.EMB)
    with pytest.raises(ExtentError, match="FREE"):
        ledger.hand_over(taken[:3], Owner.FREE)
    assert ledger.violations() == []


def test_refuses_to_hand_out_what_is_not_there() -> None:
    ledger = ExtentLedger(2)
    with pytest.raises(ExtentError, match="3 extents were asked for and 2 are free"):
        ledger.take(Owner.KV, 3)
    with pytest.raises(ExtentError, match="PENDING"):
        ledger.take(Owner.PENDING, 1)
    with pytest.raises(ValueError, match="at least one"):
        ExtentLedger(0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_interleaving_balances(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 40), "extents")
    clock = EpochClock()
    ledger = ExtentLedger(total)
    held: dict[Owner, list[int]] = {Owner.KV: [], Owner.EMB: []}
    spans: list[int] = []
    for _ in range(data.draw(st.integers(1, 30), "steps")):
        owner = data.draw(st.sampled_from([Owner.KV, Owner.EMB]))
        action = data.draw(st.sampled_from(["take", "give", "begin", "end", "reap"]))
        if action == "take":
            n = data.draw(st.integers(0, ledger.num_free))
            taken = ledger.take(owner, n).tolist()
            assert not set(taken) & {*held[Owner.KV], *held[Owner.EMB]}
            held[owner] += taken
        elif action == "give":
            n = data.draw(st.integers(0, len(held[owner])))
            given_up, held[owner] = held[owner][:n], held[owner][n:]
            ledger.give_back(np.array(given_up, dtype=np.int32), clock.fence(Lane.KV))
        elif action == "begin":
            spans.append(clock.begin(Lane.KV))
        elif action == "end" and spans:
            at = data.draw(st.integers(0, len(spans) - 1))
            clock.end(Lane.KV, spans.pop(at))
        elif action == "reap":
            ledger.reap()
        assert ledger.violations() == []
        for side, extents in held.items():
            assert sorted(extents) == ledger.owned(side).tolist()
    for span in spans:
        clock.end(Lane.KV, span)
    ledger.reap()
    assert ledger.num_pending == 0
