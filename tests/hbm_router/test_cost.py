"""The cost in ms: what raises it, what lowers it, and what happens without a signal."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hbm_pool.contracts.identity import digest_key
from hbm_router.choice import Choice, Facts
from hbm_router.choose import Chooser
from hbm_router.config import Policy, RouterSettings
from hbm_router.cost import CostTable, Trust, computed_ms, saved_ms
from hbm_router.discovery import Backend
from hbm_router.fleet import Fleet, Node
from hbm_router.memory import SpeculativeResidency
from hbm_router.outlier import OutlierDetector
from hbm_router.snapshot import NodeView, Residency, Snapshot
from hypothesis import given
from hypothesis import strategies as st

from tests.hbm_router.published import node_state

TRUST = Trust(fresh_s=2, half_life_s=5, expire_s=30)


def residency(users: dict[int, int], shard_rows: tuple[int, ...] = ()) -> Residency:
    pairs = sorted((digest_key(user), tokens) for user, tokens in users.items())
    return Residency(
        keys=np.array([key for key, _ in pairs], dtype=np.int64),
        tokens=np.array([tokens for _, tokens in pairs], dtype=np.uint32),
        shard_rows=np.array(shard_rows, dtype=np.uint32),
        blob_bytes=100,
        boot_epoch=7,
        sequence=1,
        crc=1,
    )


@dataclasses.dataclass
class Bench:
    """A chooser with a clock of its own and nodes that say what a test wants."""

    chooser: Chooser
    fleet: Fleet
    outlier: OutlierDetector
    speculation: SpeculativeResidency
    now_s: list[float]
    views: dict[str, NodeView]

    def say(
        self, name: str, users: dict[int, int] | None = None, *, age_s: float = 0.0, **state: Any
    ) -> None:
        heard_s = self.now_s[0] - age_s
        shards = state.pop("shard_rows", ())
        self.views[name] = NodeView(
            node_state(name, **state), heard_s, residency(users or {}, shards), heard_s
        )
        self.chooser.use(CostTable(Snapshot(self.fleet.names, self.views), TRUST))

    def choose(self, user: int | None = None, exclude: Node | None = None, **facts: Any) -> Choice:
        choice = self.refused(user, exclude, **facts)
        assert isinstance(choice, Choice), choice
        return choice

    def refused(self, user: int | None = None, exclude: Node | None = None, **facts: Any) -> Any:
        given = {"history_tokens": 1000, "candidates": 100, "source": "header", **facts}
        return self.chooser.choose(Facts(user, **given), exclude)

    def cost(self, name: str, user: int | None = None, **facts: Any) -> float:
        given = {"history_tokens": 1000, "candidates": 100, "source": "header", **facts}
        lines = {line.name: line for line in self.chooser.explain(Facts(user, **given))}
        cost_ms = lines[name].cost_ms
        assert cost_ms is not None
        return cost_ms


@pytest.fixture
def bench() -> Callable[..., Bench]:
    return make_bench


def make_bench(*names: str, seed: int = 1, **settings: Any) -> Bench:
    now_s = [1000.0]
    config = RouterSettings(backends="x=http://h:1", **settings)
    fleet = Fleet()
    fleet.update([Backend(name, "h", 1) for name in names])
    outlier = OutlierDetector(fleet, config, lambda: now_s[0])
    speculation = SpeculativeResidency(config.speculative_ttl_s)
    chooser = Chooser(config, fleet, outlier, speculation, lambda: now_s[0], random.Random(seed))
    return Bench(chooser, fleet, outlier, speculation, now_s, {})


def test_the_cost_of_a_miss_is_the_formula_of_the_contract(bench) -> None:
    b = bench("a")
    b.say("a", queue_ms=3.0)
    expected = 1.0 + (0.01 + 0.001 * 1.0 * 0.2) * 1100 + 1e-6 * (1000**2 / 2 + 1000 * 100) + 3.0
    assert b.cost("a") == pytest.approx(expected)
    assert b.choose().est_ms == pytest.approx(expected)


def test_a_hit_saves_its_tokens_and_their_rows(bench) -> None:
    b = bench("a")
    b.say("a", {5: 800})
    saved = b.cost("a", 6) - b.cost("a", 5)
    assert saved == pytest.approx(0.98 * ((0.01 + 0.0002) * 800 + 1e-6 * 800**2 / 2))


tokens = st.integers(0, 20_000)


@given(tokens, tokens, tokens, tokens)
def test_longer_histories_and_more_candidates_cost_more(l1, l2, c1, c2) -> None:
    assert computed_ms(0.01, 1e-6, l1 + l2, c1) >= computed_ms(0.01, 1e-6, l1, c1)
    assert computed_ms(0.01, 1e-6, l1, c1 + c2) >= computed_ms(0.01, 1e-6, l1, c1)


@given(length=tokens, cached=tokens, token=st.floats(0, 1), context=st.floats(0, 1e-4))
def test_reuse_never_saves_more_than_everything(length, cached, token, context) -> None:
    saved = saved_ms(token, context, min(cached, length))
    assert 0 <= saved <= computed_ms(token, context, length, 0) * (1 + 1e-9)


@given(
    queue=st.floats(0, 1000),
    more=st.floats(0.001, 1000),
    cached=st.integers(0, 5000),
    further=st.integers(1, 5000),
    age=st.floats(0, 60),
    older=st.floats(0, 60),
    miss=st.floats(0, 0.5),
)
def test_cost_is_monotonic_in_every_signal(queue, more, cached, further, age, older, miss) -> None:
    def cost(queue_ms=queue, user_tokens=cached, age_s=age, emb_miss_ratio=miss) -> float:
        b = make_bench("a", "fresh")
        b.say("fresh", queue_ms=0.0)
        b.say("a", {5: user_tokens}, age_s=age_s, queue_ms=queue_ms, emb_miss_ratio=emb_miss_ratio)
        return b.cost("a", 5, history_tokens=4000)

    base = cost()
    slack = 1e-9 * (1 + abs(base))
    assert cost(queue_ms=queue + more) >= base - slack
    assert cost(user_tokens=cached + further) <= base + slack
    assert cost(emb_miss_ratio=miss + 0.5) >= base - slack
    if queue == 0:
        assert cost(age_s=age + older) >= base - slack, "distrust in residency only costs"


@given(st.lists(st.floats(0, 100), min_size=2, max_size=20))
def test_trust_falls_from_one_to_nothing(ages: list[float]) -> None:
    trust = TRUST.at(np.array(sorted(ages)))
    assert np.all(np.diff(trust) <= 1e-12)
    assert np.all((trust >= 0) & (trust <= 1))
    exact = TRUST.at(np.array([0.0, 2.0, 7.0, 12.0, 29.999, 30.0, 1e9]))
    assert exact[:4] == pytest.approx([1, 1, 0.5, 0.25])
    assert exact[4] > 0
    assert exact[5] == exact[6] == 0


def test_a_node_that_says_nothing_costs_the_median(bench) -> None:
    b = bench("a", "b", "c", "dumb")
    for name, cost_ms in (("a", 1.0), ("b", 2.0), ("c", 9.0)):
        b.say(name, cost_fixed_ms=cost_ms)
    assert b.cost("dumb") == pytest.approx(b.cost("b"))


def test_own_requests_count_until_the_node_reports_them(bench) -> None:
    b = bench("a", "b")
    b.say("a")
    b.say("b")
    idle = b.cost("a")
    choice = b.choose(exclude=b.fleet.by_name["b"])
    ticket = b.chooser.admit(choice)
    assert b.cost("a") == pytest.approx(idle + choice.work_ms)
    b.now_s[0] += 0.1
    b.say("a", queue_ms=4.0, sequence=2)
    assert b.cost("a") == pytest.approx(idle + 4.0), "the heartbeat has seen it"
    second = b.chooser.admit(b.choose(exclude=b.fleet.by_name["b"]))
    assert b.cost("a") == pytest.approx(idle + 4.0 + choice.work_ms)
    b.now_s[0] += 31
    b.say("b", sequence=3)
    assert b.cost("a") == pytest.approx(idle + 2 * choice.work_ms, rel=1e-6), (
        "nothing is believed any more: all our own requests count"
    )
    b.chooser.release(ticket)
    b.chooser.release(second)
    assert b.cost("a") == pytest.approx(idle)


def test_policies_have_a_table_row() -> None:
    import hbm_router.choose

    assert all(f"`{policy}`" in str(hbm_router.choose.__doc__) for policy in Policy)
