"""A simulated node: the pool's own index code over real extents, at one static α.

Everything that decides what is a hit is the production code (KV index, extent ledger, replacement
kernel); only bytes and time are missing. Time is the cost model's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hbm_policy.class_division import DIVIDE_REQUESTS, ClassDivision
from hbm_policy.costs import CostConstants
from hbm_pool.contracts.records import CostModel, RequestSample, ServerInfo
from hbm_pool.host.extents import ExtentLedger, Owner
from hbm_pool.host.fences import EpochClock
from hbm_pool.host.kv_handle import ANONYMOUS
from hbm_pool.host.kv_index import KVIndex
from hbm_pool.host.replacement import TzCache
from hbm_pool.host.row_lag import RowLag
from hbm_pool.host.tz_kernel import GHOST_HITS

from hbm_sim.requests import RowList, RowNumbers


class Served(NamedTuple):
    """What one request found and cost."""

    cached_tokens: int
    lookups: int  # rows looked up, repeated ones counted once
    misses: tuple[int, ...]  # by class
    compute_ms: float
    gather_ms: float
    service_ms: float


class Node:
    """One node. Requests are served one after the other, each in a batch of its own."""

    def __init__(self, info: ServerInfo, costs: CostConstants, alpha: float) -> None:
        """`alpha` is rounded to whole extents."""
        self.info = info
        self.costs = costs
        emb = min(max(round(alpha * info.extents), 0), info.extents)
        self.alpha = emb / info.extents
        self.requests = 0
        clock = EpochClock()
        self._ledger = ExtentLedger(info.extents)
        extents = self._ledger.take(Owner.EMB, emb)
        self._kv = KVIndex(
            self._ledger,
            clock,
            page_tokens=info.page_tokens,
            pages_per_extent=info.pages_per_extent,
            max_sequence_tokens=info.max_sequence_tokens,
            rows=RowLag(0.0, lambda: 0.0),
            eviction=info.kv_eviction,
        )
        self._kv.limit = info.extents - emb
        self._division = ClassDivision(info, emb)
        self._rows: list[TzCache] = []
        for each, rows in zip(info.classes, RowNumbers(info).rows, strict=True):
            self._rows.append(TzCache(rows, each.rows_per_extent, max_extents=info.extents))
        parts = np.split(extents, np.cumsum(self._division.extents)[:-1])
        for cache, part in zip(self._rows, parts, strict=True):
            cache.grow(part)

    @property
    def class_extents(self) -> list[int]:
        """EMB extents of each width class."""
        return [cache.num_extents for cache in self._rows]

    def serve(self, sample: RequestSample, lists: list[RowList]) -> Served:
        """One request; `lists` are its rows (`RowNumbers.lists`)."""
        cached = self._serve_kv(sample)
        looked_up, misses, ghost_hits = [], [], []
        for cache, (rows, positions) in zip(self._rows, lists, strict=True):
            wanted = rows[positions >= cached] if cached else rows
            missed = wanted[cache.lookup_many(wanted) < 0]
            looked_up.append(len(wanted))
            misses.append(len(missed))
            ghosts = int(cache.tz.state[GHOST_HITS])
            if len(missed):
                cache.insert_many(missed)
            ghost_hits.append(int(cache.tz.state[GHOST_HITS]) - ghosts)
        self._division.count(looked_up, misses, ghost_hits)
        self.requests += 1
        if self.requests % DIVIDE_REQUESTS == 0:
            self._rebalance()
        compute_ms, gather_ms = prices(self.costs, sample, cached, misses)
        overlap = self.info.cost_model == CostModel.OVERLAP
        service_ms = max(compute_ms, gather_ms) if overlap else compute_ms + gather_ms
        return Served(cached, sum(looked_up), tuple(misses), compute_ms, gather_ms, service_ms)

    def _serve_kv(self, sample: RequestSample) -> int:
        if sample.user == ANONYMOUS:
            return 0
        tokens = sample.history_tokens
        handle = self._kv.acquire(sample.user, sample.page_fingerprints, tokens)
        if handle is None:
            handle = self._kv.refuse(sample.user, sample.page_fingerprints, tokens)
        cached = handle.cached_tokens
        self._kv.commit(handle)
        return cached

    def _rebalance(self) -> None:
        change = self._division.rebalance(DIVIDE_REQUESTS)
        if change is None:
            return
        won = np.empty(0, np.int32)
        for cache, count in zip(self._rows, change, strict=True):
            if count < 0:
                cache.plan_shrink(-count)
                while cache.draining_extents:
                    won = np.concatenate([won, cache.shrink_slice(1 << 16).released])
        for cache, count in zip(self._rows, change, strict=True):
            if count > 0:
                cache.grow(won[:count])
                won = won[count:]

    def check_integrity(self) -> list[str]:
        """Violations in the index code; empty when all is well."""
        found = self._kv.violations()
        for cache in self._rows:
            found += cache.check_integrity()
        return found


def prices(
    costs: CostConstants, sample: RequestSample, cached_tokens: int, misses: list[int]
) -> tuple[float, float]:
    """Compute and gather of one request, ms (see `CostConstants`)."""
    tokens = sample.history_tokens
    new = tokens - cached_tokens
    context = new * (cached_tokens + tokens + 1) / 2.0 + sample.candidates * tokens
    compute_ms = (
        costs.fixed_ms
        + costs.token_ms * (new + sample.candidates)
        + costs.token_context_ms * context
    )
    gather_ms = sum(count * ms for count, ms in zip(misses, costs.row_ms, strict=False))
    return compute_ms, gather_ms
