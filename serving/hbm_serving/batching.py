"""The bounded queue in front of the model: who is computed next, and who is refused.

Requests of one user are ordered: while one is in flight, later ones wait, so that the second
finds what the first has cached. Everybody else overtakes them.
"""

from __future__ import annotations

import dataclasses
import heapq
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hbm_serving.errors import Refused
from hbm_serving.features import RankRequest


class RankResult(NamedTuple):
    """Scores of one request and what its response headers tell."""

    scores: npt.NDArray[np.float32]  # [candidates]
    model_version: int
    history_tokens: int  # kept
    kv_reused_tokens: int
    rows_looked_up: int
    rows_missed: int
    queue_ms: float
    service_ms: float  # gather and compute of its batch
    alpha: float
    kv_row_lag_s: float
    top_shards: tuple[int, ...] = ()


@dataclasses.dataclass(slots=True, eq=False)
class Ticket:
    """One request on its way. Times are of the queue's clock, in seconds."""

    request: RankRequest
    arrived_s: float
    deadline_s: float
    slo_s: float
    """Latency that counts as met for this request."""
    finish: Callable[[RankResult | Exception], None]
    """Called once, from the thread that finished or refused the request."""
    sequence: int = 0
    cancelled: bool = False

    @property
    def most_tokens(self) -> int:
        """Bound of what this request computes, known before any cache is looked up."""
        return self.request.tokens + len(self.request.candidates)


class BatchQueue:
    """Thread-safe; `submit` from the event loop, `take` and `release` from the pipeline."""

    def __init__(self, max_queue: int, clock: Callable[[], float]) -> None:
        self._max_queue = max_queue
        self._clock = clock
        self._changed = threading.Condition()
        self._ready: list[tuple[int, Ticket]] = []  # heap by arrival
        self._waiting: dict[int, deque[Ticket]] = {}  # per user with a request ahead of these
        self._busy: set[int] = set()  # users with a request that is ready or in flight
        self._depth = 0
        self._sequence = 0
        self._closed = False

    @property
    def depth(self) -> int:
        """Requests that wait (not those in flight)."""
        return self._depth

    def submit(self, ticket: Ticket, retry_after_s: float = 1.0) -> None:
        """Adds a request; raises `Refused` when the queue is full or closed."""
        with self._changed:
            if self._closed:
                raise Refused("draining", "the server is shutting down", retry_after_s)
            if self._depth >= self._max_queue:
                raise Refused(
                    "queue_full", f"{self._depth} requests are waiting already", retry_after_s
                )
            self._sequence += 1
            ticket.sequence = self._sequence
            self._depth += 1
            user = ticket.request.user
            if user and user in self._busy:
                self._waiting.setdefault(user, deque()).append(ticket)
                return
            if user:
                self._busy.add(user)
            heapq.heappush(self._ready, (ticket.sequence, ticket))
            self._changed.notify_all()

    def take(
        self, max_requests: int, max_tokens: int, wait_s: float, timeout_s: float
    ) -> tuple[list[Ticket], list[Ticket]]:
        """The next batch and the requests whose deadline has passed; both may be empty.

        Waits up to `timeout_s` for a first request, then until the batch is full or its oldest
        request has waited `wait_s`. At least one request is taken whatever its length. Each user
        taken is in flight until `release`.
        """
        with self._changed:
            if not self._ready:
                self._changed.wait(timeout_s)
            if wait_s > 0.0 and self._ready:
                close_s = self._ready[0][1].arrived_s + wait_s
                while len(self._ready) < max_requests and not self._closed:
                    left_s = close_s - self._clock()
                    if left_s <= 0.0:
                        break
                    self._changed.wait(left_s)
            batch: list[Ticket] = []
            expired: list[Ticket] = []
            tokens, now_s = 0, self._clock()
            while self._ready and len(batch) < max_requests:
                ticket = self._ready[0][1]
                if ticket.cancelled or ticket.deadline_s <= now_s:
                    heapq.heappop(self._ready)
                    self._depth -= 1
                    self._release(ticket.request.user)
                    if not ticket.cancelled:
                        expired.append(ticket)
                    continue
                tokens += ticket.most_tokens
                if batch and tokens > max_tokens:
                    break
                heapq.heappop(self._ready)
                self._depth -= 1
                batch.append(ticket)
            return batch, expired

    def release(self, tickets: list[Ticket]) -> None:
        """These requests are finished: the next one of each user may run."""
        with self._changed:
            for ticket in tickets:
                self._release(ticket.request.user)
            self._changed.notify_all()

    def _release(self, user: int) -> None:
        if not user:
            return
        line = self._waiting.get(user)
        if not line:
            self._busy.discard(user)
            return
        ticket = line.popleft()
        if not line:
            del self._waiting[user]
        heapq.heappush(self._ready, (ticket.sequence, ticket))

    def close(self) -> None:
        """No more requests; what waits is still served."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
