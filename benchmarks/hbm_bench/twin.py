"""The twin on the standard node: µs per request, and the share of a core at saturation.

The node is that of the standard scenarios (60 GB pool, rows of 1 KiB, 16 KiB of KV per token,
histories of 8 k tokens) in their five regimes. Samples hold only the hash-sampled rows, as the
request ring brings them. Saturation: one over the node's mean service time at the best candidate,
by the scenario's own cost model. Requests are handed over as the sidecar does, up to 64 at once.
"""

from __future__ import annotations

import resource
import time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.identity import row_keys, sample_threshold, sampled
from hbm_pool.contracts.records import (
    CURVES,
    CostModel,
    RequestSample,
    RowClass,
    ServerInfo,
    TableMap,
)

EXTENT_BYTES = 2 << 20
PAGE_TOKENS = 32
TOKEN_BYTES = 16 << 10
ROW_BYTES = 1024
CATALOGUE = 50_000_000
FEATURES = 4
CANDIDATES = 512
NEW_TOKENS = 128
POOL_BYTES = 60_000_000_000
GATHER_BYTES_PER_S = 3e9
MAX_TOKENS = 16_384
FEED = 64


class Regime(NamedTuple):
    """One regime of the standard scenarios; the field names are theirs."""

    hot: float
    revisit: float
    distance: float
    zipf_s: float


REGIMES = {
    "R0": Regime(0.1, 0.1, 400, 0.65),
    "R1": Regime(0.3, 0.35, 250, 0.80),
    "R2": Regime(0.6, 0.6, 165, 0.95),
    "A": Regime(0.3, 0.6, 165, 0.9),
    "Bn": Regime(0.2, 0.05, 400, 0.65),
}


def standard_info(rate: float) -> ServerInfo:
    """Node "STD"."""
    return ServerInfo(
        node="std",
        model="std",
        extents=POOL_BYTES // EXTENT_BYTES,
        extent_bytes=EXTENT_BYTES,
        page_tokens=PAGE_TOKENS,
        pages_per_extent=EXTENT_BYTES // (PAGE_TOKENS * TOKEN_BYTES),
        max_sequence_tokens=MAX_TOKENS,
        drop_block_tokens=1024,
        tables=(TableMap("item", CATALOGUE, 0, False),),
        classes=(RowClass(ROW_BYTES, EXTENT_BYTES // ROW_BYTES, CATALOGUE, (0,)),),
        cost_model=CostModel.SERIAL,
        sample_rate=rate,
        alpha_min=0.1,
        alpha_max=0.9,
        slo_ms=80.0,
        device="cuda",
    )


class Stream:
    """Requests of one regime. A user's history is drawn once and grows by 128 per visit."""

    def __init__(self, info: ServerInfo, regime: Regime, seed: int) -> None:
        self._info = info
        self._regime = regime
        self._random = np.random.default_rng(seed)
        # Item of a rank: a multiplication modulo a prime near the catalogue scatters the hot ones.
        self._prime = 49_999_991
        exponent = 1.0 - regime.zipf_s
        self._power = 1.0 / exponent
        self._scale = float(CATALOGUE) ** exponent - 1.0
        self._lengths: dict[int, int] = {}
        self._users: list[int] = []
        self._one_offs = 1 << 32

    def take(self, count: int) -> list[RequestSample]:
        """The next `count` requests."""
        return [self._request() for _ in range(count)]

    def _user(self) -> int:
        regime, random = self._regime, self._random
        draw = random.random()
        back = int(regime.distance * np.exp(random.standard_normal())) + 1
        if draw < regime.revisit and back <= len(self._users):
            return self._users[-back]
        if draw < regime.revisit + (1.0 - regime.revisit) * regime.hot:
            return int(random.integers(1, 301))
        self._one_offs += 1
        return self._one_offs

    def _items(self, random: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        ranks = (1.0 + self._scale * random.random(count)) ** self._power
        items: npt.NDArray[np.int64] = (ranks.astype(np.int64) * 2_654_435_761) % self._prime
        return items

    def _request(self) -> RequestSample:
        user = self._user()
        self._users.append(user)
        known = self._lengths.get(user)
        own = np.random.default_rng([user, 7])
        first = int(np.clip(8192 * np.exp(0.5 * own.standard_normal()), 512, MAX_TOKENS))
        length = min(first if known is None else known + NEW_TOKENS, MAX_TOKENS)
        self._lengths[user] = length
        # Only what the hash sample keeps is made: the rest would be thrown away by the server.
        rate = self._info.sample_rate
        history, positions = self._sampled(own, MAX_TOKENS, rate, length)
        candidates, _ = self._sampled(self._random, CANDIDATES, rate, CANDIDATES)
        pages = length // PAGE_TOKENS
        prints = np.arange(pages, dtype=np.uint32) * np.uint32(2_654_435_761)
        return RequestSample(
            user=user,
            history_tokens=length,
            candidates=CANDIDATES,
            rows_total=FEATURES * (length + CANDIDATES),
            history_rows_total=FEATURES * length,
            page_fingerprints=prints ^ np.uint32(user & 0xFFFFFFFF),
            history_keys=history,
            history_positions=positions,
            candidate_keys=candidates,
        )

    def _sampled(
        self, random: np.random.Generator, tokens: int, rate: float, length: int
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        keys = row_keys(0, self._items(random, tokens * FEATURES))
        chosen = np.flatnonzero(sampled(keys, rate))
        positions = (chosen // FEATURES).astype(np.uint32)
        kept = positions < length
        return keys[chosen][kept], positions[kept]


def run(quick: bool, seed: int) -> dict[str, Any]:
    """Goal: at most 1 % of a core at the node's saturation rate."""
    from hbm_policy import CostConstants
    from hbm_policy.twin import Twin

    figures: dict[str, Any] = {"goal_share_of_core": 0.01}
    count = 256 if quick else 4096
    costs = CostConstants(1.2, 0.28e-3, 0.07e-3 / 1024, (ROW_BYTES / GATHER_BYTES_PER_S * 1e3,))
    for rate in (0.01, 0.003):
        assert sample_threshold(rate) > 0
        for name, regime in REGIMES.items():
            info = standard_info(rate)
            stream = Stream(info, regime, seed)
            twin = Twin(info)
            twin.feed(stream.take(FEED), 0, costs)
            taken_s = 0.0
            for _ in range(count // FEED):
                samples = stream.take(FEED)
                began = time.process_time()
                twin.feed(samples, 0, costs)
                taken_s += time.process_time() - began
            record = np.zeros((), CURVES)
            began = time.process_time()
            twin.curves(record)
            curves_us = (time.process_time() - began) * 1e6
            per_request_us = taken_s / count * 1e6
            service_ms = float(record["cost_ms"][: int(record["points"])].min())
            figures[f"rate_{rate:g}_{name}"] = {
                "n": count,
                "candidates": int(record["points"]),
                "us_per_request": per_request_us,
                "curves_us": curves_us,
                "warm": float(record["warm"]),
                "saturation_per_s": 1e3 / service_ms,
                "share_of_core": per_request_us / 1e6 * 1e3 / service_ms,
            }
    figures["rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures
