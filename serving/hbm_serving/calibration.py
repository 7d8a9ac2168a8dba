"""Measures the cost constants at start: real forward passes, real row misses, bounded in time.

Each shape runs many times and counts with its fastest run, which other processes on the machine
disturb least.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import structlog
import torch
from hbm_pool.errors import RowStoreError

from hbm_serving.config import Config
from hbm_serving.costs import ComputeTiming, CostEstimator, fit_compute
from hbm_serving.features import Batch, RankRequest
from hbm_serving.memory import Memory
from hbm_serving.model import HSTU, PagedHistory
from hbm_serving.weights import DTYPES

_log = structlog.get_logger("hbm_serving")
_LEAST_PASSES = 4
_MOST_PASSES = 40
_FEW_ROWS = 8
_COMPUTE_SHARE = 0.6
"""Of the time allowed; the rest measures rows."""


def calibrate(config: Config, model: HSTU, memory: Memory) -> CostEstimator:
    """Constants of this machine. With `calibrate_s` = 0 each shape is measured a few times."""
    started_s = time.perf_counter()
    budget_s = config.server.calibrate_s
    timings = _compute_timings(config, model, started_s + _COMPUTE_SHARE * budget_s)
    compute = fit_compute(timings)
    row_ms, base_ms = _row_costs(config, memory, started_s + budget_s)
    estimator = CostEstimator(compute, row_ms, base_ms)
    _log.info(
        "calibrated",
        seconds=round(time.perf_counter() - started_s, 2),
        fixed_ms=round(compute[0], 4),
        token_us=round(compute[1] * 1e3, 4),
        token_context_ns=round(compute[2] * 1e6, 4),
        row_us=[round(value * 1e3, 3) for value in row_ms],
    )
    return estimator


def _shapes(config: Config) -> Iterator[tuple[int, int, int]]:
    """(tokens, cached tokens, candidates): misses and hits of several lengths."""
    longest, page = config.model.max_sequence_tokens, config.pool.page_tokens
    many = config.model.max_candidates
    for tokens in (longest // 2, longest, longest // 8, 0):
        yield tokens, 0, many
        cached = tokens // page * page
        if cached:
            yield tokens, max(0, cached - page), many
            yield tokens, cached, max(1, many // 4)


def _request(config: Config, tokens: int, candidates: int, seed: int) -> RankRequest:
    generator = np.random.default_rng([config.server.seed, 0xCA1, seed])
    items = config.model.items
    return RankRequest(
        user=0,
        items=generator.integers(0, items, tokens),
        timestamps=np.cumsum(generator.integers(0, 10_000, tokens)),
        actions=None,
        candidates=generator.integers(0, items, candidates),
        query_time=10_000 * (tokens + 1),
        request_tokens=tokens,
    )


def _compute_timings(config: Config, model: HSTU, until_s: float) -> list[ComputeTiming]:
    """Every shape in turn, again and again until the time is up: a disturbance of the machine
    that lasts a while then spoils some runs of every shape and all runs of none."""
    shape = config.model
    pages_needed = shape.max_sequence_tokens // config.pool.page_tokens
    page = (2, config.pool.page_tokens, shape.heads, shape.head_dim)
    layer_pages = [
        torch.zeros(pages_needed, *page, dtype=model.dtype, device=model.device)
        for _ in range(shape.layers)
    ]
    runs: list[Callable[[], object]] = []
    best: list[ComputeTiming] = []
    for number, (tokens, cached, candidates) in enumerate(_shapes(config)):
        batch = Batch([_request(config, tokens, candidates, number)], [cached])
        rows = {
            table.name: torch.zeros(
                batch.computed_tokens, table.width, dtype=DTYPES[table.dtype], device=model.device
            )
            for table in shape.tables
        }
        count = -(-tokens // config.pool.page_tokens)
        history = PagedHistory(layer_pages, [np.arange(count, dtype=np.int64)]) if count else None
        runs.append(partial(model.score, batch, rows, history))
        best.append(ComputeTiming(1, batch.computed_tokens, batch.context_tokens, math.inf))
    passes = 0
    while passes < _LEAST_PASSES or (passes < _MOST_PASSES and time.perf_counter() < until_s):
        passes += 1
        for number, run in enumerate(runs):
            begun_s = time.perf_counter()
            run()
            took_ms = (time.perf_counter() - begun_s) * 1e3
            best[number] = best[number]._replace(ms=min(best[number].ms, took_ms))
    return best


def _row_costs(config: Config, memory: Memory, until_s: float) -> tuple[list[float], float]:
    """(ms per missed row of each class, ms of a gather that misses next to nothing).

    Few and many rows that nobody has asked for yet are gathered; the price of a row is the slope
    between them, because a first miss costs more than a further one.
    """
    generator = np.random.default_rng([config.server.seed, 0xCA2])
    tables = [config.model.tables[kind.tables[0]] for kind in memory.layout.classes]
    many = min(256, max(64, config.model.max_sequence_tokens // 4))
    # Per class: rows asked for -> (ms, misses) of the fastest gather.
    best: list[dict[int, tuple[float, int]]] = [{} for _ in tables]
    passes = 0
    while passes < _LEAST_PASSES or (passes < _MOST_PASSES and time.perf_counter() < until_s):
        passes += 1
        for index, table in enumerate(tables):
            for wanted in (_FEW_ROWS, many):
                count = min(wanted, table.rows)
                ids = np.sort(generator.choice(table.rows, size=count, replace=False))
                out = torch.empty(
                    count, table.width, dtype=DTYPES[table.dtype], device=memory.device
                )
                probe = {table.name: torch.from_numpy(ids.astype(np.int64))}
                try:
                    took_ms, misses = _timed_gather(memory, probe, {table.name: out}, index)
                except RowStoreError as error:
                    # Requests for that row will fail; the others are to be served.
                    _log.warning("a row could not be read", reason=str(error))
                    continue
                # The first pass warms up; later ones may hit some rows of earlier ones, so they
                # are compared by miss.
                if passes > 1 and misses and took_ms / misses < _per_miss(best[index].get(wanted)):
                    best[index][wanted] = took_ms, misses
    row_ms, base_ms = [], 0.0
    for found in best:
        few, lots = found.get(_FEW_ROWS, (0.0, 0)), found.get(many, (0.0, 0))
        if lots[1] > few[1]:
            slope = (lots[0] - few[0]) / (lots[1] - few[1])
            row_ms.append(max(1e-6, slope))
            base_ms = max(base_ms, lots[0] - slope * lots[1])
        else:
            row_ms.append(1e-6)
    return row_ms, base_ms


def _per_miss(best: tuple[float, int] | None) -> float:
    return math.inf if best is None else best[0] / best[1]


def _timed_gather(
    memory: Memory, ids: dict[str, torch.Tensor], out: dict[str, torch.Tensor], index: int
) -> tuple[float, int]:
    memory.begin_batch()
    begun_s = time.perf_counter()
    count = memory.gather(ids, out)
    if memory.device.type == "cuda":
        torch.cuda.synchronize(memory.device)
    return (time.perf_counter() - begun_s) * 1e3, count.class_misses[index]
