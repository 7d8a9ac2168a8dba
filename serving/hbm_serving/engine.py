"""One model server without its HTTP side: memory, model, queue, pipeline, control block.

```python
engine = Engine(load_config("demo"))
engine.start()
result = await engine.rank(engine.parser.parse_json(body, user), deadline_ms=None)
engine.close()
```
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import structlog
import torch
from hbm_pool import compile_kernels
from hbm_pool.contracts.records import CostModel, RowClass, ServerInfo, TableMap

from hbm_serving.batching import BatchQueue, RankResult, Ticket
from hbm_serving.calibration import calibrate
from hbm_serving.config import Config
from hbm_serving.errors import ConfigError, Refused, RequestError
from hbm_serving.features import Ints, RankRequest
from hbm_serving.memory import Memory, open_memory
from hbm_serving.metrics import Sample
from hbm_serving.model import HSTU
from hbm_serving.pipeline import SLOTS, Pipeline
from hbm_serving.ranking import RankStages, Work
from hbm_serving.schema import RequestParser
from hbm_serving.telemetry import ControlLink, Counters, ServedRequest
from hbm_serving.weights import draw_dense, load_dense

_log = structlog.get_logger("hbm_serving")
_PERCENTILES_S = 0.1

State = Literal["starting", "ready", "draining", "stopped"]


class Engine:
    """Ranks requests. `submit` and `rank` from any thread; one instance per device."""

    def __init__(
        self,
        config: Config,
        *,
        device: str = "cpu",
        run_dir: Path | None = None,
        node: str = "local",
    ) -> None:
        self.config = config
        self.state: State = "starting"
        self.device = open_device(device)
        torch.set_num_threads(config.server.torch_threads)
        self.versions = _versions()
        compile_kernels()  # before anything is measured, and before the first move
        self.parser = RequestParser(config.model)
        self.counters = Counters()
        dense = _dense(config)
        self.memory: Memory = open_memory(config, self.device)
        model = HSTU(config.model, dense, self.device)
        self.costs = calibrate(config, model, self.memory)
        self.memory.set_row_prices(self.costs.constants.row_ms)
        self.queue = BatchQueue(config.server.max_queue, time.perf_counter)
        self._stages = RankStages(
            config,
            self.memory,
            model,
            self.costs,
            self.counters,
            slots=SLOTS,
            on_boundary=self._boundary,
            on_served=self._served,
        )
        self._stages.model_version = self.memory.model_version
        self._pipeline: Pipeline[Work] = Pipeline(
            self.queue, self._stages, config.server, pipelined=config.server.pipeline
        )
        self._percentiles = (0.0, 0.0, 0)
        self._percentiles_s = 0.0
        self.info = self._describe(node)
        self.link: ControlLink | None = None
        if run_dir is not None and config.server.cache:
            self.link = ControlLink.create(run_dir, self.info, config.model)
            if self.link is not None:
                self.memory.on_kv_event(self._kv_event)
        elif run_dir is not None:
            _log.warning("no control block: a server without caches has no alpha to move")

    # -- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the pipeline; requests are welcome from now on."""
        self._pipeline.start()
        self.state = "ready"

    def drain(self) -> None:
        """Says "not ready" from now on; requests that come all the same are still served."""
        if self.state == "ready":
            self.state = "draining"

    def close(self) -> None:
        """Finishes what is queued, then gives everything back. Idempotent."""
        if self.state == "stopped":
            return
        started = self.state != "starting"
        self.queue.close()
        if started:
            self._pipeline.close()
        self.state = "stopped"
        if self.link is not None:
            self.link.publish(self._fill)
            self.link.close()
        self.memory.close()

    @property
    def overloads(self) -> int:
        """Requests refused with 503."""
        return self.counters.overloads + self._pipeline.expired

    @property
    def model_version(self) -> int:
        return self._stages.model_version

    # -- requests ------------------------------------------------------------------------------

    @property
    def waiting_ms(self) -> float:
        """What a request that comes now waits for: those before it, times what one takes.

        Not an average of what requests have waited: of a node that was overloaded once and then
        left alone, that would stay what it was, and routers would leave it alone for ever.
        """
        return (self.queue.depth + self._pipeline.in_flight) * self.counters.request_ms

    def submit(
        self,
        request: RankRequest,
        deadline_ms: float | None,
        finish: Callable[[RankResult | Exception], None],
    ) -> Ticket:
        """Queues a request; `finish` is called once, from another thread. Raises `Refused`."""
        limits = self.config.server
        budget_ms = limits.default_deadline_ms if deadline_ms is None else deadline_ms
        waiting_ms = self.waiting_ms
        if waiting_ms > budget_ms:
            self.counters.overloads += 1
            raise Refused(
                "deadline",
                f"requests ahead take about {waiting_ms:.0f} ms, the deadline is {budget_ms:g} ms",
                waiting_ms / 1e3,
            )
        now_s = time.perf_counter()
        slo_ms = limits.slo_ms if deadline_ms is None else deadline_ms
        ticket = Ticket(request, now_s, now_s + budget_ms / 1e3, slo_ms / 1e3, finish)
        try:
            self.queue.submit(ticket, waiting_ms / 1e3)
        except Refused:
            self.counters.overloads += 1
            raise
        return ticket

    async def rank(self, request: RankRequest, deadline_ms: float | None = None) -> RankResult:
        """Scores one request. Raises `Refused`; a cancelled caller gives up its place."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[RankResult] = loop.create_future()

        def resolve(outcome: RankResult | Exception) -> None:
            if future.done():
                return
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        def finish(outcome: RankResult | Exception) -> None:
            try:
                loop.call_soon_threadsafe(resolve, outcome)
            except RuntimeError:
                _log.warning("an answer came after the event loop had closed")

        ticket = self.submit(request, deadline_ms, finish)
        try:
            return await future
        except asyncio.CancelledError:
            ticket.cancelled = True
            raise

    # -- administration ------------------------------------------------------------------------

    def push_rows(self, table: str, ids: Ints, values: npt.NDArray[np.float32]) -> Future[int]:
        """New values of rows, `ids` [n], `values` [n, width]; the row epoch when it is done.

        Takes effect between two batches. KV computed from older values is reused for at most
        `max_kv_row_lag_s`.
        """
        index = [spec.name for spec in self.config.model.tables].index(table)
        spec = self.config.model.tables[index]
        if values.shape != (len(ids), spec.width):
            raise RequestError(
                "values", f"has shape {values.shape}; {(len(ids), spec.width)} is needed"
            )
        return self._pipeline.between_batches(lambda: self.memory.push_rows(table, ids, values))

    def set_weights(
        self, model_version: int, *, seed: int | None = None, path: Path | None = None
    ) -> Future[int]:
        """Other dense weights under a new version: all KV is void from then on."""
        if model_version == self.model_version:
            raise RequestError("version", f"{model_version} is served already")
        shape = self.config.model
        dense = draw_dense(shape, seed or 0) if path is None else load_dense(shape, path)
        model = HSTU(shape, dense, self.device)

        def switch() -> int:
            self.memory.set_model_version(model_version)
            self._stages.model = model
            self._stages.model_version = model_version
            _log.info("weights", model_version=model_version)
            return model_version

        return self._pipeline.between_batches(switch)

    def check_integrity(self) -> Future[list[str]]:
        """Violations of the pool's invariants, looked for while nothing is in flight."""
        return self.between_batches(self.memory.check_integrity)

    def between_batches(self, action: Callable[[], Any]) -> Future[Any]:
        """Runs `action` while no batch is in flight; requests queue up meanwhile."""
        return self._pipeline.between_batches(action)

    # -- gather thread -------------------------------------------------------------------------

    def _boundary(self, idle: bool) -> None:
        link = self.link
        if link is None:
            return
        command = link.read_command(time.monotonic())
        if command is not None:
            self.memory.set_target_alpha(command.alpha, drop_only=command.drop_only)
            self.memory.set_refill_rate(command.refill_bytes_per_s)
            self.counters.commands += 1
        self.counters.commands_ignored = link.ignored
        link.publish(self._fill)
        link.step_snapshot(lambda: self.memory.shard_rows(self.config.server.emb_shards))

    def _kv_event(self, user: int, tokens: int) -> None:
        if self.link is not None:
            self.link.events.append((user, tokens))

    def _served(self, served: list[ServedRequest]) -> None:
        if self.link is not None:
            self.link.offer(served)

    def _fill(self, record: npt.NDArray[np.void]) -> None:
        """One telemetry record: our counters, the costs, and what the memory counts."""
        counters, now_s = self.counters, time.perf_counter()
        if now_s - self._percentiles_s >= _PERCENTILES_S:
            self._percentiles_s = now_s
            self._percentiles = counters.latency.percentiles()
        for name in _COUNTED:
            record[name] = getattr(counters, name)
        record["latency_p50_ms"], record["latency_p99_ms"], record["latency_n"] = self._percentiles
        record["overloads"] = self.overloads
        record["queue_depth"] = self.queue.depth
        record["queue_ms"] = self.waiting_ms
        record["draining"] = self.state != "ready"
        record["model_version"] = self.model_version
        costs = self.costs.constants
        record["cost_fixed_ms"] = costs.fixed_ms
        record["cost_token_ms"] = costs.token_ms
        record["cost_token_context_ms"] = costs.token_context_ms
        record["cost_row_ms"][: len(costs.row_ms)] = costs.row_ms
        self.memory.fill(record)

    # -- description ---------------------------------------------------------------------------

    def _describe(self, node: str) -> ServerInfo:
        config, layout = self.config, self.memory.layout
        model, pool = config.model, config.pool
        slots = layout.slots
        rate = min(1.0, config.server.sample_slots / max(1, slots))
        return ServerInfo(
            node=node,
            model=model.name,
            extents=layout.extents,
            extent_bytes=layout.extent_bytes,
            page_tokens=pool.page_tokens,
            pages_per_extent=layout.pages_per_extent,
            max_sequence_tokens=model.max_sequence_tokens,
            drop_block_tokens=model.drop_block_tokens,
            tables=tuple(
                TableMap(table.name, table.rows, layout.table_class[index], index > 0)
                for index, table in enumerate(model.tables)
            ),
            classes=tuple(
                RowClass(kind.row_bytes, kind.rows_per_extent, kind.catalogue_rows, kind.tables)
                for kind in layout.classes
            ),
            cost_model=CostModel.OVERLAP if config.server.pipeline else CostModel.SERIAL,
            sample_rate=rate,
            alpha_min=pool.alpha_min,
            alpha_max=pool.alpha_max,
            slo_ms=config.server.slo_ms,
            device=str(self.device),
            versions=self.versions,
        )

    def samples(self) -> Iterable[Sample]:
        """What `/metrics` shows besides answers: read when scraped."""
        counters = self.counters
        yield Sample(
            "hbm_serving_ready",
            "1 while requests are welcome.",
            "gauge",
            float(self.state == "ready"),
        )
        yield Sample("hbm_serving_queue_depth", "Requests that wait.", "gauge", self.queue.depth)
        yield Sample(
            "hbm_serving_in_flight", "Requests in a batch.", "gauge", self._pipeline.in_flight
        )
        yield Sample(
            "hbm_serving_overloads",
            "Requests refused for want of room or time.",
            "counter",
            self.overloads,
        )
        for name, (field, text) in _SERVING_COUNTERS.items():
            yield Sample(f"hbm_serving_{name}", text, "counter", getattr(counters, field))
        for name, text in _SERVING_SECONDS.items():
            yield Sample(
                f"hbm_serving_{name}_seconds",
                text,
                "counter",
                getattr(counters, f"{name}_ms") / 1e3,
            )
        yield Sample(
            "hbm_serving_model_version",
            "Version of the dense weights.",
            "gauge",
            self.model_version,
        )
        constants = self.costs.constants
        for part in ("fixed", "token", "token_context"):
            yield Sample(
                "hbm_serving_cost_seconds",
                "Cost constants: per request, computed token, token and token of context.",
                "gauge",
                getattr(constants, f"{part}_ms") / 1e3,
                (("part", part),),
            )
        for index, row_ms in enumerate(constants.row_ms):
            yield Sample(
                "hbm_serving_cost_seconds", "", "gauge", row_ms / 1e3, (("part", f"row_{index}"),)
            )
        yield from self.memory.samples()


_COUNTED = (
    "requests",
    "errors",
    "uncached_requests",
    "batches",
    "slo_met",
    "slo_total",
    "kv_lookups",
    "kv_hits",
    "kv_tokens_reused",
    "kv_tokens_computed",
    "candidate_tokens",
    "context_tokens",
    "gather_ms",
    "compute_ms",
    "service_ms",
    "timed_accesses",
    "timed_misses",
)
"""Telemetry fields that `Counters` holds under the same name."""

_SERVING_COUNTERS = {
    "ranked": ("requests", "Requests that were scored."),
    "errors": ("errors", "Requests that failed inside the server."),
    "batches": ("batches", "Batches computed."),
    "uncached_requests": ("uncached_requests", "Requests without pages for want of room."),
    "slo_met": ("slo_met", "Scored requests within their deadline or the server's SLO."),
    "kv_tokens_reused": ("kv_tokens_reused", "History tokens whose KV was reused."),
    "kv_tokens_computed": ("kv_tokens_computed", "History tokens that were computed."),
    "candidate_tokens": ("candidate_tokens", "Candidates scored."),
    "context_tokens": (
        "context_tokens",
        "History tokens attended to, summed over computed tokens.",
    ),
    "commands": ("commands", "Commands taken over from the sidecar."),
    "commands_ignored": ("commands_ignored", "Commands outside the server's bounds."),
}
_SERVING_SECONDS = {
    "gather": "Time spent looking up KV and gathering rows.",
    "compute": "Time spent computing scores.",
    "service": "Both, as the pipeline combines them.",
}


def open_device(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:N` or `auto`. Raises `ConfigError` when there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name}: is not a device; use cpu, cuda or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name}: only cpu and cuda are supported")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(f"device={name}: {count} CUDA devices are visible; use cpu or auto")
        return torch.device("cuda", device.index or 0)
    return device


def _dense(config: Config) -> dict[str, torch.Tensor]:
    path, seed = config.server.weights, config.server.seed
    return draw_dense(config.model, seed) if path is None else load_dense(config.model, path)


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {"torch": str(torch.__version__)}
    for package in ("hbm-partition", "fbgemm-gpu-cpu", "fbgemm-gpu", "numba"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    versions.setdefault("hbm-partition", "unknown")
    return versions
