"""Two stages, two threads: rows of the next batch are gathered while this one computes.

At most two batches exist at a time, one per buffer slot: one computing, one gathered or being
gathered. With `pipelined=False` one thread runs both stages in turn, for comparison.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

import structlog

from hbm_serving.batching import BatchQueue, Ticket
from hbm_serving.config import ServerSection
from hbm_serving.errors import Refused

_log = structlog.get_logger("hbm_serving")

IDLE_S = 0.01
"""Longest time without a look at the control block."""
SLOTS = 2

Work = TypeVar("Work")


class Stages(Protocol[Work]):
    """What the pipeline runs. `gather` and `boundary` run on one thread, `compute` on one."""

    def boundary(self, idle: bool) -> bool:
        """Between batches, and at least every `IDLE_S`: telemetry out, commands in.

        True: an idle server has more to do and wants to come back as soon as nothing waits."""

    def gather(self, tickets: list[Ticket], slot: int) -> Work:
        """Looks up KV and rows of a batch; `slot` names the buffers it may use."""

    def compute(self, work: Work) -> None:
        """Scores a batch and finishes its tickets."""

    def abort(self, work: Work, error: Exception) -> None:
        """Gives back what a batch holds after `compute` failed; finishes its tickets."""


class Pipeline(Generic[Work]):
    """Feeds batches through the stages until it is closed."""

    def __init__(
        self,
        incoming: BatchQueue,
        stages: Stages[Work],
        limits: ServerSection,
        *,
        pipelined: bool,
    ) -> None:
        self._incoming = incoming
        self._stages = stages
        self._limits = limits
        self._pipelined = pipelined
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(SLOTS):
            self._free.put(slot)
        self._gathered: queue.SimpleQueue[tuple[Work, int, list[Ticket]] | None] = (
            queue.SimpleQueue()
        )
        self._between: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._stop = threading.Event()
        self._ended = threading.Event()
        self.expired = 0
        """Requests refused because their deadline passed in the queue."""
        self._counting = threading.Lock()
        self._in_flight = 0
        self._threads = [threading.Thread(target=self._gather_loop, name="hbm-gather")]
        if pipelined:
            self._threads.append(threading.Thread(target=self._compute_loop, name="hbm-compute"))

    @property
    def in_flight(self) -> int:
        """Requests taken from the queue and not yet finished."""
        return self._in_flight

    def start(self) -> None:
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def between_batches(self, action: Callable[[], Any]) -> Future[Any]:
        """Runs `action` on the gather thread while no batch is in flight."""
        future: Future[Any] = Future()
        self._between.append((action, future))
        if self._ended.is_set():
            self._refuse_between()
        return future

    def close(self) -> None:
        """Finishes what is queued, then stops both threads. Call after `BatchQueue.close`."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    # -- gather thread -----------------------------------------------------------------------

    def _gather_loop(self) -> None:
        while True:
            slot = self._free_slot()
            if self._between:
                self._run_between()
            more = self._boundary(idle=self._incoming.depth == 0)
            tickets, expired = self._incoming.take(
                self._limits.max_batch_requests,
                self._limits.max_batch_tokens,
                self._limits.batch_wait_ms / 1e3,
                0.0 if more else IDLE_S,
            )
            self.expired += len(expired)
            for ticket in expired:
                ticket.finish(
                    Refused("deadline", "the request waited longer than its deadline", 1.0)
                )
            if not tickets:
                self._free.put(slot)
                if self._stop.is_set() and not self._incoming.depth:
                    break
                continue
            with self._counting:
                self._in_flight += len(tickets)
            try:
                work = self._stages.gather(tickets, slot)
            except Exception as error:
                _log.exception("gather failed", requests=len(tickets))
                for ticket in tickets:
                    ticket.finish(error)
                self._finished(tickets, slot)
                continue
            if self._pipelined:
                self._gathered.put((work, slot, tickets))
            else:
                self._compute(work, slot, tickets)
        self._gathered.put(None)
        self._ended.set()
        self._refuse_between()

    def _refuse_between(self) -> None:
        with contextlib.suppress(IndexError):  # the caller and the ending thread may both be here
            while True:
                _, future = self._between.popleft()
                future.set_exception(Refused("draining", "the server is shutting down", 1.0))

    def _free_slot(self) -> int:
        while True:
            try:
                return self._free.get(timeout=IDLE_S)
            except queue.Empty:
                self._boundary(idle=False)

    def _run_between(self) -> None:
        """The caller holds one slot; with the other one too, nothing is in flight."""
        others = [self._free_slot() for _ in range(SLOTS - 1)]
        while self._between:
            action, future = self._between.popleft()
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)
        for slot in others:
            self._free.put(slot)

    def _boundary(self, *, idle: bool) -> bool:
        try:
            return self._stages.boundary(idle)
        except Exception:
            _log.exception("work between batches failed")
            return False

    # -- compute thread ----------------------------------------------------------------------

    def _compute_loop(self) -> None:
        while True:
            entry = self._gathered.get()
            if entry is None:
                return
            self._compute(*entry)

    def _compute(self, work: Work, slot: int, tickets: list[Ticket]) -> None:
        try:
            self._stages.compute(work)
        except Exception as error:
            _log.exception("compute failed", requests=len(tickets))
            try:
                self._stages.abort(work, error)
            except Exception:
                _log.exception("a failed batch could not be given back")
        self._finished(tickets, slot)

    def _finished(self, tickets: list[Ticket], slot: int) -> None:
        with self._counting:
            self._in_flight -= len(tickets)
        self._incoming.release(tickets)
        self._free.put(slot)
