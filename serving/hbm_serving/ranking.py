"""The two stages of a batch: gather (KV lookup, rows) and compute (scores, commit)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import structlog
import torch
from hbm_pool.contracts.history import page_fingerprints
from hbm_pool.contracts.records import CostModel

from hbm_serving.batching import RankResult, Ticket
from hbm_serving.config import Config
from hbm_serving.costs import ComputeTiming, CostEstimator
from hbm_serving.features import Batch, RankRequest, table_ids
from hbm_serving.memory import Hold, Memory, RowCount
from hbm_serving.model import HSTU, PagedHistory
from hbm_serving.telemetry import Counters, ServedRequest, top_shards
from hbm_serving.weights import DTYPES

_log = structlog.get_logger("hbm_serving")
_MOVING = 0.05


class Work(NamedTuple):
    """A gathered batch."""

    tickets: list[Ticket]
    holds: list[Hold | None]  # in order of the tickets
    fingerprints: list[npt.NDArray[np.uint32]]
    batch: Batch
    rows: dict[str, torch.Tensor]
    found: RowCount
    gather_ms: float
    model: HSTU
    model_version: int
    alpha: float
    gathered: torch.cuda.Event | None


class RowBuffers:
    """Batch-owned buffers for gathered rows: nothing computes on slots that a move may reuse.

    They grow to the largest batch seen and are reused; one set per pipeline slot.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._tables = config.model.tables
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}

    def views(self, count: int) -> dict[str, torch.Tensor]:
        """Per table `[count, width]`."""
        views = {}
        for table in self._tables:
            buffer = self._buffers.get(table.name)
            if buffer is None or len(buffer) < count:
                rows = 1 << max(count - 1, 255).bit_length()
                buffer = torch.empty(
                    rows, table.width, dtype=DTYPES[table.dtype], device=self._device
                )
                self._buffers[table.name] = buffer
            views[table.name] = buffer[:count]
        return views


class RankStages:
    """Implements `pipeline.Stages`. `gather` on one thread, `compute` on one."""

    def __init__(
        self,
        config: Config,
        memory: Memory,
        model: HSTU,
        costs: CostEstimator,
        counters: Counters,
        *,
        slots: int,
        on_boundary: Callable[[bool], None],
        on_served: Callable[[list[ServedRequest]], None],
    ) -> None:
        self.config = config
        self.memory = memory
        self.model = model
        self.model_version = 0
        self.costs = costs
        self.counters = counters
        self._device = model.device
        self._buffers = [RowBuffers(config, model.device) for _ in range(slots)]
        self._on_boundary = on_boundary
        self._on_served = on_served
        self._cost_model = CostModel.OVERLAP if config.server.pipeline else CostModel.SERIAL
        self._side: torch.cuda.Stream | None = None
        if model.device.type == "cuda":
            self._side = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]

    def boundary(self, idle: bool) -> bool:
        more = self.memory.idle() if idle else False
        self._on_boundary(idle)
        return more

    # -- stage 1 -----------------------------------------------------------------------------

    def gather(self, tickets: list[Ticket], slot: int) -> Work:
        if self._side is None:
            return self._gather(tickets, slot)
        with torch.cuda.stream(self._side):
            return self._gather(tickets, slot)

    def _gather(self, tickets: list[Ticket], slot: int) -> Work:
        started_s = time.perf_counter()
        self.memory.begin_batch()
        holds: list[Hold | None] = []
        fingerprints: list[npt.NDArray[np.uint32]] = []
        try:
            for ticket in tickets:
                request = ticket.request
                pages = page_fingerprints(
                    request.items,
                    request.timestamps,
                    request.actions,
                    self.config.pool.page_tokens,
                    self.model_version,
                )
                fingerprints.append(pages)
                holds.append(
                    self.memory.acquire(request.user, pages, request.tokens)
                    if request.user and request.tokens
                    else None
                )
            batch = Batch(
                [ticket.request for ticket in tickets],
                [0 if hold is None else hold.cached_tokens for hold in holds],
                padding_waste=self.model.padding_waste,
            )
            ids = {
                name: torch.from_numpy(rows)
                for name, rows in table_ids(self.config.model, batch.item_ids()).items()
            }
            rows = self._buffers[slot].views(batch.computed_tokens)
            rows_begun_s = time.perf_counter()
            count = self.memory.gather(ids, rows)
        except BaseException:
            self.counters.gather_errors += len(tickets)
            for hold in holds:
                if hold is not None:
                    self.memory.abort(hold)
            raise
        gathered = None
        if self._side is not None:
            gathered = torch.cuda.Event()  # type: ignore[no-untyped-call]
            gathered.record(self._side)
        ended_s = time.perf_counter()
        gather_ms = (ended_s - started_s) * 1e3
        self.costs.observe_gather(count.class_misses, (ended_s - rows_begun_s) * 1e3)
        return Work(
            tickets,
            holds,
            fingerprints,
            batch,
            rows,
            count,
            gather_ms,
            self.model,
            self.model_version,
            self.memory.alpha,
            gathered,
        )

    # -- stage 2 -----------------------------------------------------------------------------

    def compute(self, work: Work) -> None:
        started_s = time.perf_counter()
        if work.gathered is not None:
            torch.cuda.current_stream(self._device).wait_event(work.gathered)
            self.memory.order_pages([hold for hold in work.holds if hold is not None])
        scores = work.model.score(work.batch, work.rows, self._pages(work)).numpy()
        if not np.isfinite(scores).all():
            raise FloatingPointError("scores hold NaN or infinite values")
        for hold in work.holds:
            if hold is not None:
                self.memory.commit(hold)
        now_s = time.perf_counter()
        compute_ms = (now_s - started_s) * 1e3
        batch = work.batch
        self.costs.observe_compute(
            ComputeTiming(
                len(batch.requests), batch.computed_tokens, batch.context_tokens, compute_ms
            )
        )
        self._finish(work, scores, compute_ms, now_s)

    def _pages(self, work: Work) -> PagedHistory | None:
        layer_pages = self.memory.layer_pages
        if layer_pages is None or all(hold is None or not hold.ready for hold in work.holds):
            return None
        page_ids: list[npt.NDArray[np.int64] | None] = []
        for index in work.batch.order:
            hold = work.holds[index]
            ready = hold is not None and hold.ready
            page_ids.append(hold.page_ids.astype(np.int64) if ready and hold is not None else None)
        return PagedHistory(layer_pages, page_ids)

    def abort(self, work: Work, error: Exception) -> None:
        """Gives the holds of a failed batch back; their KV is never published."""
        self.counters.compute_errors += len(work.tickets)
        for hold in work.holds:
            if hold is not None and hold.open:
                self.memory.abort(hold)
        for ticket in work.tickets:
            ticket.finish(error)

    def _top_shards(self, request: RankRequest) -> tuple[int, ...]:
        limits = self.config.server
        if not (limits.top_shards and request.user):
            return ()
        return top_shards(self.config.model, request.items, limits.emb_shards, limits.top_shards)

    def _finish(
        self, work: Work, scores: npt.NDArray[np.float32], compute_ms: float, now_s: float
    ) -> None:
        both_ms = work.gather_ms + compute_ms
        rows_missed = work.batch.count_by_request(work.found.missed_at)
        results: list[tuple[Ticket, RankResult, float]] = []
        for place, index in enumerate(work.batch.order):
            ticket = work.tickets[index]
            latency_ms = (now_s - ticket.arrived_s) * 1e3
            result = self._result(work, place, scores, int(rows_missed[place]), both_ms, latency_ms)
            results.append((ticket, result, latency_ms))
        # Counted before anybody is answered: who has an answer finds it in the counters.
        self._count(work, compute_ms)
        for ticket, _, latency_ms in results:
            self.counters.latency.add(latency_ms)
            self.counters.slo_met += latency_ms <= ticket.slo_s * 1e3
        for ticket, result, _ in results:
            ticket.finish(result)
        self._on_served(
            [
                ServedRequest(ticket.request, pages)
                for ticket, pages in zip(work.tickets, work.fingerprints, strict=True)
            ]
        )

    def _result(
        self,
        work: Work,
        place: int,
        scores: npt.NDArray[np.float32],
        rows_missed: int,
        service_ms: float,
        latency_ms: float,
    ) -> RankResult:
        """What the request at `place` of the batch is answered."""
        span = work.batch.spans[place]
        hold = work.holds[work.batch.order[place]]
        looked_up = (span.new + span.candidates) * len(self.config.model.tables)
        first = span.candidates_at
        return RankResult(
            scores=scores[first : first + span.candidates],
            model_version=work.model_version,
            history_tokens=span.tokens,
            kv_reused_tokens=span.cached,
            rows_looked_up=looked_up,
            rows_missed=rows_missed,
            queue_ms=max(0.0, latency_ms - service_ms),
            service_ms=service_ms,
            alpha=work.alpha,
            kv_row_lag_s=hold.row_lag_s if hold is not None and span.cached else 0.0,
            top_shards=self._top_shards(work.batch.requests[place]),
        )

    def _count(self, work: Work, compute_ms: float) -> None:
        counters, batch = self.counters, work.batch
        requests = len(work.tickets)
        service_ms = (
            max(work.gather_ms, compute_ms)
            if self._cost_model is CostModel.OVERLAP
            else work.gather_ms + compute_ms
        )
        for span, index in zip(batch.spans, batch.order, strict=True):
            hold = work.holds[index]
            if hold is not None:
                counters.kv_lookups += 1
                counters.kv_hits += span.cached > 0
                counters.uncached_requests += not hold.ready
            counters.kv_tokens_reused += span.cached
        counters.requests += requests
        counters.slo_total += requests
        counters.batches += 1
        counters.kv_tokens_computed += batch.new_tokens
        counters.candidate_tokens += batch.candidates
        counters.context_tokens += batch.context_tokens
        counters.gather_ms += work.gather_ms
        counters.compute_ms += compute_ms
        counters.timed_accesses += work.found.accesses
        counters.timed_misses[: len(work.found.class_misses)] += work.found.class_misses
        counters.service_ms += service_ms
        counters.request_ms += _MOVING * (service_ms / requests - counters.request_ms)
