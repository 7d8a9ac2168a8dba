"""How far cached KV is behind the embedding rows it was computed from.

Pushed rows take effect in the EMB cache at once, but KV computed before holds the old values. Each
push is an epoch; KV remembers the epoch of its oldest page, and its lag is the time since the
first push after that epoch. It is reused up to `max_lag_s`; 0 is strict: any push voids it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class RowLag:
    """Push times of the epochs that may still matter. Guarded by the pool's lock."""

    def __init__(self, max_lag_s: float, clock_s: Callable[[], float]) -> None:
        self.max_lag_s = max_lag_s
        self.epoch = 0
        self._clock_s = clock_s
        self._pushed_s: deque[float] = deque()  # times of the newest pushes, oldest first

    def push(self) -> int:
        """Counts one push of rows; returns its epoch."""
        now = self._clock_s()
        self.epoch += 1
        self._pushed_s.append(now)
        # Times beyond the bound need not be told apart; one stays as the witness.
        while len(self._pushed_s) > 1 and now - self._pushed_s[1] > self.max_lag_s:
            self._pushed_s.popleft()
        return self.epoch

    def lag_s(self, epoch: int) -> float:
        """Seconds since the first push after `epoch`; 0 when there was none.

        A lower bound once it exceeds `max_lag_s`.
        """
        behind = self.epoch - epoch
        if behind <= 0:
            return 0.0
        first = len(self._pushed_s) - behind
        return self._clock_s() - self._pushed_s[max(0, first)]

    def lags_too_much(self, epoch: int) -> bool:
        """True when KV of that epoch must not be reused any more."""
        if epoch == self.epoch:
            return False
        return self.max_lag_s == 0.0 or self.lag_s(epoch) > self.max_lag_s

    def oldest_usable_epoch(self) -> int:
        """KV of this epoch and newer ones may be reused, older KV may not."""
        if self.max_lag_s == 0.0:
            return self.epoch
        oldest_s = self._clock_s() - self.max_lag_s
        usable = self.epoch - len(self._pushed_s)
        for pushed_s in self._pushed_s:
            if pushed_s >= oldest_s:
                break
            usable += 1
        return usable
