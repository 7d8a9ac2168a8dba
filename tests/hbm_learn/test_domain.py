"""What episodes are drawn from."""

from __future__ import annotations

import pytest
from hbm_learn.domain import TRAINING_SEEDS, VALIDATION_SEEDS, Domain, draw
from pydantic import ValidationError


def test_equal_seeds_draw_the_same_and_others_do_not() -> None:
    assert draw(Domain(), 1003) == draw(Domain(), 1003)
    assert draw(Domain(), 1003) != draw(Domain(), 1004)


def test_what_is_drawn_lies_within_the_ranges() -> None:
    domain = Domain()
    seen_walks, seen_gathers, wrong_prices = set(), set(), 0
    for seed in TRAINING_SEEDS[:200]:
        drawn = draw(domain, seed)
        node = drawn.workload.node
        assert domain.pool_bytes[0] - 2**21 <= node.pool_bytes <= domain.pool_bytes[1] + 2**21
        assert domain.rows[0] - 1 <= drawn.workload.rows <= domain.rows[1] + 1
        assert domain.gather_bytes_per_s[0] <= node.gather_bytes_per_s
        assert node.gather_bytes_per_s <= domain.gather_bytes_per_s[1]
        assert all(domain.load[0] <= load <= domain.load[1] for load in drawn.loads)
        assert domain.delay_ticks[0] <= drawn.delay_ticks <= domain.delay_ticks[1]
        assert domain.cost_error[0] <= drawn.cost_error <= domain.cost_error[1]
        assert sum(phase.requests for phase in drawn.phases) == domain.requests + domain.warm_up
        seen_walks.add(len(drawn.workload.regimes))
        seen_gathers.add(node.gather)
        wrong_prices += drawn.cost_error != 1.0
    assert seen_walks == {1, 2, 3}
    assert seen_gathers == {"serial", "overlap"}
    assert 40 < wrong_prices < 100


def test_no_seed_trains_and_validates_or_is_a_seed_of_the_test() -> None:
    assert not set(TRAINING_SEEDS) & set(VALIDATION_SEEDS)
    assert not set(range(1, 21)) & (set(TRAINING_SEEDS) | set(VALIDATION_SEEDS))


def test_a_range_that_is_none_is_named() -> None:
    with pytest.raises(ValidationError, match=r"0\.9 to 0\.4 is no range"):
        Domain(load=(0.9, 0.4))
