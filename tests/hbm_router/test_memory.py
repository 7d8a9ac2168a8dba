"""What the router remembers stays bounded, and the line through sizes and lengths is found."""

from __future__ import annotations

import random

from hbm_router.memory import LengthRegression, Remembered, SpeculativeResidency, UserMemory
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=200), st.integers(0, 8))
def test_memory_keeps_the_last_used(steps: list[tuple[int, bool]], capacity: int) -> None:
    memory = UserMemory(capacity)
    order: list[int] = []
    for user, write in steps:
        if write:
            memory.put(user, Remembered(user, 0, ()))
            order = [*[u for u in order if u != user], user][-capacity:] if capacity else []
        else:
            assert (memory.get(user) is not None) == (user in order)
            if user in order:
                order = [*[u for u in order if u != user], user]
        assert len(memory) == len(order)
    assert all(memory.get(user) == Remembered(user, 0, ()) for user in list(order))


def test_regression_finds_the_line() -> None:
    rng = random.Random(3)
    line = LengthRegression()
    for _ in range(500):
        tokens = rng.randrange(100, 4000)
        line.observe(2000 + 24 * tokens + rng.randrange(-50, 50), tokens, 100)
    for tokens in (200, 1000, 3900):
        assert abs(line.tokens(2000 + 24 * tokens) - tokens) < 10
    assert line.mean_candidates() == 100
    assert line.tokens(0) == 0
    assert line.tokens(10**9) < 4000, "no longer than anything seen"


def test_regression_follows_a_new_format() -> None:
    line = LengthRegression()
    for per_token in (24, 8):
        for tokens in list(range(100, 2000, 2)):
            line.observe(per_token * tokens, tokens, 0)
    assert abs(line.tokens(8 * 1500) - 1500) < 100


@given(
    st.lists(
        st.tuples(st.integers(0, 1 << 28), st.integers(0, 10**7), st.integers(0, 10**7)),
        max_size=30,
    ),
    st.integers(0, 1 << 40),
)
def test_regression_never_leaves_what_it_saw(seen: list[tuple[int, int, int]], size: int) -> None:
    line = LengthRegression()
    for content_length, tokens, candidates in seen:
        line.observe(content_length, tokens, candidates)
    assert 0 <= line.tokens(size) <= max((tokens for _, tokens, _ in seen), default=0)
    assert line.ready == bool(seen)


def test_speculation_expires_and_is_bounded() -> None:
    lately = SpeculativeResidency(ttl_s=3, capacity=100)
    lately.put(1, "a", 10, now_s=0.0)
    assert lately.get(1, 2.9) is not None
    assert lately.get(1, 3.0) is None
    for user in range(1000):
        lately.put(user, "a", 10, now_s=1.0)
        assert len(lately) <= 100
    lately.drop(999, "b")
    assert lately.get(999, 1.0) is not None, "another node's entry stays"
    lately.drop(999, "a")
    assert lately.get(999, 1.0) is None
    for user in range(1000, 1100):
        lately.put(user, "a", 10, now_s=100.0)
    assert len(lately) <= 100
    off = SpeculativeResidency(ttl_s=0)
    off.put(1, "a", 10, now_s=0.0)
    assert off.get(1, 0.0) is None
