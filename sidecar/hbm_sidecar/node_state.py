"""From telemetry to `NodeState`: load and measured costs of a node over a sliding window."""

from __future__ import annotations

import math
from collections import deque
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.digest import NODE_SCHEMA, NodeState
from hbm_pool.contracts.records import ServerInfo

WINDOW_S: Final = 5.0
MIN_REQUESTS: Final = 16
"""Fewer requests than this say nothing: the ratios of the window before stay."""


class Rates(NamedTuple):
    """Ratios of one window."""

    service_ms: float
    rows_per_token: float
    emb_miss_ratio: float
    cost_row_ms: float
    kv_hit_ratio: float = math.nan
    """Share of history tokens whose KV was reused; NaN: no history seen."""
    emb_hit_ratio: float = math.nan
    """Share of row lookups that hit; NaN: no lookup seen."""


NO_RATES: Final = Rates(0.0, 0.0, 0.0, 0.0)


class RateWindow:
    """Differences of telemetry over the last `WINDOW_S` seconds."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_ns = int(window_s * 1e9)
        self._samples: deque[npt.NDArray[np.void]] = deque()
        self.rates = NO_RATES

    def add(self, telemetry: npt.NDArray[np.void]) -> Rates:
        """Take one telemetry record, `()` of dtype TELEMETRY; another boot starts anew."""
        samples = self._samples
        if samples and samples[-1]["boot_epoch"] != telemetry["boot_epoch"]:
            samples.clear()
            self.rates = NO_RATES
        if samples and samples[-1]["monotonic_ns"] == telemetry["monotonic_ns"]:
            return self.rates
        samples.append(telemetry.copy())
        horizon = int(telemetry["monotonic_ns"]) - self._window_ns
        while len(samples) > 2 and int(samples[1]["monotonic_ns"]) <= horizon:
            samples.popleft()
        self.rates = _rates(samples[0], telemetry, self.rates)
        return self.rates


def _rates(old: npt.NDArray[np.void], new: npt.NDArray[np.void], before: Rates) -> Rates:
    """Ratios between two records of one boot; `before` where too little happened."""

    def grown(field: str) -> float:
        return float(new[field]) - float(old[field])

    requests = grown("requests")
    if requests < MIN_REQUESTS:
        return before._replace(cost_row_ms=before.cost_row_ms or float(np.max(new["cost_row_ms"])))
    tokens = grown("kv_tokens_computed") + grown("candidate_tokens")
    history = grown("kv_tokens_reused") + grown("kv_tokens_computed")
    accesses = grown("emb_accesses")
    missed = new["class_misses"].astype(np.float64) - old["class_misses"].astype(np.float64)
    all_missed = float(missed.sum())
    weighted = float(missed @ new["cost_row_ms"])
    return Rates(
        service_ms=grown("service_ms") / requests,
        rows_per_token=accesses / tokens if tokens > 0 else before.rows_per_token,
        emb_miss_ratio=grown("emb_misses") / accesses if accesses > 0 else before.emb_miss_ratio,
        cost_row_ms=weighted / all_missed if all_missed > 0 else before.cost_row_ms,
        kv_hit_ratio=grown("kv_tokens_reused") / history if history > 0 else before.kv_hit_ratio,
        emb_hit_ratio=grown("emb_hits") / accesses if accesses > 0 else before.emb_hit_ratio,
    )


def node_state(
    telemetry: npt.NDArray[np.void],
    info: ServerInfo,
    rates: Rates,
    *,
    name: str,
    url: str,
    sequence: int,
    unix_ms: int,
    digest_sequence: int,
    digest_crc: int,
) -> NodeState:
    """The heartbeat of a node. `telemetry`: `()` of dtype TELEMETRY."""
    return NodeState(
        schema=NODE_SCHEMA,
        name=name,
        url=url,
        boot_epoch=int(telemetry["boot_epoch"]),
        sequence=sequence,
        heartbeat_unix_ms=unix_ms,
        alpha=float(telemetry["alpha"]),
        queue_depth=int(telemetry["queue_depth"]),
        queue_ms=float(telemetry["queue_ms"]),
        service_ms=rates.service_ms,
        cost_fixed_ms=float(telemetry["cost_fixed_ms"]),
        cost_token_ms=float(telemetry["cost_token_ms"]),
        cost_token_context_ms=float(telemetry["cost_token_context_ms"]),
        cost_row_ms=rates.cost_row_ms,
        rows_per_token=rates.rows_per_token,
        emb_miss_ratio=rates.emb_miss_ratio,
        page_tokens=info.page_tokens,
        draining=bool(telemetry["draining"]),
        digest_sequence=digest_sequence,
        digest_crc=digest_crc,
        model=info.model,
        model_version=int(telemetry["model_version"]),
    )
