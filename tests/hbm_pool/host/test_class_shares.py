"""Extents are divided by marginal miss cost, within bounds, and always add up."""

from __future__ import annotations

from hbm_pool.host.class_shares import ClassDemand, growth, shrinkage, weights
from hypothesis import given, settings
from hypothesis import strategies as st

demands = st.lists(
    st.builds(
        ClassDemand,
        extents=st.integers(0, 500),
        price=st.floats(0.01, 100.0),
        ghost_hits=st.floats(0.0, 1e6),
        misses=st.floats(0.0, 1e6),
        most=st.integers(1, 600),
        least=st.just(2),
        table_bytes=st.integers(1, 10**12),
    ),
    min_size=1,
    max_size=4,
)


@given(classes=demands, count=st.integers(0, 2000))
@settings(max_examples=300, deadline=None)
def test_growth_adds_up_and_takes_from_nobody(classes: list[ClassDemand], count: int) -> None:
    given_out = growth(classes, count)
    assert sum(given_out) == count
    assert min(given_out) >= 0


@given(classes=demands, count=st.integers(0, 2500))
@settings(max_examples=300, deadline=None)
def test_shrinkage_adds_up_and_takes_what_there_is(classes: list[ClassDemand], count: int) -> None:
    taken = shrinkage(classes, count)
    held = sum(c.extents for c in classes)
    assert sum(taken) == min(count, held)
    assert all(0 <= n <= c.extents for n, c in zip(taken, classes, strict=True))
    if held - count >= sum(min(c.extents, c.least) for c in classes):
        for n, c in zip(taken, classes, strict=True):
            assert c.extents - n >= min(c.extents, c.least)


def one(**changes: float) -> ClassDemand:
    base = ClassDemand(
        extents=50,
        price=1.0,
        ghost_hits=100.0,
        misses=1000.0,
        most=1000,
        least=2,
        table_bytes=1 << 30,
    )
    return base._replace(**changes)  # type: ignore[arg-type]


def test_class_with_costlier_misses_gets_more() -> None:
    cheap, dear = growth([one(), one(price=3.0)], 100)
    assert dear > cheap
    assert cheap + dear == 100
    assert shrinkage([one(), one(price=3.0)], 40)[0] > 20


def test_class_with_more_ghost_hits_gets_more() -> None:
    few, many = growth([one(), one(ghost_hits=900.0)], 100)
    assert many > few


def test_without_counts_tables_decide() -> None:
    quiet = {"ghost_hits": 0.0, "misses": 0.0}
    assert weights([one(**quiet), one(table_bytes=3 << 30, **quiet)]) == [0.25, 0.75]


def test_class_gets_no_more_than_its_catalogue() -> None:
    assert growth([one(ghost_hits=1e6, most=60), one()], 100) == [10, 90]


def test_extents_nobody_can_use_are_held_all_the_same() -> None:
    assert sum(growth([one(most=50), one(most=50)], 30)) == 30


def test_poorest_class_is_served_first() -> None:
    assert growth([one(extents=1), one(extents=0)], 1) == [0, 1]
    assert growth([one(extents=2), one(extents=0)], 1) == [0, 1]
