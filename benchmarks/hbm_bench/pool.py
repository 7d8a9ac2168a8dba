"""The pool's own costs (design rows: KV lookup + allocate, handing over, planned moves).

Everything runs on a full pool: each allocation evicts, each extent that changes sides was in use.
Times are of the calling thread; percentiles carry their n.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = list[float]

PAGE_TOKENS = 32
USERS = 8
TOKENS = 4096
MOVED_EXTENTS = 1500


def run(quick: bool, seed: int) -> dict[str, Any]:
    """All figures of the pool alone, on CPU."""
    import torch

    torch.set_num_threads(1)
    with _quiet_collector():
        return {
            "kv_lookup_allocate": _kv_lookup_allocate(200 if quick else 4000),
            "hand_over": _hand_over(40 if quick else 1000),
            "planned_move": _planned_move(quick, seed),
        }


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """As in the server: what lives long is frozen, young garbage is still collected."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _percentiles(values_us: Floats) -> dict[str, float | int]:
    figures: dict[str, float | int] = {"n": len(values_us)}
    figures["p50_us"] = float(np.percentile(values_us, 50))
    if len(values_us) >= 1000:
        figures["p99_us"] = float(np.percentile(values_us, 99))
    else:
        figures["p95_us"] = float(np.percentile(values_us, 95))
    return figures


def _elapsed_us(started_ns: int) -> float:
    return (time.perf_counter_ns() - started_ns) / 1e3


def _config(extents: int, **changes: Any) -> Any:
    """A pool of many small extents: the index's costs do not depend on what an extent weighs."""
    from hbm_pool import KVSpec, PoolConfig, TableSpec

    kv = KVSpec(layers=1, heads=1, head_dim=8, page_tokens=PAGE_TOKENS)
    settings: dict[str, Any] = {
        "pool_bytes": extents * 2 * kv.page_bytes,
        "extent_bytes": 2 * kv.page_bytes,
        "tables": (TableSpec("item", 400_000, 16),),
        "kv": kv,
        "alpha": 0.5,
        "alpha_min": 0.05,
        "alpha_max": 0.6,
        "max_batch_users": USERS,
        "max_sequence_tokens": TOKENS,
        **changes,
    }
    return PoolConfig(**settings)


def _open(config: Any, seed: int = 1) -> Any:
    from hbm_pool import Pool, RamRowStore

    generator = np.random.default_rng(seed)
    stores = {
        table.name: RamRowStore(
            generator.random((table.rows, table.width), dtype=np.float32), table.name
        )
        for table in config.tables
    }
    return Pool(config, stores=stores)


def _fill_kv(pool: Any, first_user: int) -> int:
    """New users until each one evicts another; returns the next unused user."""
    prints = np.arange(TOKENS // PAGE_TOKENS, dtype=np.uint32)
    before = pool.kv.counters()
    user = first_user
    while True:
        pool.kv.commit(pool.kv.acquire(user, prints, TOKENS))
        user += 1
        now = pool.kv.counters()
        if now.evicted_users + now.trimmed_users > before.evicted_users + before.trimmed_users:
            return user


def _kv_lookup_allocate(batches: int) -> dict[str, Any]:
    """8 users x 4096 tokens, none of them resident, on a full pool; and all of them resident."""
    pool = _open(_config(8192))
    events: deque[tuple[int, int]] = deque()
    pool.kv.on_event = lambda user, tokens: events.append((user, tokens))
    prints = [np.arange(TOKENS // PAGE_TOKENS, dtype=np.uint32) + i for i in range(USERS)]
    user = _fill_kv(pool, 1)
    misses: Floats = []
    hits: Floats = []
    commits: Floats = []
    for _ in range(batches):
        for times, fresh in ((misses, True), (hits, False)):
            if fresh:
                user += USERS
            events.clear()
            started = time.perf_counter_ns()
            handles = [pool.kv.acquire(user + i, prints[i], TOKENS) for i in range(USERS)]
            times.append(_elapsed_us(started))
            cached = sum(handle.cached_tokens for handle in handles)
            assert cached == (0 if fresh else USERS * TOKENS)
            assert not fresh or len(events) >= USERS, "every allocation evicts"
            started = time.perf_counter_ns()
            for handle in handles:
                pool.kv.commit(handle)
            commits.append(_elapsed_us(started))
    _sound(pool)
    pool.close()
    return {
        "users": USERS,
        "tokens": TOKENS,
        "every_allocation_evicts": _percentiles(misses),
        "all_resident": _percentiles(hits),
        "commit": _percentiles(commits),
        "reference_list_of_pages": _percentiles(_reference_allocator(max(20, batches // 20))),
        "goal_p50_us": 50,
    }


def _reference_allocator(batches: int) -> Floats:
    """The same with a free list of pages and whole least recently used users, page by page."""
    from collections import OrderedDict

    pages = TOKENS // PAGE_TOKENS
    free: deque[int] = deque(range(64 * pages))
    users: OrderedDict[int, list[int]] = OrderedDict()
    events: deque[tuple[int, int]] = deque()
    times: Floats = []
    for batch in range(batches + 16):
        started = time.perf_counter_ns()
        for i in range(USERS):
            user = batch * USERS + i
            held = users.setdefault(user, [])
            for _ in range(pages):
                if not free:
                    victim, given = users.popitem(last=False)
                    free.extend(given)
                    events.append((victim, 0))
                held.append(free.popleft())
        times.append(_elapsed_us(started))
        events.clear()
    return times[16:]


def _hand_over(rounds: int) -> dict[str, Any]:
    """1,500 extents change sides at one batch boundary, drop-only; both sides are full before.

    With one width class and with two (whose shares are divided anew), right after the pool was
    used by its own calls, and after half a million row lookups have emptied the CPU's caches.
    """
    return {
        "extents": MOVED_EXTENTS,
        "one_class": _hand_over_of(rounds, 1),
        "two_classes": _hand_over_of(rounds, 2),
        "goal_p50_us": 50,
    }


def _hand_over_of(rounds: int, classes: int) -> dict[str, Any]:
    from hbm_pool import TableSpec

    total = 8192
    tables = (TableSpec("item", 400_000, 16), TableSpec("side", 100_000, 8))[:classes]
    pool = _open(_config(total, tables=tables))
    events: deque[tuple[int, int]] = deque()
    pool.kv.on_event = lambda user, tokens: events.append((user, tokens))
    low = pool.config.emb_extents(0.3)
    high = low + MOVED_EXTENTS
    _move_now(pool, low / total)
    user = _fill_kv(pool, 1)
    _fill_emb(pool)
    figures: dict[str, Any] = {}
    for name, cold in (("warm", False), ("cold", True)):
        to_emb: Floats = []
        to_kv: Floats = []
        for _ in range(max(20, rounds // 10) if cold else rounds):
            if cold:
                _fill_emb(pool)
            to_emb.append(_move_now(pool, high / total))
            if cold:
                _fill_emb(pool)
            to_kv.append(_move_now(pool, low / total))
            user = _fill_kv(pool, user)
            events.clear()
        figures[f"kv_to_emb_{name}"] = _percentiles(to_emb)
        figures[f"emb_to_kv_{name}"] = _percentiles(to_kv)
    _sound(pool)
    pool.close()
    return figures


def _fill_emb(pool: Any) -> None:
    """Every row of every table once: all slots are used, freshly grown ones too."""
    import torch

    for table in pool.config.tables:
        for start in range(0, table.rows, 50_000):
            part = torch.arange(start, min(start + 50_000, table.rows))
            out = torch.empty((len(part), table.width))
            pool.emb.gather({table.name: part}, {table.name: out})


def _move_now(pool: Any, alpha: float) -> float:
    """One drop-only move; returns what its batch boundary took."""
    pool.set_target_alpha(alpha, drop_only=True)
    started = time.perf_counter_ns()
    pool.begin_batch()
    took = _elapsed_us(started)
    assert not pool.moving
    return took


def _planned_move(quick: bool, seed: int) -> dict[str, Any]:
    """EMB gives up 30 % of its extents in slices while Zipf(.8) rows are looked up."""
    batch = 2560
    config = _config(2048, alpha=0.5, alpha_max=0.5)
    pool = _open(config, seed)
    draw = _Zipf(config.tables[0].rows, 0.8, np.random.default_rng(seed))
    _fill_kv(pool, 1)
    settle = 100 if quick else 1500
    after = 25 if quick else 100
    low = config.emb_extents(0.35) / config.num_extents
    _miss_ratio(pool, draw, settle, batch)
    before = _miss_ratio(pool, draw, settle, batch)

    slices, cpu = _slices(pool, low, draw, batch)
    right_after = _miss_ratio(pool, draw, after, batch)
    _miss_ratio(pool, draw, settle, batch)
    steady = _miss_ratio(pool, draw, settle, batch)
    relocated = pool.stats().relocated_rows

    # The same move by dropping, for comparison.
    _slices(pool, config.alpha, draw, batch)
    _miss_ratio(pool, draw, settle, batch)
    _move_now(pool, low)
    dropped = _miss_ratio(pool, draw, after, batch)

    # More moves, until there are enough slices for a P99.
    while not quick and len(slices) < 1200:
        _slices(pool, config.alpha, draw, batch)
        _miss_ratio(pool, draw, 50, batch)
        for times, more in zip((slices, cpu), _slices(pool, low, draw, batch), strict=True):
            times.extend(more)
    _sound(pool)
    pool.close()
    return {
        "slice": _percentiles(slices),
        "slice_cpu": _percentiles(cpu),
        "slice_budget_us": config.slice_budget_us,
        "goal_p99_us": 200,
        "relocated_rows": relocated,
        "accesses_right_after": after * batch,
        "miss_ratio_before": before,
        "miss_ratio_right_after": right_after,
        "miss_ratio_new_steady": steady,
        "above_steady_pp": 100 * (right_after - steady),
        "goal_above_steady_pp": 0.5,
        "reference_drop_only_above_steady_pp": 100 * (dropped - steady),
    }


def _slices(pool: Any, alpha: float, draw: _Zipf, batch: int) -> tuple[Floats, Floats]:
    """A planned move with a batch of lookups after each slice; returns what the slices took, by
    the clock and in CPU time of the thread (what other processes took from it apart)."""
    times: Floats = []
    cpu: Floats = []
    pool.set_target_alpha(alpha)
    while pool.moving:
        cpu_ns, started = time.thread_time_ns(), time.perf_counter_ns()
        pool.begin_batch()
        times.append(_elapsed_us(started))
        cpu.append((time.thread_time_ns() - cpu_ns) / 1e3)
        _miss_ratio(pool, draw, 1, batch)
    return times, cpu


class _Zipf:
    """Row ids with P(rank) proportional to rank^-s, ranks shuffled over the ids."""

    def __init__(self, rows: int, exponent: float, generator: np.random.Generator) -> None:
        weights = np.arange(1, rows + 1, dtype=np.float64) ** -exponent
        self._cumulative = np.cumsum(weights) / weights.sum()
        self._ids = generator.permutation(rows)
        self._generator = generator

    def draw(self, n: int) -> npt.NDArray[np.int64]:
        ranks = np.searchsorted(self._cumulative, self._generator.random(n))
        ids: npt.NDArray[np.int64] = self._ids[ranks]
        return ids


def _miss_ratio(pool: Any, draw: _Zipf, batches: int, batch: int) -> float:
    """Misses ÷ accesses over some batches of lookups."""
    import torch

    out = torch.empty((batch, pool.config.tables[0].width))
    misses = accesses = 0
    for _ in range(batches):
        stats = pool.emb.gather({"item": torch.from_numpy(draw.draw(batch))}, {"item": out})
        misses += stats.misses
        accesses += stats.accesses
    return misses / max(1, accesses)


def _sound(pool: Any) -> None:
    violations = pool.check_integrity()
    assert violations == [], violations
