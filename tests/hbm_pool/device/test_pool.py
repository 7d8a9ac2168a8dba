"""The pool as a server uses it: batch by batch, from several threads, to its end."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hbm_pool import (
    KVHandle,
    KVSpec,
    KVStatus,
    Pool,
    PoolConfig,
    RamRowStore,
    RowStoreError,
    TableSpec,
)
from hbm_pool.contracts.records import TELEMETRY

KV = KVSpec(layers=2, heads=1, head_dim=4, page_tokens=4)
TABLES = (TableSpec("item", 3000, 8), TableSpec("side", 500, 4))


def make_config(**changes: Any) -> PoolConfig:
    settings: dict[str, Any] = {
        "pool_bytes": 96 * 4 * KV.page_bytes,
        "extent_bytes": 4 * KV.page_bytes,
        "tables": TABLES,
        "kv": KV,
        "alpha_min": 0.1,
        "alpha_max": 0.8,
        "max_batch_users": 2,
        "max_sequence_tokens": 64,
        "slice_budget_us": 20.0,
        **changes,
    }
    return PoolConfig(**settings)


def make_tables(seed: int = 1) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    generator = np.random.default_rng(seed)
    return {t.name: generator.random((t.rows, t.width), dtype=np.float32) for t in TABLES}


@pytest.fixture
def pool() -> Iterator[Pool]:
    stores = {name: RamRowStore(table, name) for name, table in make_tables().items()}
    with Pool(make_config(), stores) as made:
        yield made


def serve(pool: Pool, user: int, tokens: int) -> KVStatus:
    prints = np.arange(tokens // 4, dtype=np.uint32) + np.uint32(user * 1000)
    handle = pool.kv.acquire(user, prints, tokens)
    pool.kv.commit(handle)
    return handle.status


def gather(pool: Pool, ids: torch.Tensor, table: str = "item") -> torch.Tensor:
    out = torch.empty((len(ids), 8 if table == "item" else 4))
    pool.emb.gather({table: ids}, {table: out})
    return out


def until(condition: Callable[[], bool], deadline_s: float = 60.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "the condition never came true"


def test_a_whole_life(pool: Pool) -> None:
    assert pool.alpha == pool.target_alpha == 0.5
    tables = make_tables()
    ids = torch.arange(0, 3000, 7)
    for user in range(1, 21):
        serve(pool, user, 60)
    for alpha in (0.8, 0.1, 0.45):
        pool.set_target_alpha(alpha)
        for user in itertools.count(1):
            pool.begin_batch()
            assert serve(pool, user % 20 + 1, 60) is KVStatus.READY
            assert torch.equal(gather(pool, ids), torch.from_numpy(tables["item"])[ids])
            if not pool.moving:
                break
            assert user < 2000
        assert pool.alpha == pool.target_alpha == pool.config.emb_extents(alpha) / 96
        assert pool.check_integrity() == []
    stats = pool.stats()
    assert stats.moves == 3
    assert stats.kv_evicted_users + stats.kv_trimmed_users > 0
    assert stats.emb_hits > 0
    assert stats.emb_evictions > 0
    assert stats.moved_extents == (76 - 48) + (76 - 10) + (43 - 10)


def test_stats_fill_a_telemetry_record(pool: Pool) -> None:
    pool.begin_batch()
    serve(pool, 1, 40)
    serve(pool, 1, 40)
    gather(pool, torch.arange(100))
    pool.push_rows("side", np.array([3]), torch.zeros(1, 4))
    pool.set_model_version(5)
    record = np.zeros((), dtype=TELEMETRY)
    record["queue_depth"] = 7
    stats = pool.stats()
    stats.fill(record)
    assert record["alpha"] == 0.5
    assert (record["kv_lookups"], record["kv_hits"]) == (2, 1)
    assert (record["kv_tokens_reused"], record["kv_tokens_computed"]) == (40, 40)
    assert record["emb_accesses"] == 100
    assert record["class_accesses"].tolist() == [100, 0, 0, 0]
    assert record["class_extents"].sum() == record["extents_emb"] == 48
    assert (record["row_epoch"], record["model_version"]) == (1, 5)
    assert record["queue_depth"] == 7
    # Every counter of the pool that telemetry knows is there.
    owned_by_server = {
        *("monotonic_ns", "boot_epoch", "command_generation", "requests", "errors", "overloads"),
        *("batches", "slo_met", "slo_total", "latency_p50_ms", "latency_p99_ms", "latency_n"),
        *("queue_depth", "queue_ms", "draining", "candidate_tokens", "context_tokens"),
        *(
            "gather_ms",
            "compute_ms",
            "service_ms",
            "cost_fixed_ms",
            "cost_token_ms",
            "cost_token_context_ms",
            "cost_row_ms",
        ),
        *("residency_sequence", "requests_lost", "timed_accesses", "timed_misses"),
    }
    assert set(TELEMETRY.names or ()) - set(stats._fields) == owned_by_server


def test_dwell_counts_accesses_since_the_last_move(pool: Pool) -> None:
    gather(pool, torch.arange(1000))
    slots = sum(
        extents * kind.rows_per_extent
        for extents, kind in zip(pool.stats().class_extents, pool.config.classes, strict=True)
    )
    assert pool.stats().accesses_per_slot_since_move == pytest.approx(1000 / slots)
    pool.set_target_alpha(0.6, drop_only=True)
    pool.begin_batch()
    assert not pool.moving
    assert pool.stats().accesses_per_slot_since_move == 0.0


def test_pushed_rows_count_at_once_and_kv_may_lag() -> None:
    now = [0.0]
    stores = {name: RamRowStore(table, name) for name, table in make_tables().items()}
    with Pool(make_config(max_kv_row_lag_s=10.0), stores, clock_s=lambda: now[0]) as pool:
        gather(pool, torch.tensor([5]))
        serve(pool, 1, 40)
        assert pool.push_rows("item", torch.tensor([5]), torch.full((1, 8), 9.0)) == 1
        assert gather(pool, torch.tensor([5])).unique().tolist() == [9.0]
        now[0] = 4.0
        prints = np.arange(10, dtype=np.uint32) + np.uint32(1000)
        handle = pool.kv.acquire(1, prints, 40)
        assert (handle.cached_tokens, handle.row_lag_s) == (40, 4.0)
        pool.kv.commit(handle)
        now[0] = 11.0
        pool.begin_batch()
        assert pool.kv.residents()[0].tolist() == []
        with pytest.raises(ValueError, match="no row 3000"):
            pool.push_rows("item", torch.tensor([3000]), torch.zeros(1, 8))
        assert pool.stats().row_epoch == 1


def test_strict_row_lag_voids_at_once() -> None:
    stores = {name: RamRowStore(table, name) for name, table in make_tables().items()}
    events: list[tuple[int, int]] = []
    with Pool(make_config(max_kv_row_lag_s=0.0), stores) as pool:
        pool.kv.on_event = lambda user, tokens: events.append((user, tokens))
        serve(pool, 1, 40)
        pool.push_rows("item", torch.tensor([5]), torch.zeros(1, 8))
    assert events == [(1, 40), (1, 0)]


class _BrokenStore(RamRowStore):
    def write(self, ids: Any, values: Any) -> None:
        raise RowStoreError("item: read-only")


def test_a_failed_push_counts_for_kv() -> None:
    """Nobody knows what the store holds of those rows, so KV computed before must not last."""
    tables = make_tables()
    stores = {
        "item": _BrokenStore(tables["item"], "item"),
        "side": RamRowStore(tables["side"], "side"),
    }
    with Pool(make_config(max_kv_row_lag_s=0.0), stores) as pool:
        serve(pool, 1, 40)
        with pytest.raises(RowStoreError, match="read-only"):
            pool.push_rows("item", torch.tensor([5]), torch.zeros(1, 8))
        assert pool.stats().kv_users == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p: p.set_target_alpha(float("nan")), "target alpha is nan"),
        (lambda p: p.set_model_version(-1), "version is -1"),
        (lambda p: p.can_reserve(-1, 0), "-1"),
        (lambda p: p.kv.acquire(1, np.zeros(17, dtype=np.uint32), 68), "68 tokens"),
        (lambda p: p.push_rows("nope", torch.zeros(0, dtype=torch.int64), torch.zeros(0, 8)), "no"),
    ],
)
def test_wrong_calls_say_what_is_wrong(pool: Pool, call: Callable[[Pool], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(pool)
    assert pool.check_integrity() == []


def test_stores_must_fit_the_tables() -> None:
    tables = make_tables()
    with pytest.raises(ValueError, match="give one store per table"):
        Pool(make_config(), {"item": RamRowStore(tables["item"], "item")})


def test_threads_of_a_server_share_the_pool(pool: Pool) -> None:
    """Gather, compute and admin threads, moves both ways and refill, until enough was served."""
    tables = {name: torch.from_numpy(table) for name, table in make_tables().items()}
    batches: queue.Queue[list[KVHandle]] = queue.Queue(maxsize=2)
    stop = threading.Event()
    failures: list[BaseException] = []
    pool.refiller.set_rate(1e8)
    served = [0]

    def guarded(work: Callable[[np.random.Generator], None], seed: int) -> threading.Thread:
        def run() -> None:
            generator = np.random.default_rng(seed)
            try:
                while not stop.is_set():
                    work(generator)
            except BaseException as error:
                failures.append(error)
                stop.set()

        return threading.Thread(target=run)

    def gather_stage(generator: np.random.Generator) -> None:
        pool.begin_batch()
        handles = []
        for user in generator.choice(12, 2, replace=False) + 1:
            tokens = int(generator.integers(8, 64))
            prints = np.arange(tokens // 4, dtype=np.uint32) + np.uint32(user * 1000)
            handles.append(pool.kv.acquire(int(user), prints, tokens))
        ids = torch.from_numpy(generator.zipf(1.3, 60) % 3000)
        if not torch.equal(gather(pool, ids), tables["item"][ids]):
            raise AssertionError("a gather returned wrong rows")
        while not stop.is_set():
            try:
                return batches.put(handles, timeout=0.1)
            except queue.Full:
                continue
        for handle in handles:
            pool.kv.abort(handle)
        return None

    def compute_stage(generator: np.random.Generator) -> None:
        try:
            handles = batches.get(timeout=0.1)
        except queue.Empty:
            return
        pool.kv.batch_indices(handles)
        for handle in handles:
            if generator.random() < 0.1:
                pool.kv.abort(handle)
            else:
                pool.kv.commit(handle)
        served[0] += 1

    def admin(generator: np.random.Generator) -> None:
        pool.set_target_alpha(float(generator.random()), drop_only=bool(generator.random() < 0.2))
        pool.stats()
        if generator.random() < 0.05:
            pool.set_model_version(int(generator.integers(0, 1000)))
        violations = pool.check_integrity()
        if violations:
            raise AssertionError(violations)

    threads = [
        guarded(work, seed) for seed, work in enumerate((gather_stage, compute_stage, admin))
    ]
    for thread in threads:
        thread.start()
    try:
        until(lambda: (served[0] >= 150 and pool.stats().moves >= 5) or stop.is_set())
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=60)
    assert failures == []
    while not batches.empty():
        for handle in batches.get():
            pool.kv.abort(handle)
    assert pool.check_integrity() == []
    assert pool.stats().kv_pinned_extents == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_same_on_cuda() -> None:
    tables = make_tables()
    stores = {name: RamRowStore(table, name) for name, table in tables.items()}
    with Pool(make_config(), stores, "cuda") as pool:
        ids = torch.arange(0, 3000, 7)
        expected = torch.from_numpy(tables["item"])[ids]
        for alpha in (0.8, 0.1, 0.45):
            pool.set_target_alpha(alpha)
            for user in itertools.count(1):
                pool.begin_batch()
                prints = np.arange(15, dtype=np.uint32) + np.uint32(user % 20 * 1000)
                handle = pool.kv.acquire(user % 20 + 1, prints, 60)
                indices = pool.kv.batch_indices([handle])
                assert indices.kv_indices.device.type == "cuda"
                pages = indices.kv_indices.long()
                first = handle.cached_tokens // 4
                for layer in pool.kv.layer_pages:
                    assert (layer[pages[:first]] == user % 20).all()
                    layer[pages[first:]] = float(user % 20)
                pool.kv.commit(handle)
                out = torch.empty((len(ids), 8), device="cuda")
                pool.emb.gather({"item": ids.cuda()}, {"item": out})
                assert torch.equal(out.cpu(), expected)
                if not pool.moving:
                    break
            assert pool.alpha == pool.target_alpha
            assert pool.check_integrity() == []
