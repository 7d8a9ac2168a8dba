"""The compiled node against the pool's own index code, and what a move does to it."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import numpy as np
import pytest
from hbm_pool.contracts.records import TELEMETRY, RowClass
from hbm_pool.host.extents import ExtentLedger, Owner
from hbm_pool.host.fences import EpochClock
from hbm_pool.host.kv_index import KVIndex
from hbm_pool.host.replacement import TzCache
from hbm_pool.host.row_lag import RowLag
from hbm_sim import engine_moves as at
from hbm_sim.curve_track import TwinSamples
from hbm_sim.engine import EngineError, EngineNode
from hbm_sim.node_spec import NodeSpec
from hbm_sim.queueing import queue_ms
from hbm_sim.stream import Stream, make_stream

from tests.hbm_sim.small_workload import regime, small_workload


class PoolIndex:
    """The pool's own KV index and replacement, driven one request at a time."""

    def __init__(self, spec: NodeSpec, alpha: float) -> None:
        info = spec.info
        emb = round(alpha * info.extents)
        ledger, clock = ExtentLedger(info.extents), EpochClock()
        extents = ledger.take(Owner.EMB, emb)
        self.kv = KVIndex(
            ledger,
            clock,
            page_tokens=info.page_tokens,
            pages_per_extent=info.pages_per_extent,
            max_sequence_tokens=info.max_sequence_tokens,
            rows=RowLag(0.0, lambda: 0.0),
            eviction=info.kv_eviction,
        )
        self.kv.limit = info.extents - emb
        row_class = info.classes[0]
        self.rows = TzCache(
            row_class.catalogue_rows, row_class.rows_per_extent, max_extents=info.extents
        )
        self.rows.grow(extents)

    def serve(self, stream: Stream, spec: NodeSpec) -> list[tuple[int, int, int]]:
        """(tokens reused, rows looked up, rows missed) of each request."""
        served = []
        for i, sample in enumerate(
            TwinSamples(stream, dataclasses.replace(spec.info, sample_rate=1.0))
        ):
            handle = self.kv.acquire(
                sample.user, sample.page_fingerprints, sample.history_tokens
            ) or self.kv.refuse(sample.user, sample.page_fingerprints, sample.history_tokens)
            cached = handle.cached_tokens
            self.kv.commit(handle)
            wanted = looked_up(stream, i, cached)
            missed = wanted[self.rows.lookup_many(wanted) < 0]
            self.rows.insert_many(missed)
            served.append((cached, len(wanted), len(missed)))
        return served


def looked_up(stream: Stream, i: int, cached: int) -> np.ndarray:
    """Distinct rows of a request that reuses so many tokens, from its last position on."""
    history = slice(stream.history_at[i], stream.history_at[i + 1])
    new = stream.history_positions[history] >= cached
    candidates = stream.candidate_rows[stream.candidate_at[i] : stream.candidate_at[i + 1]]
    rows = np.concatenate([stream.history_rows[history][new], candidates])[::-1]
    return np.array(list(dict.fromkeys(rows.tolist())), np.int64)


def _outcomes(node: EngineNode) -> list[tuple[int, int, int]]:
    outcome = node.outcome
    assert outcome is not None
    return [
        (int(cached), round(looked), round(missed))
        for cached, looked, missed in zip(
            outcome.cached_tokens, outcome.looked_up_rows, outcome.missed_rows, strict=True
        )
    ]


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.85])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_request_finds_what_it_finds_in_the_pool(alpha: float, seed: int) -> None:
    workload = small_workload()
    stream, spec = make_stream(workload, seed, qps=20.0), workload.node_spec()
    node = EngineNode(spec, alpha, 1.0)
    node.serve(stream, 0, len(stream))
    assert _outcomes(node) == PoolIndex(spec, alpha).serve(stream, spec)
    assert node.check_integrity() == []
    # The comparison means something: both caches hit, miss and evict.
    outcome = node.outcome
    assert outcome is not None
    assert 0.02 < (outcome.cached_tokens > 0).mean() < 0.98
    assert 0.02 < outcome.missed_rows.sum() / outcome.looked_up_rows.sum() < 0.98


def test_rows_under_lru_hit_as_in_a_plain_ordered_dictionary() -> None:
    workload = small_workload()
    stream, spec = make_stream(workload, 1, qps=20.0), workload.node_spec()
    node = EngineNode(spec, 0.4, 1.0, "lru")
    node.serve(stream, 0, len(stream))
    assert node.outcome is not None
    capacity = round(0.4 * spec.info.extents) * spec.info.classes[0].rows_per_extent
    held: OrderedDict[int, None] = OrderedDict()
    for i in range(len(stream)):
        wanted = looked_up(stream, i, int(node.outcome.cached_tokens[i])).tolist()
        missed = [row for row in wanted if row not in held]
        for row in wanted:
            if row in held:
                held.move_to_end(row)
        for row in missed:
            if len(held) >= capacity:
                held.popitem(last=False)
            held[row] = None
        assert round(node.outcome.missed_rows[i]) == len(missed), i
    assert node.check_integrity() == []


def test_a_sample_of_the_rows_finds_the_true_miss_ratio() -> None:
    workload = small_workload(
        rows=400_000,
        node={"pool_bytes": 400 * 65536, "extent_bytes": 65536, "max_sequence_tokens": 512},
        regimes={
            "quiet": regime(revisit=0.3, hot=0.2, zipf_s=0.8),
            "busy": regime(revisit=0.3, hot=0.2, zipf_s=0.8),
        },
        walk=[{"regime": "quiet", "requests": 4000}],
    )
    spec = workload.node_spec()
    ratios = []
    for rate in (1.0, 0.1):
        missed = looked = 0.0
        for seed in (1, 2, 3):
            stream = make_stream(workload, seed, rate, qps=20.0)
            node = EngineNode(spec, 0.5, rate, sampled_rows=len(stream.row_keys))
            node.serve(stream, 0, len(stream))
            assert node.outcome is not None
            half = slice(len(stream) // 2, None)
            missed += node.outcome.missed_rows[half].sum()
            lookups = np.where(node.outcome.cached_tokens > 0, 0, stream.history_lookups)
            looked += (lookups + stream.candidate_lookups)[half].sum()
        ratios.append(missed / looked)
    assert ratios[1] == pytest.approx(ratios[0], rel=0.05)


def test_latency_is_waiting_plus_the_time_of_the_cost_model() -> None:
    for gather in ("serial", "overlap"):
        workload = small_workload().with_gather(gather)  # type: ignore[arg-type]
        stream, spec = make_stream(workload, 1, qps=150.0), workload.node_spec()
        node = EngineNode(spec, 0.5, 1.0)
        node.serve(stream, 0, len(stream))
        outcome = node.outcome
        assert outcome is not None
        expected = queue_ms(
            stream.arrival_s * 1e3,
            outcome.gather_ms,
            outcome.compute_ms,
            overlap=gather == "overlap",
        )
        assert outcome.latency_ms == pytest.approx(expected)
        new = stream.tokens - outcome.cached_tokens
        context = new * (outcome.cached_tokens + stream.tokens + 1) / 2 + 8 * stream.tokens
        compute = 0.5 + 0.02 * (new + 8) + 1e-5 * context
        assert outcome.compute_ms == pytest.approx(compute)
        assert outcome.gather_ms == pytest.approx(outcome.missed_rows * 64 / 2.0e6 * 1e3)


def test_serving_in_pieces_is_serving_at_once() -> None:
    workload = small_workload()
    stream, spec = make_stream(workload, 1, qps=60.0), workload.node_spec()
    whole, pieces = EngineNode(spec, 0.5, 1.0), EngineNode(spec, 0.5, 1.0)
    whole.serve(stream, 0, len(stream))
    for tick in range(1, 200):
        pieces.advance(stream, tick * 0.1)
    pieces.serve(stream, pieces.position, len(stream))
    assert whole.outcome is not None
    assert pieces.outcome is not None
    for one, other in zip(whole.outcome, pieces.outcome, strict=True):
        assert np.array_equal(one, other)


def _miss_ratio(node: EngineNode, begin: int, end: int) -> float:
    assert node.outcome is not None
    span = slice(begin, end)
    looked = node.outcome.looked_up_rows[span].sum()
    return float(node.outcome.missed_rows[span].sum() / looked)


def _steady(seed: int = 1) -> tuple[Stream, NodeSpec]:
    workload = small_workload(
        rows=100_000,
        node={"pool_bytes": 384 * 8192, "extent_bytes": 8192, "token_bytes": 64},
        regimes={
            "quiet": regime(revisit=0.3, hot=0.3, zipf_s=1.0),
            "busy": regime(revisit=0.3, hot=0.3, zipf_s=1.0),
        },
        walk=[{"regime": "quiet", "requests": 9000}],
    )
    spec = dataclasses.replace(workload.node_spec(), slice_rows=64)
    return make_stream(workload, seed, qps=20.0), spec


def test_a_planned_shrink_is_at_its_new_steady_state_at_once_and_a_drop_is_not() -> None:
    stream, spec = _steady()
    begin, moved = 6000, 6600
    steady = EngineNode(spec, 0.4, 1.0)
    steady.serve(stream, 0, len(stream))
    after = {}
    for drop_only in (False, True):
        node = EngineNode(spec, 0.8, 1.0)
        node.serve(stream, 0, begin)
        node.command(0.4, drop_only=drop_only)
        if drop_only:
            node.serve(stream, begin, begin + 1)
            assert not node.moving
            after[drop_only] = node, begin + 1
        else:
            node.serve(stream, begin, moved)
            assert not node.moving
            after[drop_only] = node, moved
    for node, position in after.values():
        assert node.alpha == pytest.approx(0.4, abs=0.01)
        node.serve(stream, position, len(stream))
        assert node.check_integrity() == []
        assert node.moved_bytes == pytest.approx(0.4 * 384 * 8192, rel=0.02)
    planned, start = after[False]
    dropped, start_drop = after[True]
    excess = _miss_ratio(planned, start, start + 300) - _miss_ratio(steady, start, start + 300)
    dropping = _miss_ratio(dropped, start_drop, start_drop + 300)
    dropping -= _miss_ratio(steady, start_drop, start_drop + 300)
    assert excess < 0.01
    assert dropping > 0.02
    # In the end both are where a node that was never moved is.
    last = slice(len(stream) - 1000, len(stream))
    for node in (planned, dropped):
        assert _miss_ratio(node, last.start, last.stop) == pytest.approx(
            _miss_ratio(steady, last.start, last.stop), abs=0.01
        )


def test_an_idle_server_moves_on_and_a_busy_one_does_a_slice_per_batch() -> None:
    stream, spec = _steady()
    spec = dataclasses.replace(spec, queue_limit=len(stream))
    nodes = {}
    for rate in (1.0, 1e6):
        hurried = dataclasses.replace(stream, arrival_s=stream.arrival_s / rate)
        node = EngineNode(spec, 0.8, 1.0)
        node.serve(hurried, 0, 6000)
        node.command(0.4)
        node.serve(hurried, 6000, 6010)
        nodes[rate] = node
    assert not nodes[1.0].moving
    assert nodes[1.0].alpha == pytest.approx(0.4, abs=0.01)
    assert nodes[1e6].moving
    assert nodes[1e6].alpha > 0.7
    # A server that is told to hurry hands over what is left, target or no new target.
    nodes[1e6].command(0.4, drop_only=True)
    nodes[1e6].serve(hurried, 6010, 6011)
    assert not nodes[1e6].moving
    assert nodes[1e6].check_integrity() == []


def test_kv_that_shrinks_loses_its_coldest_users_and_keeps_the_hottest() -> None:
    stream, spec = _steady()
    node = EngineNode(spec, 0.2, 1.0)
    node.serve(stream, 0, 4000)
    before = node.residents()
    node.command(0.8)
    node.serve(stream, 4000, 4001)
    kept = node.residents()
    assert kept.tokens.sum() < 0.5 * before.tokens.sum()
    newest = set(stream.user[3980:4001].tolist())
    assert newest <= set(kept.users.tolist())
    assert node.check_integrity() == []


def test_refill_brings_hot_rows_back_within_its_budget() -> None:
    stream, spec = _steady()
    missed = {}
    for rate in (0.0, 2.0e5):
        node = EngineNode(spec, 0.3, 1.0)
        node.serve(stream, 0, 1000)
        # Heat is only counted while a refill is asked for.
        node.command(0.3, rate)
        node.serve(stream, 1000, 6000)
        node.command(0.8, rate)
        node.serve(stream, 6000, 6001)
        node.command(0.8, rate)
        node.serve(stream, 6001, 6400)
        missed[rate] = _miss_ratio(node, 6001, 6100)
        elapsed_s = stream.arrival_s[6399] - stream.arrival_s[1000]
        assert node.refill_bytes <= rate * (elapsed_s + 1.0)
        assert (node.refill_bytes > 0.0) == (rate > 0.0)
        assert node.check_integrity() == []
    assert missed[2.0e5] < missed[0.0] - 0.01


def test_refill_fills_what_was_won_with_all_that_was_asked_for() -> None:
    """The hottest rows are never lost: what a growth wins are the others."""
    stream, spec = _steady()
    missed = {}
    for rate in (0.0, 1e9):
        node = EngineNode(spec, 0.1, 1.0)
        node.serve(stream, 0, 1)
        node.command(0.1, refill_bytes_per_s=rate)
        node.serve(stream, 1, 6000)
        node.command(0.8, refill_bytes_per_s=rate)
        for position in range(6000, 6400, 100):
            node.serve(stream, position, position + 100)
            node.command(0.8, refill_bytes_per_s=rate)
        node.serve(stream, 6400, 7000)
        missed[rate] = _miss_ratio(node, 6400, 7000)
        assert node.check_integrity() == []
    assert missed[1e9] < 0.5 * missed[0.0]


def test_too_many_waiting_are_refused() -> None:
    workload = small_workload(node={"queue_limit": 5})
    stream, spec = make_stream(workload, 1, qps=2000.0), workload.node_spec()
    node = EngineNode(spec, 0.5, 1.0)
    node.serve(stream, 0, len(stream))
    outcome = node.outcome
    assert outcome is not None
    assert outcome.dropped.mean() > 0.5
    assert np.isnan(outcome.latency_ms[outcome.dropped]).all()
    served = ~outcome.dropped
    started = outcome.start_ms[served]
    arrived = stream.arrival_s[served] * 1e3
    for i in range(50, served.sum()):
        waiting = (arrived[:i] <= arrived[i]) & (started[:i] > arrived[i])
        assert waiting.sum() < 5


def test_telemetry_counts_what_was_served() -> None:
    workload = small_workload()
    stream, spec = make_stream(workload, 1, qps=20.0), workload.node_spec()
    node = EngineNode(spec, 0.5, 1.0)
    node.serve(stream, 0, len(stream))
    record = np.zeros((), TELEMETRY)
    node.telemetry(record, 17)
    outcome = node.outcome
    assert outcome is not None
    assert record["monotonic_ns"] == 17
    assert record["requests"] == len(stream)
    assert record["alpha"] == node.alpha
    assert record["emb_misses"] == outcome.missed_rows.sum()
    assert record["emb_hits"] + record["emb_misses"] == record["emb_accesses"]
    assert record["kv_hits"] == (outcome.cached_tokens > 0).sum()
    assert record["kv_tokens_reused"] + record["kv_tokens_computed"] == stream.tokens.sum()
    assert record["gather_ms"] == pytest.approx(outcome.gather_ms.sum())
    extents = record["extents_emb"] + record["extents_kv"] + record["extents_free"]
    assert extents == spec.info.extents
    assert record["kv_users"] >= len(node.residents().users)
    recent = np.sort(outcome.latency_ms[-1024:])
    assert record["latency_p99_ms"] == pytest.approx(recent[int(0.99 * len(recent))], rel=0.05)


def test_a_restarted_server_is_cold() -> None:
    stream, spec = _steady()
    node = EngineNode(spec, 0.5, 1.0)
    node.serve(stream, 0, 3000)
    warm = _miss_ratio(node, 2900, 3000)
    node.restart()
    assert len(node.residents().users) == 0
    node.serve(stream, 3000, 3100)
    assert _miss_ratio(node, 3000, 3020) > warm + 0.1
    assert node.boot_epoch == 2
    assert node.count(at.REQUESTS) == 100


def test_what_cannot_be_simulated_is_refused() -> None:
    workload = small_workload()
    stream, spec = make_stream(workload, 1, qps=20.0), workload.node_spec()
    with pytest.raises(EngineError, match=r"rate is 2.0"):
        EngineNode(spec, 0.5, 2.0)
    with pytest.raises(EngineError, match=r"alpha is 1.5"):
        EngineNode(spec, 1.5, 1.0)
    with pytest.raises(EngineError, match="commanded alpha nan"):
        EngineNode(spec, 0.5, 1.0).command(float("nan"))
    with pytest.raises(EngineError, match="the stream has rate"):
        EngineNode(spec, 0.5, 0.5).serve(stream, 0, 1)
    node = EngineNode(spec, 0.5, 1.0)
    with pytest.raises(EngineError, match="from 0 on come next"):
        node.serve(stream, 5, 6)
    classes = (*spec.info.classes, RowClass(32, 64, 500, (1,)))
    two = dataclasses.replace(spec, info=dataclasses.replace(spec.info, classes=classes))
    with pytest.raises(EngineError, match="2 row width classes"):
        EngineNode(two, 0.5, 1.0)
