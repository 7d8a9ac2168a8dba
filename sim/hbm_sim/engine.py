"""One simulated node: production rules over a sample of rows, at the speed of compiled code."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_policy.twin_users import FREE_SLOTS, allocate_users
from hbm_pool.contracts.records import MAX_CLASSES, TELEMETRY, CostModel
from hbm_pool.host import recent_counts, replacement

from hbm_sim import engine_moves as at
from hbm_sim.engine_kernel import Outcome, Requests, empty_outcome, serve
from hbm_sim.engine_moves import NodeArrays
from hbm_sim.lru_kernel import allocate_lru
from hbm_sim.node_spec import NodeSpec, RowRule
from hbm_sim.stream import Stream

LATENCY_WINDOW: Final = 1024
"""Requests behind the percentiles that telemetry states."""
LIST_REQUESTS: Final = 64
"""Requests between two looks for rows to refill, once all of the last look are resident."""
NOW: Final = math.inf
_FIELDS: Final = TELEMETRY.names or ()


class EngineError(ValueError):
    """A node that cannot be simulated; the message says what to change."""


class Resident(NamedTuple):
    """Users with reusable KV."""

    users: npt.NDArray[np.int64]  # [n]
    tokens: npt.NDArray[np.int64]  # [n]


class EngineNode:
    """One node from cold, at `alpha` until a command changes it."""

    def __init__(
        self,
        spec: NodeSpec,
        alpha: float,
        rate: float,
        rows: RowRule = "tz",
        *,
        sampled_rows: int | None = None,
    ) -> None:
        """`rate`: share of rows in the streams it will serve; `sampled_rows`: their number, by
        default as expected of the rate (a longer stream raises). `rows`: replacement rule; at
        rate 1 TZ runs over whole extents, as in the pool.

        Raises EngineError for what cannot be simulated.
        """
        if len(spec.info.classes) != 1:
            raise EngineError(
                f"the node has {len(spec.info.classes)} row width classes; the compiled engine "
                "simulates one (hbm_sim.Node simulates several, at rate 1)"
            )
        if not 0.0 < rate <= 1.0:
            raise EngineError(f"rate is {rate}; it must be above 0 and at most 1")
        if not 0.0 <= alpha <= 1.0:
            raise EngineError(f"alpha is {alpha}; it must be in 0..1")
        self.spec = spec
        self.rate = rate
        self.rows = rows
        self.generation = 0
        """Commands taken over."""
        self.boot_epoch = 1
        self.outcome: Outcome | None = None
        self._sampled_rows = sampled_rows
        self._stream: Stream | None = None
        self._requests: Requests | None = None
        self._queue: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._position = 0
        self._percentiles_at = -LATENCY_WINDOW
        self._known_percentiles = (0.0, 0.0, 0)
        self._begin(self._extents(alpha))

    def _begin(self, extents: int) -> None:
        info, rate = self.spec.info, self.rate
        row_class = info.classes[0]
        expected = row_class.catalogue_rows * rate
        rows = self._sampled_rows or math.ceil(expected + 6.0 * expected**0.5 + 16.0)
        whole_extents = rate >= 1.0 and self.rows == "tz"
        per_extent = 1.0 if whole_extents else row_class.rows_per_extent * rate
        units = round(info.extents * per_extent)
        held = round(extents * per_extent)
        tz = replacement.allocate(
            rows if self.rows == "tz" else 1,
            units if self.rows == "tz" else 1,
            row_class.rows_per_extent if whole_extents else 1,
        )
        lru = allocate_lru(rows if self.rows == "lru" else 0, held)
        kv_extents = info.extents - math.floor(info.alpha_min * info.extents)
        kv_extents = max(kv_extents, info.extents - extents)
        users = allocate_users(
            np.array([kv_extents]),
            info.pages_per_extent,
            -(-info.max_sequence_tokens // (info.page_tokens * info.pages_per_extent)),
        )
        users.capacity[0] = info.extents - extents
        spare = np.arange(units - 1, -1, -1, dtype=np.int32)
        if self.rows == "tz":
            replacement.grow(tz, np.arange(held, dtype=np.int32))
        slots = units * (row_class.rows_per_extent if whole_extents else 1)
        per_slice = self.spec.slice_rows * (1.0 if whole_extents else rate)
        slice_units = min(max(1, round(per_slice)), slots)
        self._arrays = NodeArrays(
            tz=tz,
            lru=lru,
            users=users,
            spare=spare,
            whole=np.zeros(at.WHOLE, np.int64),
            real=np.zeros(at.REAL),
            fixed=np.zeros(at.FIXED),
            heat=np.zeros(rows, np.float32),
            hottest=np.empty(0, np.int32),
            stamp=np.zeros(rows, np.int64),
            missed=np.empty(1 << 16, np.int32),
            prints=np.empty(info.max_sequence_tokens // info.page_tokens + 1, np.uint32),
            cached=np.zeros(1, np.int64),
            copies=np.empty((3, slice_units + 1), np.int64),
            released=np.empty(units + 1, np.int32),
        )
        # The order of ids says nothing about their heat; here it would.
        self._order = np.random.default_rng(0).permutation(rows)
        self._listed = -LIST_REQUESTS
        whole = self._arrays.whole
        whole[at.TARGET] = whole[at.EXTENTS] = extents
        whole[at.UNITS] = held
        whole[at.SPARE] = units - held
        self._fix(per_extent, slice_units)

    def _fix(self, per_extent: float, slice_units: int) -> None:
        spec, info, fixed = self.spec, self.spec.info, self._arrays.fixed
        row_bytes = info.classes[0].row_bytes
        link = spec.link_bytes_per_s / 1e3
        for place, value in (
            (at.UNITS_PER_EXTENT, per_extent),
            (at.SLICE_UNITS, slice_units),
            (at.GROWTH_EXTENTS, spec.growth_extents),
            (at.ALL_EXTENTS, info.extents),
            (at.RATE, self.rate),
            (at.ROW_BYTES, row_bytes),
            (at.LINK, link),
            (at.FIXED_MS, spec.costs.fixed_ms),
            (at.TOKEN_MS, spec.costs.token_ms),
            (at.CONTEXT_MS, spec.costs.token_context_ms),
            (at.ROW_MS, spec.costs.row_ms[0]),
            (at.CAUSAL, spec.context == "causal"),
            (at.OVERLAP, info.cost_model == CostModel.OVERLAP),
            (at.PAGE_TOKENS, info.page_tokens),
            (at.TRIMS, info.kv_eviction == "tail"),
            (at.SLICE_MS, spec.slice_ms),
            (at.IDLE_SLICE_MS, spec.idle_slice_ms),
            (at.COPY_MS, spec.refill_copy_bytes / link),
            (at.QUEUE_LIMIT, spec.queue_limit),
            (at.LRU, self.rows == "lru"),
            (at.SLO_MS, info.slo_ms),
        ):
            fixed[place] = value

    def _extents(self, alpha: float) -> int:
        info = self.spec.info
        least = math.ceil(info.alpha_min * info.extents - 1e-9)
        most = math.floor(info.alpha_max * info.extents + 1e-9)
        return min(max(round(alpha * info.extents), least), max(least, most))

    # -- what it is told -------------------------------------------------------------------------

    def command(
        self,
        alpha: float,
        refill_bytes_per_s: float = 0.0,
        drop_only: bool = False,
        generation: int | None = None,
    ) -> None:
        """Aim at another α from the next batch boundary on, and refill at that rate.

        `generation`: what telemetry says of it; None: one more than that of the command before.

        Raises EngineError for an α or a rate that is not a number in range.
        """
        if not 0.0 <= alpha <= 1.0 or not 0.0 <= refill_bytes_per_s < math.inf:
            raise EngineError(
                f"commanded alpha {alpha} and refill {refill_bytes_per_s} bytes/s; α must be in "
                "0..1, the rate 0 or more"
            )
        whole, real = self._arrays.whole, self._arrays.real
        target = self._extents(alpha)
        if target != whole[at.TARGET]:
            whole[at.TARGET] = target
            whole[at.MOVING] = 1
            whole[at.DROP_ONLY] = drop_only
        elif whole[at.MOVING] and generation != self.generation:
            whole[at.DROP_ONLY] = drop_only
        self.generation = self.generation + 1 if generation is None else generation
        real[at.REFILL_RATE] = refill_bytes_per_s / 1e3
        if refill_bytes_per_s > 0.0:
            self._choose_refill()

    def restart(self) -> None:
        """The server dies and comes back at its α: caches, counters and commands are gone."""
        real = self._arrays.real
        free = real[at.GATHER_FREE], real[at.COMPUTE_FREE]
        position = self._position
        self._begin(int(self._arrays.whole[at.EXTENTS]))
        self._arrays.real[at.GATHER_FREE], self._arrays.real[at.COMPUTE_FREE] = free
        self._arrays.whole[at.OLDEST] = position
        self.generation = 0
        self.boot_epoch += 1

    def _choose_refill(self) -> None:
        """Rows worth a copy, as the pool's sweep over its counts gives them; absent ones are told
        apart when copied."""
        arrays, whole = self._arrays, self._arrays.whole
        slots = self.spec.info.extents * self._rows_per_extent
        rows = self.spec.info.classes[0].catalogue_rows
        direct = rows <= recent_counts.DIRECT_ROWS_PER_SLOT * slots
        places = rows if direct else min(recent_counts.MAX_PLACES, 2 * slots)
        if whole[at.NOTED] > recent_counts.HALF_LIFE * places * self.rate:
            np.floor(arrays.heat * 0.5, out=arrays.heat)
            whole[at.NOTED] = 0
        if at.unused_rows(arrays) == 0:
            whole[at.REFILL_AT] = len(arrays.hottest)
            return
        served = int(whole[at.REQUESTS])
        if whole[at.REFILL_AT] < len(arrays.hottest) or served < self._listed + LIST_REQUESTS:
            return
        self._listed = served
        order = self._order
        if not direct:
            warm = np.flatnonzero(arrays.heat >= recent_counts.LEVELS[-1])
            hottest = np.argsort(-arrays.heat[warm], kind="stable")
            order = np.sort(warm[hottest[: max(1, int(places * self.rate))]])
        heat = arrays.heat[order]
        above = [heat >= level for level in recent_counts.LEVELS]
        turns = [above[0], *(new & ~old for old, new in pairwise(above))]
        chosen = np.concatenate([order[turn] for turn in turns])
        self._arrays = arrays._replace(hottest=chosen.astype(np.int32))
        whole[at.REFILL_AT] = 0

    @property
    def _rows_per_extent(self) -> int:
        return self.spec.info.classes[0].rows_per_extent

    # -- serving ---------------------------------------------------------------------------------

    def attach(self, stream: Stream) -> None:
        """The stream whose requests come next; `outcome` is made anew for it.

        Raises EngineError when it was sampled at another rate or holds other rows.
        """
        if stream is self._stream:
            return
        if stream.rate != self.rate:
            raise EngineError(f"the stream has rate {stream.rate}, the node {self.rate}")
        if len(stream.row_keys) > len(self._arrays.stamp):
            raise EngineError(
                f"the stream has {len(stream.row_keys)} sampled rows, the node room for "
                f"{len(self._arrays.stamp)}; give sampled_rows={len(stream.row_keys)}"
            )
        most = int((np.diff(stream.history_at) + np.diff(stream.candidate_at)).max(initial=0))
        if most > len(self._arrays.missed):
            self._arrays = self._arrays._replace(missed=np.empty(most, np.int32))
        n = len(stream)
        self.outcome = empty_outcome(n)
        self._stream = stream
        self._requests = Requests(*(getattr(stream, name) for name in Requests._fields))
        self._queue = np.arange(n, dtype=np.int64)
        self._position = 0
        self._percentiles_at = -LATENCY_WINDOW
        self._arrays.whole[at.OLDEST] = 0
        self._arrays.whole[at.WAITING] = 0

    def serve(self, stream: Stream, begin: int, end: int) -> None:
        """Requests [begin, end) of a stream, whenever they begin. `outcome` says what became of
        them. Streams are served from their start, in order."""
        self.attach(stream)
        if begin != self._position:
            raise EngineError(f"requests from {self._position} on come next, not from {begin}")
        self._run(end, NOW)

    def advance(self, stream: Stream, until_s: float) -> int:
        """Serves what begins before a moment of the stream. -> the first request that does not."""
        self.attach(stream)
        arrived = int(np.searchsorted(stream.arrival_s, until_s))
        self._run(arrived, until_s * 1e3)
        return self._position

    def join(self, stream: Stream, outcome: Outcome) -> None:
        """One node of several that serve one stream: which requests are its own, `take` says.
        What becomes of them goes into the given outcome of the whole stream."""
        self.attach(stream)
        self.outcome = outcome
        self._queue = np.empty(1024, np.int64)

    def take(self, request: int) -> None:
        """The next request of a joined stream that is this node's: it begins when the ones before
        are done, by the splits of now."""
        if self._position == len(self._queue):
            self._queue = np.concatenate([self._queue, np.empty_like(self._queue)])
        self._queue[self._position] = request
        self._run(self._position + 1, NOW)

    def _run(self, end: int, until_ms: float) -> None:
        assert self._requests is not None
        assert self.outcome is not None
        if self._position < end:
            self._position = serve(
                self._arrays,
                self._requests,
                self._queue,
                self._position,
                end,
                until_ms,
                self.outcome,
            )

    # -- what it says ----------------------------------------------------------------------------

    @property
    def alpha(self) -> float:
        """Applied: EMB extents ÷ all extents."""
        return int(self._arrays.whole[at.EXTENTS]) / self.spec.info.extents

    @property
    def position(self) -> int:
        """First request of the stream that has not begun."""
        return self._position

    def backlog_ms(self, time_s: float) -> float:
        """How long a request that comes at that moment would wait."""
        place = at.COMPUTE_FREE
        if self.spec.info.cost_model == CostModel.OVERLAP:
            place = at.GATHER_FREE
        return max(0.0, float(self._arrays.real[place]) - time_s * 1e3)

    @property
    def moving(self) -> bool:
        """A planned move is under way."""
        return bool(self._arrays.whole[at.MOVING])

    def count(self, place: int) -> int:
        """One of the whole-number counters of `engine_moves`."""
        return int(self._arrays.whole[place])

    @property
    def moved_bytes(self) -> int:
        """Extents that changed sides, in bytes."""
        return self.count(at.MOVED_EXTENTS) * self.spec.info.extent_bytes

    @property
    def refill_bytes(self) -> float:
        return self.count(at.REFILLED) / self.rate * self.spec.info.classes[0].row_bytes

    @property
    def foreground_bytes(self) -> float:
        return self.count(at.MISSED) / self.rate * self.spec.info.classes[0].row_bytes

    @property
    def critical_share(self) -> float:
        """Share of the requests' copies that waited for a copy of the refiller."""
        return self.count(at.CRITICAL) / max(1, self.count(at.COPIES))

    def residents(self) -> Resident:
        """Users whose KV can be reused, and how many tokens of it."""
        users = self._arrays.users
        pages = users.pages[:, 0].astype(np.int64)
        held = np.flatnonzero((users.holders > 0) & (pages > 0))
        return Resident(users.name[held].copy(), pages[held] * self.spec.info.page_tokens)

    def check_integrity(self) -> list[str]:
        """What is wrong inside; empty when all is well. For tests."""
        arrays, info = self._arrays, self.spec.info
        found = replacement.violations(arrays.tz) if self.rows == "tz" else []
        used = int(arrays.users.held.sum())
        if used != arrays.users.used[0] or used > arrays.users.capacity[0]:
            found.append(
                f"kv: users hold {used} extents, {arrays.users.used[0]} are counted, "
                f"{arrays.users.capacity[0]} are allowed"
            )
        if arrays.users.capacity[0] + arrays.whole[at.EXTENTS] != info.extents:
            found.append("extents of KV and EMB do not add up")
        units = len(arrays.spare)
        if arrays.whole[at.UNITS] + arrays.whole[at.SPARE] != units:
            found.append(f"units held and spare do not add up to {units}")
        return found

    def telemetry(self, into: npt.NDArray[Any], now_ns: int = 0) -> None:
        """Fills one record of dtype TELEMETRY as the server would."""
        if into.dtype != TELEMETRY or into.size != 1:
            raise EngineError(
                f"telemetry goes into one record of dtype TELEMETRY, not {into.dtype}"
            )
        info, users = self.spec.info, self._arrays.users
        whole, real = self._arrays.whole.tolist(), self._arrays.real.tolist()
        scale = 1.0 / self.rate
        extents = whole[at.EXTENTS]
        kv_extents = int(users.used[0])
        missed, looked_up = int(whole[at.MISSED] * scale), int(whole[at.LOOKED_UP] * scale)
        costs = self.spec.declares()
        p50, p99, n = self._percentiles()
        values = {
            "monotonic_ns": now_ns,
            "boot_epoch": self.boot_epoch,
            "alpha": extents / info.extents,
            "alpha_target": whole[at.TARGET] / info.extents,
            "command_generation": self.generation,
            "extents_emb": extents,
            "extents_kv": kv_extents,
            "extents_free": info.extents - extents - kv_extents,
            "moving": whole[at.MOVING],
            "moves": whole[at.MOVES],
            "moved_extents": whole[at.MOVED_EXTENTS],
            "relocated_rows": int(whole[at.RELOCATED] * scale),
            "requests": whole[at.REQUESTS],
            "overloads": whole[at.REFUSED],
            "uncached_requests": whole[at.UNCACHED],
            "batches": whole[at.REQUESTS],
            "slo_met": whole[at.SLO_MET],
            "slo_total": whole[at.REQUESTS] + whole[at.REFUSED],
            "latency_p50_ms": p50,
            "latency_p99_ms": p99,
            "latency_n": n,
            "queue_depth": whole[at.WAITING],
            "queue_ms": real[at.WAITED],
            "kv_lookups": whole[at.REQUESTS] - whole[at.ANONYMOUS],
            "kv_hits": whole[at.KV_HITS],
            "kv_tokens_reused": whole[at.TOKENS_REUSED],
            "kv_tokens_computed": whole[at.TOKENS_COMPUTED],
            "candidate_tokens": whole[at.CANDIDATES],
            "context_tokens": whole[at.CONTEXT],
            "kv_users": len(users.free_slots) - int(users.counts[FREE_SLOTS]),
            "emb_accesses": looked_up,
            "emb_hits": looked_up - missed,
            "emb_misses": missed,
            "class_extents": _first(extents),
            "class_accesses": _first(looked_up),
            "class_misses": _first(missed),
            "timed_accesses": looked_up,
            "timed_misses": _first(missed),
            "gather_ms": real[at.GATHER],
            "compute_ms": real[at.COMPUTE],
            "service_ms": real[at.SERVICE],
            "foreground_bytes": int(self.foreground_bytes),
            "refill_bytes": int(self.refill_bytes),
            "refill_rows": int(whole[at.REFILLED] * scale),
            "cost_fixed_ms": costs.fixed_ms,
            "cost_token_ms": costs.token_ms,
            "cost_token_context_ms": costs.token_context_ms,
            "cost_row_ms": _first(costs.row_ms[0]),
        }
        # In one assignment: field by field costs ten times as much.
        into[...] = np.array(tuple([values.get(name, 0) for name in _FIELDS]), TELEMETRY)

    @property
    def link_busy_ms(self) -> float:
        """Time that the link to the device was in use so far."""
        return float(self._arrays.real[at.LINK_BUSY])

    def _percentiles(self) -> tuple[float, float, int]:
        """Of the newest requests; taken anew when a part of them is new, as they cost a sort."""
        if self.outcome is None or self._position == 0:
            return 0.0, 0.0, 0
        if self._position - self._percentiles_at < LATENCY_WINDOW // 32:
            return self._known_percentiles
        recent = self._queue[max(0, self._position - LATENCY_WINDOW) : self._position]
        latency_ms = np.sort(self.outcome.latency_ms[recent])
        n = len(latency_ms) - int(np.isnan(latency_ms).sum())  # NaN sorts last
        if n:
            ranks = [min(n - 1, math.ceil(share * n) - 1) for share in (0.5, 0.99)]
            p50, p99 = latency_ms[ranks].tolist()
            self._known_percentiles = p50, p99, n
        self._percentiles_at = self._position
        return self._known_percentiles


def _first(value: float) -> tuple[float, ...]:
    """A column by class of a node that has one."""
    return (value, *([0] * (MAX_CLASSES - 1)))
