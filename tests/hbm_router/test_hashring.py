"""The ring moves few users, and bounded loads hold whatever comes."""

from __future__ import annotations

import math

import pytest
from hbm_router.hashring import HashRing
from hypothesis import given, settings
from hypothesis import strategies as st

USERS = [user * 0x9E3779B97F4A7C15 - (1 << 63) for user in range(4000)]


def names(count: int) -> list[str]:
    return [f"node-{index}" for index in range(count)]


@pytest.mark.parametrize("count", [2, 5, 16])
def test_one_node_more_moves_its_share_only(count: int) -> None:
    before, after = HashRing(names(count)), HashRing(names(count + 1))
    moved = [user for user in USERS if before.home(user) != after.home(user)]
    assert all(after.home(user) == count for user in moved), "users move to the new node only"
    assert len(moved) / len(USERS) == pytest.approx(1 / (count + 1), rel=0.35)


def test_one_node_less_moves_its_users_only() -> None:
    all_names = names(6)
    before = HashRing(all_names)
    after = HashRing(all_names[:3] + all_names[4:])
    for user in USERS:
        home = before.home(user)
        if home != 3:
            assert after.home(user) == home - (home > 3)


def test_order_of_names_does_not_matter() -> None:
    forward, backward = HashRing(names(7)), HashRing(names(7)[::-1])
    assert all(forward.home(user) == 6 - backward.home(user) for user in USERS)


def test_shares_are_even() -> None:
    ring = HashRing(names(8))
    counts = [0] * 8
    for user in USERS:
        counts[ring.home(user)] += 1
    assert max(counts) < 1.5 * len(USERS) / 8


@given(user=st.integers(-(2**63), 2**63 - 1), count=st.integers(1, 9))
def test_a_walk_visits_every_node_once_from_its_home_on(user: int, count: int) -> None:
    ring = HashRing(names(count), points_per_node=20)
    walk = list(ring.walk(user))
    assert sorted(walk) == list(range(count))
    assert walk[0] == ring.home(user)


@settings(max_examples=60)
@given(
    users=st.lists(st.integers(0, 30), min_size=1, max_size=150),
    count=st.integers(1, 7),
    bound=st.floats(1.01, 2.0),
    ends=st.lists(st.integers(0, 10**6), max_size=100),
    dead=st.sets(st.integers(0, 6), max_size=3),
)
def test_no_node_exceeds_the_bound(
    users: list[int], count: int, bound: float, ends: list[int], dead: set[int]
) -> None:
    """Skewed users, requests that end in any order, nodes that are not usable."""
    ring = HashRing(names(count), points_per_node=20)
    loads = [0] * count
    usable = {index for index in range(count) if index not in dead}
    in_flight: list[int] = []
    for turn, user in enumerate(users):
        placement = ring.place(user, loads, usable.__contains__, bound)
        if placement is None:
            assert not usable
            return
        assert placement.node in usable
        loads[placement.node] += 1
        in_flight.append(placement.node)
        total = sum(loads[index] for index in usable)
        assert loads[placement.node] <= math.ceil(bound * total / len(usable))
        first = next(index for index in ring.walk(user) if index in usable)
        if not placement.spilled:
            assert placement.node == ring.home(user) == first
        if turn < len(ends) and ends[turn] % 2 and in_flight:
            loads[in_flight.pop(ends[turn] % len(in_flight))] -= 1


def test_an_empty_ring_places_nobody() -> None:
    assert HashRing([]).place(1, [], lambda _: True) is None
    assert list(HashRing([]).walk(1)) == []
