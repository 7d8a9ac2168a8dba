"""Order per user, bounds, deadlines."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hbm_serving.batching import BatchQueue, Ticket
from hbm_serving.errors import Refused
from hbm_serving.features import RankRequest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def ticket(user: int, tokens: int = 8, deadline_s: float = 1e9, arrived_s: float = 0.0) -> Ticket:
    ids = np.zeros(tokens, dtype=np.int64)
    request = RankRequest(user, ids, ids, None, np.zeros(2, dtype=np.int64), 0, tokens)
    return Ticket(request, arrived_s, deadline_s, 1.0, lambda outcome: None)


def take(queue: BatchQueue, most: int = 8, tokens: int = 10**9) -> list[Ticket]:
    return queue.take(most, tokens, 0.0, 0.0)[0]


def test_a_user_in_flight_waits_and_others_overtake() -> None:
    queue = BatchQueue(16, Clock())
    first, second, other = ticket(1), ticket(1), ticket(2)
    for entry in (first, second, other):
        queue.submit(entry)
    batch = take(queue)
    assert batch == [first, other]
    assert take(queue) == []
    assert queue.depth == 1
    queue.release(batch)
    assert take(queue) == [second]


def test_anonymous_requests_do_not_wait_for_each_other() -> None:
    queue = BatchQueue(16, Clock())
    entries = [ticket(0) for _ in range(4)]
    for entry in entries:
        queue.submit(entry)
    assert take(queue) == entries


def test_batches_are_bounded_by_tokens_but_never_empty() -> None:
    queue = BatchQueue(16, Clock())
    entries = [ticket(user, tokens=100) for user in range(1, 5)]
    for entry in entries:
        queue.submit(entry)
    assert take(queue, tokens=10) == entries[:1]
    assert take(queue, tokens=210) == entries[1:3]


def test_full_and_closed_queues_refuse() -> None:
    queue = BatchQueue(1, Clock())
    queue.submit(ticket(1))
    with pytest.raises(Refused, match="1 requests are waiting") as caught:
        queue.submit(ticket(2), retry_after_s=3.0)
    assert caught.value.reason == "queue_full"
    assert caught.value.retry_after_s == 3.0
    queue.close()
    with pytest.raises(Refused, match="shutting down"):
        queue.submit(ticket(3))
    assert len(take(queue)) == 1  # what waits is still served


def test_late_and_cancelled_requests_free_their_user() -> None:
    clock = Clock()
    queue = BatchQueue(16, clock)
    late, cancelled, good = ticket(1, deadline_s=5.0), ticket(1), ticket(1)
    for entry in (late, cancelled, good):
        queue.submit(entry)
    cancelled.cancelled = True
    clock.now_s = 6.0
    batch, expired = queue.take(8, 10**9, 0.0, 0.0)
    assert (batch, expired) == ([good], [late])
    assert queue.depth == 0


def test_a_waiting_batch_closes_when_it_is_full() -> None:
    queue = BatchQueue(16, time.perf_counter)
    taken: list[list[Ticket]] = []
    now_s = time.perf_counter()
    queue.submit(ticket(1, arrived_s=now_s))
    taker = threading.Thread(target=lambda: taken.append(queue.take(2, 10**9, 60.0, 60.0)[0]))
    taker.start()
    queue.submit(ticket(2, arrived_s=now_s))
    taker.join(timeout=30)
    assert not taker.is_alive()
    assert len(taken[0]) == 2


class QueueMachine(RuleBasedStateMachine):
    """Whatever comes when: per user one in flight, in order of arrival, nothing lost."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.queue = BatchQueue(12, self.clock)
        self.waiting: list[Ticket] = []
        self.flying: list[list[Ticket]] = []

    @rule(user=st.integers(0, 3), patience=st.sampled_from([1.0, 3.0, 1e9]))
    def submit(self, user: int, patience: float) -> None:
        entry = ticket(user, deadline_s=self.clock.now_s + patience)
        if len(self.waiting) >= 12:
            with pytest.raises(Refused):
                self.queue.submit(entry)
            return
        self.queue.submit(entry)
        self.waiting.append(entry)

    @rule(most=st.integers(1, 4))
    def take(self, most: int) -> None:
        batch, expired = self.queue.take(most, 10**9, 0.0, 0.0)
        busy = {t.request.user for flown in self.flying for t in flown} - {0}
        for entry in batch:
            user = entry.request.user
            assert user not in busy
            if user:
                busy.add(user)
            same = [t for t in self.waiting if t.request.user == user and t not in expired]
            assert not user or same[0] is entry
            assert entry.deadline_s > self.clock.now_s
        for entry in expired:
            assert entry.deadline_s <= self.clock.now_s
        for entry in batch + expired:
            self.waiting.remove(entry)
        if batch:
            self.flying.append(batch)

    @precondition(lambda self: self.flying)
    @rule()
    def finish(self) -> None:
        self.queue.release(self.flying.pop(0))

    @rule(seconds=st.floats(0.1, 2.0))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @invariant()
    def depth_is_what_waits(self) -> None:
        assert self.queue.depth == len(self.waiting)

    def teardown(self) -> None:
        for flown in self.flying:
            self.queue.release(flown)
        while self.waiting:
            batch, expired = self.queue.take(4, 10**9, 0.0, 0.0)
            assert batch or expired
            self.queue.release(batch)
            for entry in batch + expired:
                self.waiting.remove(entry)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
