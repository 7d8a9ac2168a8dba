"""What an arm without a twin knows: the paper's seven signals, over the time since the last look.

Hot-user fraction, KV hit rate, EMB hit rate, mean history length, SLO violation rate, present α
and normalised P99 (arXiv 2605.04450). All lie around 0 to 1, so that nothing has to be learned anew
for another pool or SLO. Telemetry has no hot-user fraction: it is counted from the served requests.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

import numpy as np
import numpy.typing as npt

SIGNAL_NAMES: Final = (
    "hot_users",
    "kv_hit",
    "emb_hit",
    "history",
    "slo_missed",
    "alpha",
    "p99",
)
MAX_P99: Final = 4.0
"""P99 over the SLO is cut there: a collapsed queue says no more than "far too slow"."""
_COUNTERS: Final = (
    "requests",
    "slo_met",
    "slo_total",
    "kv_lookups",
    "kv_hits",
    "kv_tokens_reused",
    "kv_tokens_computed",
    "emb_accesses",
    "emb_hits",
    "overloads",
)


class Signals:
    """Differences of counters between two looks, and who asked."""

    def __init__(
        self, slo_ms: float, max_sequence_tokens: int, memory_requests: int = 4000
    ) -> None:
        """`memory_requests`: a user who asked within so many requests before is a hot one."""
        self._slo_ms = slo_ms
        self._max_tokens = max_sequence_tokens
        self._memory = memory_requests
        self._last_seen: OrderedDict[int, int] = OrderedDict()
        self._asked = 0
        self._seen = 0
        self._returned = 0
        self._before: dict[str, float] | None = None
        self._newest = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0])

    def count_users(self, users: npt.NDArray[np.int64]) -> None:
        """Users of served requests, in order."""
        last_seen = self._last_seen
        for user in users.tolist():
            asked = self._asked
            self._asked += 1
            self._seen += 1
            before = last_seen.pop(user, None)
            if before is not None and asked - before <= self._memory:
                self._returned += 1
            last_seen[user] = asked
        while last_seen and self._asked - next(iter(last_seen.values())) > self._memory:
            last_seen.popitem(last=False)

    def look(self, telemetry: Any) -> npt.NDArray[np.float64]:
        """Signals `[7]` since the last look, by `SIGNAL_NAMES`.

        `telemetry`: one record of dtype TELEMETRY. A signal nothing was counted for (no request, a
        counter that went back) keeps its last value.
        """
        now = {name: float(telemetry[name]) for name in _COUNTERS}
        before = self._before or dict.fromkeys(_COUNTERS, 0.0)
        self._before = now
        # A restarted server counts from 0 again.
        grown = {name: now[name] - before[name] for name in _COUNTERS}
        if min(grown.values()) < 0.0:
            grown = now
        newest = self._newest.copy()
        if self._seen:
            newest[0] = self._returned / self._seen
        self._seen = self._returned = 0
        _put(newest, 1, grown["kv_hits"], grown["kv_lookups"])
        _put(newest, 2, grown["emb_hits"], grown["emb_accesses"])
        tokens = grown["kv_tokens_reused"] + grown["kv_tokens_computed"]
        _put(newest, 3, tokens / self._max_tokens, grown["requests"])
        offered = grown["slo_total"] + grown["overloads"]
        _put(newest, 4, offered - grown["slo_met"], offered)
        for index, value in (
            (5, float(telemetry["alpha"])),
            (6, min(float(telemetry["latency_p99_ms"]) / self._slo_ms, MAX_P99)),
        ):
            if np.isfinite(value):
                newest[index] = value
        self._newest = newest
        return newest.copy()


def _put(signals: npt.NDArray[np.float64], index: int, part: float, whole: float) -> None:
    if whole > 0.0:
        signals[index] = min(max(part / whole, 0.0), 1.0)
