"""When the next decision is due: absolute deadlines, so that no tick's lateness moves the next."""

from __future__ import annotations


class Pace:
    """Deadlines a fixed period apart, in nanoseconds of CLOCK_MONOTONIC."""

    def __init__(self, now_ns: int, period_ns: int) -> None:
        self.due_ns = now_ns + period_ns
        self.period_ns = period_ns
        self.missed = 0
        """Deadlines that had passed before anybody came to meet them."""

    def advance(self, now_ns: int) -> None:
        """To the next deadline of the same raster that lies ahead."""
        self.due_ns += self.period_ns
        behind = now_ns - self.due_ns
        if behind >= 0:
            skipped = behind // self.period_ns + 1
            self.missed += skipped
            self.due_ns += skipped * self.period_ns

    def change(self, now_ns: int, period_ns: int) -> None:
        """Another period: never a deadline later than one of it from now."""
        if period_ns == self.period_ns:
            return
        self.period_ns = period_ns
        self.due_ns = min(self.due_ns, now_ns + period_ns)
