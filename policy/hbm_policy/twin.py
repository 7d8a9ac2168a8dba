"""The twin: what every candidate α would cost on the requests that are being served.

One virtual (EMB, KV) pair per candidate sees the whole request stream. A pair decides its own KV
hit and then looks up the rows that *its* hit leaves over, so its curve does not depend on the α
the server runs at (a joint miniature simulation; independent miss curves of both caches would
misprice small KV, whose misses look up whole histories).

Rows are a hash sample of rate R (Waldspurger et al., SHARDS, FAST 2015); missed rows are sampled
misses / R, and the miss ratio sampled misses / (R x *all* accesses): dividing by the sampled
accesses instead makes hot rows inside or outside the sample move the curve.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.identity import ROW_ID_BITS, sample_threshold
from hbm_pool.contracts.records import (
    CURVES,
    MAX_CLASSES,
    MAX_CURVE_POINTS,
    CostModel,
    RequestSample,
    RowClass,
    ServerInfo,
)
from hbm_pool.host.tz_kernel import GHOST_HITS

from hbm_policy.class_division import DIVIDE_REQUESTS, ClassDivision
from hbm_policy.costs import CostConstants, usable
from hbm_policy.twin_kernel import (
    CANDIDATE_MISSES,
    COMPUTE_TOKENS,
    CONTEXT_TOKENS,
    COST,
    FIELDS,
    HISTORY_MISSES,
    KV_HITS,
    LOOKUPS,
    Scratch,
    Stream,
    allocate_scratch,
    simulate,
)
from hbm_policy.twin_rows import Rows, allocate_rows, resize_rows, sampled_slots
from hbm_policy.twin_users import allocate_users

ALPHA_STEP: Final = 0.05


class TwinError(ValueError):
    """A twin was asked for something that it cannot simulate."""


def default_alphas(low: float, high: float) -> list[float]:
    """Candidates on a grid of 0.05 over [low, high], both ends included."""
    steps = range(math.ceil(low / ALPHA_STEP - 1e-9), math.floor(high / ALPHA_STEP + 1e-9) + 1)
    grid = [round(step * ALPHA_STEP, 10) for step in steps]
    return sorted({low, *grid, high})


class Twin:
    """K virtual pairs. Make a new one when the server has a new boot epoch."""

    def __init__(
        self,
        info: ServerInfo,
        alphas: Sequence[float] | None = None,
        rate: float | None = None,
        *,
        window_requests: float = 32.0,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`alphas`: candidates, ascending, by default 0.05 apart within the server's bounds; each
        becomes the nearest whole number of extents. `rate`: share of rows that are simulated, at
        most the share that the server samples (the default). `window_requests`: after that many
        requests an old one counts for 37 %.

        Raises TwinError, with the value, for anything that cannot be simulated.
        """
        _check_info(info)
        if alphas is None:
            alphas = default_alphas(info.alpha_min, info.alpha_max)
        emb_extents = _emb_extents(info, alphas)
        rate = info.sample_rate if rate is None else rate
        if not 0.0 < rate <= info.sample_rate:
            raise TwinError(
                f"rate is {rate}; it must be above 0 and at most {info.sample_rate}, the share of "
                "rows that the server samples"
            )
        if not (math.isfinite(window_requests) and window_requests >= 1.0):
            raise TwinError(f"window_requests is {window_requests}; it must be at least 1")
        self.info = info
        self.rate = rate
        self.requests = 0
        """Simulated so far."""
        self.requests_lost = 0
        self.requests_refused = 0
        """Samples that contradict themselves; not simulated."""
        self._alpha = emb_extents / info.extents
        self._emb_extents = emb_extents
        self._window = window_requests
        self._clock_ns = clock_ns
        # The compiled loop is the same for any number of classes: the rest are empty ones.
        empty = RowClass(row_bytes=1, rows_per_extent=1, catalogue_rows=1, tables=())
        self._classes = (*info.classes, *([empty] * (MAX_CLASSES - len(info.classes))))
        self._divisions = [ClassDivision(info, int(extents)) for extents in emb_extents]
        self._rows: tuple[Rows, ...] = tuple(
            allocate_rows(
                each,
                np.array([division.extents[index] for division in self._divisions]),
                int(emb_extents.max()),
                rate,
            )
            if index < len(info.classes)
            else allocate_rows(each, np.full_like(emb_extents, 2), 2, 1.0)
            for index, each in enumerate(self._classes)
        )
        self._users = allocate_users(
            info.extents - emb_extents,
            info.pages_per_extent,
            -(-info.max_sequence_tokens // (info.page_tokens * info.pages_per_extent)),
        )
        self._class_of_table = _class_of_table(info)
        self._looked_up = np.zeros((len(emb_extents), MAX_CLASSES))
        self._missed = np.zeros((len(emb_extents), MAX_CLASSES))
        self._counted = np.zeros((3, len(emb_extents), len(info.classes)))
        # What had been offered when the caches were last cold.
        self._cold_kv = np.zeros(len(emb_extents))
        self._cold_emb = np.zeros((len(emb_extents), len(info.classes)))
        self._sums = np.zeros((len(emb_extents), FIELDS))
        self._weight = np.zeros(1)
        self._scratch = allocate_scratch(len(emb_extents), 1024)
        self._costs: CostConstants | None = None

    @property
    def alphas(self) -> tuple[float, ...]:
        """Candidates, as whole extents allow them."""
        return tuple(self._alpha.tolist())

    def feed(
        self,
        samples: Sequence[RequestSample],
        lost: int,
        costs: CostConstants,
    ) -> None:
        """Simulates requests in order.

        `lost`: requests that went by unseen before these. Means are over requests that were seen,
        so a loss biases them only through what the virtual caches did not see: old evidence fades
        and trust falls as if the lost requests had been there.

        Raises TwinError for constants that cannot price anything, or a negative loss.
        """
        if not usable(costs):
            raise TwinError(f"cost constants {costs} cannot price a request")
        if lost < 0:
            raise TwinError(f"{lost} requests lost; it must be 0 or more")
        self._costs = costs
        if lost:
            self._lose(lost)
        sound = [sample for sample in samples if self._is_sound(sample)]
        self.requests_refused += len(samples) - len(sound)
        # The division among the classes is looked at after the same requests, however they come.
        at = 0
        while at < len(sound):
            until = at + DIVIDE_REQUESTS - self.requests % DIVIDE_REQUESTS
            self._simulate(sound[at:until], costs)
            at = until
            if len(self.info.classes) > 1 and self.requests % DIVIDE_REQUESTS == 0:
                self._divide_anew()

    def _simulate(self, samples: Sequence[RequestSample], costs: CostConstants) -> None:
        row_ms = np.zeros(MAX_CLASSES)
        row_ms[: len(costs.row_ms)] = costs.row_ms
        info = self.info
        simulate(
            self._rows,
            self._users,
            _stream(samples),
            self._class_of_table,
            info.page_tokens,
            info.kv_eviction == "tail",
            np.uint64(sample_threshold(self.rate)),
            self.rate < info.sample_rate,
            self.rate,
            np.array([costs.fixed_ms, costs.token_ms, costs.token_context_ms]),
            row_ms,
            info.cost_model == CostModel.OVERLAP,
            math.exp(-1.0 / self._window),
            self._looked_up,
            self._missed,
            self._sums,
            self._weight,
            self._scratch_for(samples),
        )
        self.requests += len(samples)

    def curves(self, into: npt.NDArray[Any]) -> None:
        """Fills one record of dtype CURVES but for its boot epoch. Costs are by the newest
        constants for a serial server; an overlapped one's maximum is taken request by request."""
        if into.dtype != CURVES or into.size != 1:
            raise TwinError(f"curves go into one record of dtype CURVES, not {into.dtype}")
        points = len(self._alpha)
        means = self._sums / max(float(self._weight[0]), 1e-300)
        rows_missed = means[:, HISTORY_MISSES:CANDIDATE_MISSES]
        rows_missed = (rows_missed + means[:, CANDIDATE_MISSES:][:, :MAX_CLASSES]) / self.rate
        cost_ms = means[:, COST]
        if self._costs is not None and self.info.cost_model == CostModel.SERIAL:
            cost_ms = self._serial_ms(means, rows_missed, self._costs)
        lookups = means[:, LOOKUPS]
        into["monotonic_ns"] = self._clock_ns()
        into["points"] = points
        into["requests"] = self.requests
        into["window_requests"] = round(float(self._weight[0]))
        into["requests_lost"] = self.requests_lost
        into["warm"] = self.warm
        for name, column in (
            ("alpha", self._alpha),
            ("cost_ms", cost_ms),
            ("compute_tokens", means[:, COMPUTE_TOKENS]),
            ("context_tokens", means[:, CONTEXT_TOKENS]),
            ("rows_missed", rows_missed),
            ("kv_hit_ratio", means[:, KV_HITS]),
            (
                "emb_miss_ratio",
                np.divide(
                    rows_missed.sum(axis=1), lookups, out=np.zeros(points), where=lookups > 0.0
                ),
            ),
        ):
            into[name][...] = 0.0
            into[name][:points] = column

    @property
    def warm(self) -> float:
        """Share of the virtual caches that is warm, mean over the candidates' weaker side.

        A cache is warm when it was offered as much as it holds, even if it did not fill up: what
        hits all the time would not fill it later either.
        """
        kv, emb = self._warmth()
        slots = np.stack([each.slots for each in self._rows[: len(self.info.classes)]], axis=1)
        kv_share = kv / np.maximum(self._users.capacity, 1)
        return float(np.minimum(kv_share, (emb / slots).min(axis=1)).clip(0.0, 1.0).mean())

    def _warmth(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """What the caches were offered since they were cold, at most what they hold: extents of
        KV `[K]`, rows by class `[K, classes]`."""
        rows = self._rows[: len(self.info.classes)]
        slots = np.stack([each.slots for each in rows], axis=1)
        kv = np.minimum(self._users.offered - self._cold_kv, self._users.capacity)
        emb = np.minimum(self._looked_up[:, : len(rows)] - self._cold_emb, slots)
        return kv, emb

    def _serial_ms(
        self,
        means: npt.NDArray[np.float64],
        rows_missed: npt.NDArray[np.float64],
        costs: CostConstants,
    ) -> npt.NDArray[np.float64]:
        row_ms = np.zeros(MAX_CLASSES)
        row_ms[: len(costs.row_ms)] = costs.row_ms
        cost_ms: npt.NDArray[np.float64] = (
            costs.fixed_ms
            + costs.token_ms * means[:, COMPUTE_TOKENS]
            + costs.token_context_ms * means[:, CONTEXT_TOKENS]
            + rows_missed @ row_ms
        )
        return cost_ms

    def _lose(self, lost: int) -> None:
        self.requests_lost += lost
        fade = math.exp(-lost / self._window)
        self._sums *= fade
        self._weight *= fade
        # What the lost requests would have brought in is missing in the caches.
        kv, emb = self._warmth()
        each = lost / max(self.requests, 1)
        kv = np.maximum(kv - each * self._users.offered, 0.0)
        looked_up = self._looked_up[:, : len(self.info.classes)]
        emb = np.maximum(emb - each * looked_up, 0.0)
        self._cold_kv = self._users.offered - kv
        self._cold_emb = looked_up - emb

    def _scratch_for(self, samples: Sequence[RequestSample]) -> Scratch:
        longest = max(len(each.history_keys) + len(each.candidate_keys) for each in samples)
        if longest > len(self._scratch.missed):
            self._scratch = allocate_scratch(len(self._alpha), 2 * longest)
        return self._scratch

    def _is_sound(self, sample: RequestSample) -> bool:
        info = self.info
        return (
            0 <= sample.history_tokens <= info.max_sequence_tokens
            and sample.candidates >= 0
            and 0 <= sample.history_rows_total <= sample.rows_total
            and len(sample.page_fingerprints) == sample.history_tokens // info.page_tokens
            and len(sample.history_keys) == len(sample.history_positions)
        )

    def _divide_anew(self) -> None:
        """Every candidate moves extents between its classes as the pool would."""
        classes = len(self.info.classes)
        ghosts = np.stack(
            [rows.caches.state[:, GHOST_HITS] for rows in self._rows[:classes]], axis=1
        )
        counted = np.stack([self._looked_up[:, :classes], self._missed[:, :classes], ghosts])
        recent = (counted - self._counted) / self.rate
        self._counted = counted
        for k, division in enumerate(self._divisions):
            looked_up, missed, ghost_hits = recent[:, k].tolist()
            division.count(looked_up, missed, ghost_hits)
            change = division.rebalance(DIVIDE_REQUESTS)
            if change is None:
                continue
            for index in np.argsort(change):
                per_extent = self.info.classes[index].rows_per_extent * self.rate
                extents = np.array([division.extents[index]])
                resize_rows(self._rows[index], k, int(sampled_slots(extents, per_extent)[0]))


def _check_info(info: ServerInfo) -> None:
    if not 1 <= len(info.classes) <= MAX_CLASSES:
        raise TwinError(f"the server has {len(info.classes)} row classes; 1 to {MAX_CLASSES} work")
    if not 0.0 <= info.alpha_min <= info.alpha_max <= 1.0:
        raise TwinError(f"the server's bounds of α are {info.alpha_min} and {info.alpha_max}")
    if not 0.0 < info.sample_rate <= 1.0:
        raise TwinError(f"the server samples {info.sample_rate} of its rows; it must be in (0, 1]")
    for name in ("extents", "page_tokens", "pages_per_extent", "max_sequence_tokens"):
        if getattr(info, name) < 1:
            raise TwinError(f"the server's {name} is {getattr(info, name)}; it must be at least 1")


def _emb_extents(info: ServerInfo, alphas: Sequence[float]) -> npt.NDArray[np.int64]:
    """EMB extents of the candidates, as the pool would round them; doubles are left out."""
    if not 1 <= len(alphas) <= MAX_CURVE_POINTS:
        raise TwinError(f"{len(alphas)} candidates; there must be 1 to {MAX_CURVE_POINTS}")
    if not all(0.0 <= alpha <= 1.0 for alpha in alphas):
        raise TwinError(f"candidates {list(alphas)} are not all within 0..1")
    if any(right <= left for left, right in pairwise(alphas)):
        raise TwinError(f"candidates {list(alphas)} are not in ascending order")
    low = math.ceil(info.alpha_min * info.extents - 1e-9)
    high = math.floor(info.alpha_max * info.extents + 1e-9)
    rounded = np.round(np.array(alphas) * info.extents).astype(np.int64)
    return np.unique(np.clip(rounded, low, max(low, high)))


def _class_of_table(info: ServerInfo) -> npt.NDArray[np.int64]:
    """Width class by table index."""
    tables = 1 + max((table for each in info.classes for table in each.tables), default=0)
    class_of = np.zeros(tables, np.int64)
    for index, each in enumerate(info.classes):
        class_of[list(each.tables)] = index
    if tables > 1 << (64 - ROW_ID_BITS):
        raise TwinError(f"{tables} tables do not fit a row key")
    return class_of


def _stream(samples: Sequence[RequestSample]) -> Stream:
    """Samples as flat arrays."""
    head = np.array(
        [
            (
                each.user,
                each.history_tokens,
                each.candidates,
                each.rows_total,
                each.history_rows_total,
                len(each.page_fingerprints),
                len(each.history_keys),
                len(each.candidate_keys),
            )
            for each in samples
        ],
        dtype=np.int64,
    )
    return Stream(
        head=head,
        fingerprints=np.concatenate([each.page_fingerprints for each in samples]),
        history_keys=np.concatenate([each.history_keys for each in samples]),
        history_positions=np.concatenate([each.history_positions for each in samples]),
        candidate_keys=np.concatenate([each.candidate_keys for each in samples]),
    )
