"""The link model on a clock of its own: nothing here sleeps."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hbm_pool.host.link import PUSH_BYTES, LinkModel


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.during_sleep: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        self.now_s += 1e-6  # so that spinning ends
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.during_sleep()
        self.now_s += seconds


def make(rate: float | None = 1e6, **options: float) -> tuple[LinkModel, Clock]:
    clock = Clock()
    return LinkModel(rate, clock_s=clock, sleep_s=clock.sleep, **options), clock


def test_without_rate_nothing_waits_and_all_is_counted() -> None:
    link, clock = make(None)
    before = clock.now_s
    assert link.foreground(1 << 30) == 0.0
    assert link.refill(5) == 0.0
    assert link.device_to_host(7) == 0.0
    assert clock.now_s - before < 1e-3
    counters = link.counters()
    assert (counters.foreground_bytes, counters.refill_bytes) == (1 << 30, 5)
    assert counters.device_to_host_bytes == 7
    assert counters.busy == 0.0


def test_copy_takes_bytes_by_rate() -> None:
    link, clock = make(1e6)
    before = clock.now_s
    assert link.foreground(50_000) == pytest.approx(0.05, rel=1e-3)
    assert clock.now_s - before == pytest.approx(0.05, rel=1e-2)
    assert link.counters().busy == pytest.approx(0.05, rel=0.02)


def test_copies_queue_behind_each_other() -> None:
    link, clock = make(1e6)
    took: list[float] = []

    def second() -> None:
        clock.during_sleep = lambda: None
        took.append(link.foreground(20_000))

    clock.during_sleep = second  # arrives while the first is on its way
    link.foreground(30_000)
    assert took[0] == pytest.approx(0.05, rel=1e-2)


def test_opposing_traffic_slows_copies_down() -> None:
    link, clock = make(1e6, opposing_factor=0.5)
    took: list[float] = []

    def against() -> None:
        clock.during_sleep = lambda: None
        took.append(link.foreground(10_000))

    clock.during_sleep = against
    link.device_to_host(200_000)
    assert took[0] == pytest.approx(0.02, rel=1e-2)
    clock.now_s += 1.0
    assert link.foreground(10_000) == pytest.approx(0.01, rel=1e-2)


def test_foreground_behind_a_refill_copy_is_counted_once() -> None:
    link, clock = make(1e6)

    def request() -> None:
        clock.during_sleep = lambda: None
        link.foreground(1_000)
        link.foreground(1_000)

    clock.during_sleep = request
    link.refill(10_000)
    link.foreground(1_000)
    assert link.counters().critical_refill_copies == 1
    assert link.counters().refill_copies == 1


def test_quiet_means_nobody_fetches_and_nothing_travels() -> None:
    link, clock = make(1e6)
    seen: list[bool] = []
    assert link.quiet
    with link.fetching():
        assert not link.quiet
    assert link.quiet
    clock.during_sleep = lambda: seen.append(link.quiet)
    link.foreground(10_000)
    link.device_to_host(10_000)
    assert seen
    assert not any(seen)
    assert link.quiet


def test_refill_waits_its_turn_in_one_step_with_looking() -> None:
    link, clock = make(1e6)
    with link.fetching():
        assert link.refill(10_000) is None
    taken: list[float | None] = []
    clock.during_sleep = lambda: taken.append(link.refill(10_000))
    link.foreground(1_000)
    link.device_to_host(1_000)
    assert taken == [None, None]
    assert link.counters().refill_copies == link.counters().refill_bytes == 0
    clock.during_sleep = lambda: None
    assert link.refill(10_000) == pytest.approx(0.01, rel=1e-2)


def test_a_request_that_comes_after_the_refill_copy_does_not_meet_it() -> None:
    link, _ = make(1e6)
    link.refill(10_000)
    link.begin_fetch()
    assert link.foreground(1_000) == pytest.approx(0.001, rel=1e-2)
    link.end_fetch()
    assert link.counters().critical_refill_copies == 0


def test_pushed_rows_let_a_request_in_between() -> None:
    link, clock = make(1e6)
    took: list[float] = []

    def request() -> None:
        clock.during_sleep = lambda: None
        took.append(link.foreground(1_000))

    clock.during_sleep = request
    link.push(10 * PUSH_BYTES)
    assert took[0] <= (PUSH_BYTES + 1_000) / 1e6 * 1.01
    assert link.counters().push_bytes == 10 * PUSH_BYTES
    assert link.counters().foreground_bytes == 1_000


def test_refill_runs_the_real_copy_and_clears_up_when_it_fails() -> None:
    link, _ = make(None)
    done: list[int] = []
    link.refill(3, lambda: done.append(1))
    assert done == [1]

    def fail() -> None:
        raise RuntimeError("no copy")

    with pytest.raises(RuntimeError, match="no copy"):
        link.refill(3, fail)
    link.foreground(1)
    assert link.counters().critical_refill_copies == 0


def test_busy_share_is_of_the_last_second() -> None:
    link, clock = make(1e6)
    for _ in range(10):
        link.foreground(50_000)
        clock.now_s += 0.05
    assert link.counters().busy == pytest.approx(0.5, abs=0.06)
    clock.now_s += 5.0
    assert link.counters().busy == 0.0


def test_many_threads_are_all_counted() -> None:
    link = LinkModel(None)
    threads = [
        threading.Thread(target=lambda: [link.foreground(10) for _ in range(500)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert link.counters().foreground_bytes == 4 * 500 * 10


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="link_bytes_per_s"):
        LinkModel(rate)


def test_impossible_factor_is_refused() -> None:
    with pytest.raises(ValueError, match="opposing_factor is 0"):
        LinkModel(1e9, opposing_factor=0.0)
    with pytest.raises(ValueError, match="device_to_host"):
        LinkModel(1e9, device_to_host_bytes_per_s=-1.0)
