"""Who gets a request: the rules of each policy, seen from outside."""

from __future__ import annotations

from collections import Counter

import pytest
from hbm_router.choice import Choice
from hbm_router.discovery import Backend
from hbm_router.wire import Refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hbm_router.test_cost import make_bench

USER = 123456789


def test_the_cheapest_node_wins() -> None:
    b = make_bench("a", "b", "c")
    b.say("a", queue_ms=50)
    b.say("b", queue_ms=1)
    b.say("c", queue_ms=30)
    choice = b.choose(USER)
    assert (choice.node.name, choice.why, choice.kv) == ("b", "cost", "miss")


def test_a_holder_wins_while_its_queue_costs_less_than_the_recompute() -> None:
    b = make_bench("a", "b")
    for queue_ms, expected in ((0, "a"), (5, "a"), (200, "b")):
        b.say("a", {USER: 960}, queue_ms=queue_ms)
        b.say("b")
        choice = b.choose(USER)
        assert choice.node.name == expected
        assert choice.kv == ("hit" if expected == "a" else "miss")


def test_another_gpu_needs_no_configuration() -> None:
    b = make_bench("slow", "fast")
    b.say("slow", {USER: 960}, cost_token_ms=0.01)
    b.say("fast", cost_token_ms=0.005)
    assert b.choose(USER).node.name == "slow", "reuse beats computing anew"
    b.say("slow", {USER: 160}, cost_token_ms=0.01)
    assert b.choose(USER).node.name == "fast", "a short hit does not"


def test_cold_users_go_to_their_hash_home_among_near_ties() -> None:
    b = make_bench("a", "b", "c")
    for name in "abc":
        b.say(name)
    for user in range(200):
        choice = b.choose(user)
        assert choice.node.index == b.fleet.ring.home(user)
        assert choice.why == "home"


def test_a_near_tie_goes_to_a_holder() -> None:
    b = make_bench("a", "b", "c", tie_ms=100)
    for name in "abc":
        b.say(name, {USER: 16} if name == "c" else {})
    assert {b.choose(USER).node.name for _ in range(20)} == {"c"}


def test_anonymous_near_ties_are_spread_by_two_choices() -> None:
    b = make_bench("a", "b", "c", "d")
    for name in "abcd":
        b.say(name)
    counts: Counter[str] = Counter()
    for _ in range(400):
        choice = b.choose(None, history_tokens=0, candidates=0, source="none")
        counts[choice.node.name] += 1
        b.chooser.admit(choice)
    assert max(counts.values()) - min(counts.values()) < 40
    assert choice.why in ("tie", "cost")


def test_between_heartbeats_requests_do_not_herd() -> None:
    """One node looks idle: without its own count the router would send it everything."""
    b = make_bench("a", "b", "c", "d")
    for name, queue_ms in zip("abcd", (0.0, 20.0, 20.0, 20.0), strict=True):
        b.say(name, queue_ms=queue_ms)
    for _ in range(40):
        b.chooser.admit(b.choose(None))
    share = [node.inflight for node in b.fleet.nodes]
    assert min(share) >= 8, share


def test_a_second_request_waits_for_the_first_instead_of_computing_twice() -> None:
    """Elsewhere it would be answered a little sooner, at the cost of everybody there."""
    b = make_bench("a", "b")
    b.say("a")
    b.say("b", queue_ms=2)
    first = b.choose(USER)
    assert (first.node.name, first.kv) == ("a", "miss")
    ticket = b.chooser.admit(first)
    second = b.choose(USER)
    assert (second.node.name, second.kv) == ("a", "hit")
    assert second.est_ms is not None
    assert second.est_ms > first.work_ms / 2, "the wait is not denied"
    b.chooser.release(ticket)
    assert b.choose(USER).kv == "miss", "no digest names the user, nothing is in flight"


def test_a_queue_of_others_still_sends_the_second_request_elsewhere() -> None:
    b = make_bench("a", "b")
    b.say("a")
    b.say("b", queue_ms=2)
    b.chooser.admit(b.choose(USER))
    b.say("a", queue_ms=60)
    b.say("b")
    assert b.choose(USER).node.name == "b"


def test_many_requests_of_one_user_at_once_still_spread() -> None:
    b = make_bench("a", "b", "c", "d")
    for name in "abcd":
        b.say(name)
    for _ in range(80):
        b.chooser.admit(b.choose(USER, candidates=1000))
    share = [node.inflight for node in b.fleet.nodes]
    assert min(share) >= 10, share


def test_a_user_in_flight_on_a_node_that_left_is_forgotten() -> None:
    b = make_bench("a", "b")
    for name in "ab":
        b.say(name)
    first = b.choose(USER)
    ticket = b.chooser.admit(first)
    stays = "b" if first.node.name == "a" else "a"
    b.fleet.update([Backend(stays, "h", 1)])
    b.chooser.fleet_changed()
    second = b.choose(USER)
    assert (second.node.name, second.kv) == (stays, "miss")
    b.chooser.release(ticket)


def test_nodes_over_the_deadline_are_skipped() -> None:
    b = make_bench("a", "b", tie_ms=50)
    b.say("a", {USER: 960}, queue_ms=40)
    b.say("b", queue_ms=10)
    assert b.cost("a", USER) > 30 > b.cost("b", USER)
    assert b.choose(USER).node.name == "a", "a near tie, and it holds the user"
    assert b.choose(USER, deadline_ms=30.0).node.name == "b"


def test_hopeless_deadlines_are_shed_only_where_wanted() -> None:
    keep, shed = make_bench("a"), make_bench("a", shed_over_deadline=True)
    for b in (keep, shed):
        b.say("a", queue_ms=100)
    assert keep.choose(USER, deadline_ms=20.0).node.name == "a"
    refusal = shed.refused(USER, deadline_ms=20.0)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.reason, refusal.dropped) == (429, "deadline", True)
    assert isinstance(shed.refused(USER, deadline_ms=500.0), Choice)


def test_long_queues_are_shed_where_wanted() -> None:
    b = make_bench("a", "b", max_queue_ms=50)
    b.say("a", queue_ms=60)
    b.say("b", queue_ms=40)
    assert b.choose(USER).node.name == "b"
    b.say("b", queue_ms=70)
    refusal = b.refused(USER)
    assert (refusal.status, refusal.reason) == (429, "overload")


def test_a_user_just_routed_counts_as_resident() -> None:
    b = make_bench("a", "b", "c")
    for name in "abc":
        b.say(name)
    first = b.choose(USER)
    b.speculation.put(USER & ((1 << 40) - 1), first.node.name, 1000, b.now_s[0])
    for _ in range(3):
        again = b.choose(USER)
        assert (again.node, again.kv) == (first.node, "hit")
    b.now_s[0] += 10
    for name in "abc":
        b.say(name, sequence=2)
    assert b.choose(USER).kv == "miss"


def test_growing_distrust_then_hashing_then_recovery() -> None:
    b = make_bench("a", "b", "c")
    home = b.fleet.ring.home(USER)
    holder = (home + 1) % 3
    for index, name in enumerate("abc"):
        b.say(name, {USER: 960} if index == holder else {})
    p = [b.choose(USER).hit_probability]
    for _ in range(5):
        b.now_s[0] += 5
        choice = b.choose(USER)
        assert choice.node.index == holder
        p.append(choice.hit_probability)
    assert p == sorted(p, reverse=True)
    assert p[-1] < 0.1 < p[0]
    b.now_s[0] += 6
    choice = b.choose(USER)
    assert (choice.node.index, choice.why, choice.kv) == (home, "stale", "unknown")
    assert choice.est_ms is None
    b.say("abc"[holder], {USER: 960}, sequence=2)
    assert b.choose(USER).node.index == holder


@pytest.mark.parametrize("policy", ["cost_ms", "weighted", "chwbl"])
def test_without_any_news_users_are_hashed_within_bounded_load(policy: str) -> None:
    b = make_bench("a", "b", "c", "d", policy=policy)
    home = b.fleet.ring.home(USER)
    choice = b.choose(USER)
    assert (choice.node.index, choice.why) == (home, "hash")
    for count in range(1, 60):
        choice = b.choose(USER)
        b.chooser.admit(choice)
        loads = [node.inflight for node in b.fleet.nodes]
        assert max(loads) <= -(-1.25 * count // 4), "nobody exceeds 1.25 times the average"
    assert choice.why in ("hash", "spill")


def test_failed_and_draining_nodes_get_nothing() -> None:
    b = make_bench("a", "b", "c", probe_interval_s=0)
    b.say("a", draining=True)
    b.say("b", queue_ms=100)
    b.say("c")
    assert b.choose(USER).node.name == "c"
    assert b.choose(USER, exclude=b.fleet.by_name["c"]).node.name == "b"
    b.outlier.unreachable(b.fleet.by_name["c"])
    assert b.choose(USER).node.name == "b"
    b.say("b", draining=True)
    assert b.choose(USER).node.name == "b", "with every node draining, draining means nothing"
    refusal = make_bench("a").refused(USER, exclude=None)
    assert isinstance(refusal, Choice)
    only = make_bench("a")
    assert only.refused(USER, exclude=only.fleet.by_name["a"]).reason == "no_backends"


def test_round_robin_and_two_choices_and_least_load() -> None:
    rr = make_bench("a", "b", "c", policy="round_robin")
    assert Counter(rr.choose(USER).node.name for _ in range(30)) == {"a": 10, "b": 10, "c": 10}
    p2c = make_bench("a", "b", policy="p2c")
    p2c.chooser.admit(p2c.choose(USER, exclude=p2c.fleet.by_name["b"]))
    assert {p2c.choose(USER).node.name for _ in range(10)} == {"b"}
    least = make_bench("a", "b", "c", policy="least_load")
    for name, queue_ms in (("a", 5.0), ("b", 1.0), ("c", 9.0)):
        least.say(name, {USER: 960} if name == "c" else {}, queue_ms=queue_ms)
    assert least.choose(USER).node.name == "b"
    dark = make_bench("a", "b", policy="least_load")
    dark.chooser.admit(dark.choose(USER, exclude=dark.fleet.by_name["a"]))
    assert {dark.choose(USER).node.name for _ in range(10)} == {"a"}


def test_weighted_is_the_rule_of_the_paper() -> None:
    b = make_bench("kv", "emb", "idle", policy="weighted", weighted_full_ms=100)
    b.say("kv", {USER: 1000}, shard_rows=(0, 0, 0, 10), queue_ms=20)
    b.say("emb", shard_rows=(10, 10, 0, 10), queue_ms=20)
    b.say("idle", shard_rows=(0, 0, 10, 10))
    assert b.choose(USER, shards=(0, 1)).node.name == "kv"
    assert b.choose(99, shards=(0, 1)).node.name == "emb"
    assert b.choose(99, shards=(2,)).node.name == "idle"
    b.say("kv", {USER: 1000}, queue_ms=90)
    choice = b.choose(USER, shards=(0, 1))
    assert (choice.node.name, choice.why) == ("idle", "spill"), "above 85 % the least loaded"


def test_unknown_lengths_use_what_the_digest_says() -> None:
    b = make_bench("a", "b")
    b.say("a", {USER: 960})
    b.say("b")
    choice = b.choose(USER, history_tokens=0, candidates=0, source="none")
    assert (choice.node.name, choice.kv) == ("a", "hit")


def test_a_changed_list_of_nodes_keeps_what_is_known() -> None:
    from hbm_router.discovery import Backend

    b = make_bench("a", "b")
    b.say("a", {USER: 960})
    b.say("b")
    ticket = b.chooser.admit(b.choose(USER))
    b.fleet.update([Backend(name, "h", 1) for name in ("c", "a")])
    b.chooser.fleet_changed()
    choice = b.choose(USER)
    assert (choice.node.name, choice.kv) == ("a", "hit")
    b.chooser.release(ticket)
    b.fleet.update([Backend("c", "h", 1)])
    b.chooser.fleet_changed()
    assert b.choose(USER).node.name == "c"
    assert b.fleet.inflight == 0


@settings(max_examples=50)
@given(
    queues=st.lists(st.floats(0, 300), min_size=1, max_size=8),
    holder=st.integers(0, 7),
    cached=st.integers(0, 4000),
    length=st.integers(0, 4000),
    deadline=st.none() | st.floats(0, 400),
)
def test_the_choice_is_the_least_cost_or_a_near_tie(queues, holder, cached, length, deadline):
    b = make_bench(*(f"n{index}" for index in range(len(queues))))
    for index, queue_ms in enumerate(queues):
        b.say(f"n{index}", {USER: cached} if index == holder else {}, queue_ms=queue_ms)
    facts = {"history_tokens": length, "deadline_ms": deadline}
    costs = {node.name: b.cost(node.name, USER, **facts) for node in b.fleet.nodes}
    choice = b.choose(USER, **facts)
    best = min(costs.values())
    chosen = costs[choice.node.name]
    assert chosen <= best + max(1.0, 0.05 * best) + 1e-6
    assert choice.est_ms == pytest.approx(chosen, rel=1e-6, abs=1e-6)
    if deadline is not None and best <= deadline:
        assert chosen <= deadline + 1e-6
