"""A simulated node: the pool's own index code over real extents, at one static α.

Everything that decides what is a hit is the production code (KV index, extent ledger, replacement
kernel); only bytes and time are missing. Time is the cost model's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_policy.costs import CostConstants
from hbm_pool.contracts.records import CostModel, RequestSample, ServerInfo
from hbm_pool.host.extents import ExtentLedger, Owner
from hbm_pool.host.fences import EpochClock
from hbm_pool.host.kv_handle import ANONYMOUS
from hbm_pool.host.kv_index import KVIndex
from hbm_pool.host.replacement import TzCache
from hbm_pool.host.row_lag import RowLag

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

    def __init__(
        self,
        info: ServerInfo,
        costs: CostConstants,
        alpha: float,
        class_shares: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """`alpha` is rounded to whole extents. `class_shares` divides the EMB extents among the
        width classes (sums to 1); by default they are divided by the bytes of the tables."""
        self.info = info
        self.costs = costs
        emb = min(max(round(alpha * info.extents), 0), info.extents)
        self.alpha = emb / info.extents
        clock = EpochClock()
        self._ledger = ExtentLedger(info.extents)
        self._ledger.take(Owner.EMB, emb)
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
        self._rows: list[TzCache] = []
        shares = catalogue_shares(info) if class_shares is None else class_shares
        for each, rows, extents in zip(
            info.classes, RowNumbers(info).rows, divide(emb, shares), strict=True
        ):
            self._rows.append(
                TzCache(rows, each.rows_per_extent, max_extents=extents, num_extents=extents)
            )

    def serve(self, sample: RequestSample, lists: list[RowList]) -> Served:
        """One request; `lists` are its rows (`RowNumbers.lists`)."""
        cached = self._serve_kv(sample)
        lookups = 0
        misses = []
        for cache, (rows, positions) in zip(self._rows, lists, strict=True):
            wanted = rows[positions >= cached] if cached else rows
            lookups += len(wanted)
            missed = wanted[cache.lookup_many(wanted) < 0]
            misses.append(len(missed))
            if len(missed):
                cache.insert_many(missed)
        compute_ms, gather_ms = prices(self.costs, sample, cached, misses)
        overlap = self.info.cost_model == CostModel.OVERLAP
        service_ms = max(compute_ms, gather_ms) if overlap else compute_ms + gather_ms
        return Served(cached, lookups, tuple(misses), compute_ms, gather_ms, service_ms)

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


def catalogue_shares(info: ServerInfo) -> npt.NDArray[np.float64]:
    """Division of EMB among the width classes by the bytes of their tables."""
    size = np.array([each.row_bytes * each.catalogue_rows for each in info.classes], np.float64)
    shares: npt.NDArray[np.float64] = size / size.sum()
    return shares


def divide(extents: int, shares: npt.NDArray[np.float64]) -> list[int]:
    """Whole extents by shares; every class gets one at least while there are as many."""
    edges = np.round(np.cumsum(shares) * extents).astype(int)
    given = np.diff(edges, prepend=0)
    for index in np.flatnonzero(given == 0):
        if given.max() > 1:
            given[int(np.argmax(given))] -= 1
            given[index] = 1
    return [int(count) for count in given]
