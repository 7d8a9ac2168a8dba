"""Measures the cost constants at start: real forward passes, real row misses, bounded in time.

Each shape runs a few times and counts with its fastest run, which other processes on the machine
disturb least.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import structlog
import torch

from hbm_serving.config import Config
from hbm_serving.costs import ComputeTiming, CostEstimator, fit_compute
from hbm_serving.features import Batch, RankRequest
from hbm_serving.memory import Memory
from hbm_serving.model import HSTU, PagedHistory
from hbm_serving.weights import DTYPES

_log = structlog.get_logger("hbm_serving")
_REPEATS = 3
_ROUNDS = 6
_COMPUTE_SHARE = 0.6
"""Of the time allowed; the rest measures rows."""


def calibrate(config: Config, model: HSTU, memory: Memory) -> CostEstimator:
    """Constants of this machine. With `calibrate_s` = 0 one pass of each kind is measured."""
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
    shape = config.model
    pages_needed = shape.max_sequence_tokens // config.pool.page_tokens
    page = (2, config.pool.page_tokens, shape.heads, shape.head_dim)
    layer_pages = [
        torch.zeros(pages_needed, *page, dtype=model.dtype, device=model.device)
        for _ in range(shape.layers)
    ]
    timings: list[ComputeTiming] = []
    for number, (tokens, cached, candidates) in enumerate(_shapes(config)):
        if number > 3 and time.perf_counter() > until_s:
            break
        batch = Batch([_request(config, tokens, candidates, number)], [cached])
        rows = {
            table.name: torch.zeros(
                batch.computed_tokens, table.width, dtype=DTYPES[table.dtype], device=model.device
            )
            for table in shape.tables
        }
        count = -(-tokens // config.pool.page_tokens)
        history = PagedHistory(layer_pages, [np.arange(count, dtype=np.int64)])
        best_ms = math.inf
        for _ in range(_REPEATS + 1):  # the first one warms up
            begun_s = time.perf_counter()
            model.score(batch, rows, history if count else None)
            best_ms = min(best_ms, (time.perf_counter() - begun_s) * 1e3)
        timings.append(ComputeTiming(1, batch.computed_tokens, batch.context_tokens, best_ms))
    return timings


def _row_costs(config: Config, memory: Memory, until_s: float) -> tuple[list[float], float]:
    """(ms per missed row of each class, ms of a gather without misses)."""
    generator = np.random.default_rng([config.server.seed, 0xCA2])
    tables = config.model.tables
    classes = memory.layout.classes
    base_ms = math.inf
    prices: list[list[float]] = [[] for _ in classes]
    for round_number in range(_ROUNDS):
        for index, kind in enumerate(classes):
            if round_number and time.perf_counter() > until_s:
                break
            # A quarter of a sequence of rows nobody has asked for yet: (almost) all miss.
            wanted = max(16, min(256, config.model.max_sequence_tokens // 4))
            table = tables[kind.tables[0]]
            ids = generator.choice(table.rows, size=min(wanted, table.rows), replace=False)
            probe = {table.name: torch.from_numpy(np.sort(ids).astype(np.int64))}
            out = {
                table.name: torch.empty(
                    len(ids), table.width, dtype=DTYPES[table.dtype], device=memory.device
                )
            }
            missed_ms, misses = _timed_gather(memory, probe, out, index)
            hit_ms, again = _timed_gather(memory, probe, out, index)
            base_ms = min(base_ms, hit_ms)
            if misses > again:
                prices[index].append((missed_ms - hit_ms) / (misses - again))
            elif misses:  # nothing is ever cached here
                prices[index].append(missed_ms / misses)
    fallback = [value for values in prices for value in values] or [0.0]
    row_ms = [max(1e-6, min(values or fallback)) for values in prices]
    return row_ms, base_ms if math.isfinite(base_ms) else 0.0


def _timed_gather(
    memory: Memory, ids: dict[str, torch.Tensor], out: dict[str, torch.Tensor], index: int
) -> tuple[float, int]:
    memory.begin_batch()
    begun_s = time.perf_counter()
    count = memory.gather(ids, out)
    if memory.device.type == "cuda":
        torch.cuda.synchronize(memory.device)
    return (time.perf_counter() - begun_s) * 1e3, count.class_misses[index]
