"""What the server tells its sidecar, and the commands it takes back.

`Counters` is filled by the stages; `ControlLink` owns the control block. All regions of the block
are written by one thread, the gather thread: others only append to the queues that it drains.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import structlog
from hbm_pool.contracts.control_block import (
    ControlBlockError,
    ServerBlock,
    SidecarView,
)
from hbm_pool.contracts.history import table_rows
from hbm_pool.contracts.identity import mix64_array, row_keys, sampled
from hbm_pool.contracts.records import (
    COMMAND,
    MAX_CLASSES,
    RequestSample,
    ResidencySnapshot,
    ServerInfo,
)

from hbm_serving.config import ModelConfig
from hbm_serving.features import RankRequest

_log = structlog.get_logger("hbm_serving")

_MAX_SERVED = 4096
_LOOK_S = 0.5
"""How often a missing or replaced sidecar file is looked for."""


class LatencyWindow:
    """Latencies of the last `size` requests, in ms, and their percentiles."""

    def __init__(self, size: int = 1024) -> None:
        self._values = np.zeros(size)
        self._seen = 0

    def add(self, latency_ms: float) -> None:
        self._values[self._seen % len(self._values)] = latency_ms
        self._seen += 1

    def percentiles(self) -> tuple[float, float, int]:
        """(p50, p99, n); zeros before the first request."""
        count = min(self._seen, len(self._values))
        if not count:
            return 0.0, 0.0, 0
        p50, p99 = np.percentile(self._values[:count], (50, 99))
        return float(p50), float(p99), count


class Counters:
    """Sums since the start. Each field has one writer thread, so plain attributes suffice."""

    def __init__(self) -> None:
        # Compute thread.
        self.requests = 0
        self.compute_errors = 0
        self.batches = 0
        self.uncached_requests = 0
        self.slo_met = 0
        self.slo_total = 0
        self.kv_lookups = 0
        self.kv_hits = 0
        self.kv_tokens_reused = 0
        self.kv_tokens_computed = 0
        self.candidate_tokens = 0
        self.context_tokens = 0
        self.gather_ms = 0.0
        self.compute_ms = 0.0
        self.service_ms = 0.0
        self.timed_accesses = 0
        self.timed_misses = np.zeros(MAX_CLASSES, np.int64)
        """Rows looked up and missed by the batches behind `gather_ms`, the latter by class."""
        self.request_ms = 0.0
        """Moving average of service per request (a batch's time by its requests)."""
        self.latency = LatencyWindow()
        # Event loop; the pipeline counts what its queue expired.
        self.overloads = 0
        # Gather thread.
        self.gather_errors = 0
        self.commands = 0
        self.commands_ignored = 0

    @property
    def errors(self) -> int:
        """Requests that failed inside the server."""
        return self.gather_errors + self.compute_errors


class ServedRequest(NamedTuple):
    """What the request ring is made from, once a request has been answered."""

    request: RankRequest
    fingerprints: npt.NDArray[np.uint32]


def request_sample(served: ServedRequest, model: ModelConfig, rate: float) -> RequestSample:
    """All rows of candidates and of the whole history that belong to the hash sample.

    Independent of what was cached: a virtual cache at another α must see every access.
    """
    request = served.request
    tables = len(model.tables)
    history, candidates = item_keys(model, request.items), item_keys(model, request.candidates)
    chosen = np.flatnonzero(sampled(history, rate))
    return RequestSample(
        user=request.user,
        history_tokens=request.tokens,
        candidates=len(request.candidates),
        rows_total=len(history) + len(candidates),
        history_rows_total=len(history),
        page_fingerprints=served.fingerprints,
        history_keys=history[chosen],
        history_positions=(chosen // tables).astype(np.uint32),
        candidate_keys=candidates[sampled(candidates, rate)],
    )


def item_keys(model: ModelConfig, items: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Row keys that items look up, `[n] int64` -> `[n * tables] uint64`, item by item."""
    columns = [
        row_keys(index, table_rows(items, index, table.rows, hashed=index > 0))
        for index, table in enumerate(model.tables)
    ]
    return np.stack(columns, axis=1).reshape(-1)


def top_shards(
    model: ModelConfig, items: npt.NDArray[np.int64], shards: int, most: int
) -> tuple[int, ...]:
    """The shards that hold most of a history's rows, most first, at most `most`.

    The shard of a row is `mix64(key) % shards`, as in `EmbeddingCache.shard_rows`.
    """
    place = mix64_array(item_keys(model, items)) % np.uint64(shards)
    counts = np.bincount(place.astype(np.int64), minlength=shards)
    order = np.argsort(-counts, kind="stable")[:most]
    return tuple(int(shard) for shard in order if counts[shard])


class Command(NamedTuple):
    """A command that passed the checks."""

    alpha: float
    refill_bytes_per_s: float
    drop_only: bool
    generation: int


class ControlLink:
    """The server's end of the control block. Everything but the queues: gather thread only."""

    def __init__(
        self, directory: Path, block: ServerBlock, info: ServerInfo, model: ModelConfig
    ) -> None:
        self._directory = directory
        self._block = block
        self._info = info
        self._model = model
        self._view: SidecarView | None = None
        self._looked_s = -math.inf
        self._command = np.zeros((), dtype=COMMAND)
        self._seen: tuple[int, int] | None = None
        self.events: deque[tuple[int, int]] = deque()
        """(user, tokens) as the KV cache reports them, in its order; 0 tokens: evicted."""
        self._served: deque[ServedRequest] = deque()
        self._dropped = 0  # by whoever offers
        self._dropped_said = 0
        self._resident: dict[int, int] = {}
        self._sequence = 0
        self._snapshots_asked = 0
        self._snapshot: Iterator[None] | None = None
        self.command_generation = 0
        self.ignored = 0

    @classmethod
    def create(cls, directory: Path, info: ServerInfo, model: ModelConfig) -> ControlLink | None:
        """None, with a clear log line, where the block cannot be made: the server goes on."""
        try:
            block = ServerBlock.create(directory, info)
        except (ControlBlockError, OSError) as error:
            _log.error(
                "serving without control block: no sidecar can move alpha",
                run_dir=str(directory),
                reason=str(error),
            )
            return None
        _log.info("control block", run_dir=str(directory), boot_epoch=block.boot_epoch)
        return cls(directory, block, info, model)

    @property
    def boot_epoch(self) -> int:
        return self._block.boot_epoch

    def publish(self, fill: Callable[[npt.NDArray[np.void]], None]) -> None:
        """Drains the queues and publishes one telemetry record, filled by `fill`."""
        self._push_events()
        self._push_samples()
        record = self._block.telemetry
        record["command_generation"] = self.command_generation
        fill(record)
        self._block.publish_telemetry()

    def _push_events(self) -> None:
        while self.events:
            user, tokens = self.events.popleft()
            if tokens:
                self._resident[user] = tokens
                self._sequence = self._block.push_user_cached(user, tokens)
            elif self._resident.pop(user, None) is not None:
                self._sequence = self._block.push_user_evicted(user)

    def offer(self, served: Sequence[ServedRequest]) -> None:
        """Requests for the ring, from one thread; dropped (and counted) when too many wait."""
        if len(self._served) + len(served) > _MAX_SERVED:
            self._dropped += len(served)
        else:
            self._served.extend(served)

    def _push_samples(self) -> None:
        while self._served:
            sample = request_sample(self._served.popleft(), self._model, self._info.sample_rate)
            self._block.push_request(sample)
        dropped = self._dropped
        self._block.lose_requests(dropped - self._dropped_said)
        self._dropped_said = dropped

    # -- commands ----------------------------------------------------------------------------

    def read_command(self, now_s: float) -> Command | None:
        """A command that was not seen before, for this boot and within bounds; else None."""
        view = self._sidecar(now_s)
        if view is None or not view.read_command(self._command):
            return None
        record = self._command
        seen = int(record["generation"]), int(record["monotonic_ns"])
        if seen == self._seen or int(record["boot_epoch"]) != self._block.boot_epoch:
            return None
        self._seen = seen
        alpha, refill = float(record["alpha"]), float(record["refill_bytes_per_s"])
        slack = 1e-9
        if not self._info.alpha_min - slack <= alpha <= self._info.alpha_max + slack:
            self._ignore("alpha outside the server's bounds", alpha, refill)
            return None
        if not (math.isfinite(refill) and refill >= 0.0):
            self._ignore("refill rate is not a number of bytes", alpha, refill)
            return None
        self.command_generation = seen[0]
        return Command(alpha, refill, bool(record["drop_only"]), seen[0])

    def _ignore(self, reason: str, alpha: float, refill: float) -> None:
        self.ignored += 1
        _log.warning("command ignored", reason=reason, alpha=alpha, refill_bytes_per_s=refill)

    def _sidecar(self, now_s: float) -> SidecarView | None:
        if now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            try:
                if self._view is None:
                    self._view = SidecarView.open(self._directory)
                    _log.info("sidecar found", run_dir=str(self._directory))
                else:
                    self._view.refresh()
            except (ControlBlockError, OSError):
                # Not there yet, or of another version. A mapping that exists stays: alpha is kept.
                pass
        return self._view

    # -- snapshot ----------------------------------------------------------------------------

    def step_snapshot(self, shard_rows: Callable[[], npt.NDArray[np.uint32]]) -> None:
        """Writes one slice of a residency snapshot when the sidecar has asked for one."""
        if self._snapshot is None:
            asked = 0 if self._view is None else self._view.snapshot_requests()
            if asked == self._snapshots_asked:
                return
            self._snapshots_asked = asked
            count = len(self._resident)
            snapshot = ResidencySnapshot(
                boot_epoch=self._block.boot_epoch,
                sequence=self._sequence,
                users=np.fromiter(self._resident.keys(), dtype=np.int64, count=count),
                tokens=np.fromiter(self._resident.values(), dtype=np.uint32, count=count),
                shard_rows=shard_rows(),
            )
            self._snapshot = self._block.write_snapshot(snapshot)
        if next(self._snapshot, _DONE) is _DONE:
            self._snapshot = None

    def close(self) -> None:
        self._block.close()


_DONE = object()
