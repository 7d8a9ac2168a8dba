"""The pipelined server against the serial one and one without caches: same requests, same run.

In process, without HTTP; the demo model and its link model. A fixed number of clients each send
their next request when the last one is answered, so arms differ in latency and in throughput.
Rounds alternate between the arms, so that a disturbance of the machine meets all of them.
"""

from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from hbm_serving.batching import RankResult
from hbm_serving.config import Config, load_config
from hbm_serving.engine import Engine
from hbm_serving.features import Batch, RankRequest, table_ids
from hbm_serving.log import configure_log
from hbm_serving.model import HSTU, PagedHistory
from hbm_serving.reference import ReferenceScorer, max_error
from hbm_serving.weights import draw_dense

_CLIENTS = 4
_ARMS = {
    "pipelined": {"server.pipeline": True},
    "serial": {"server.pipeline": False},
    "uncached": {"server.cache": False, "server.pipeline": True},
}


class _Answer(NamedTuple):
    latency_ms: float
    service_ms: float
    tokens: int
    reused: int
    rows: int
    missed: int


def make_requests(config: Config, count: int, seed: int) -> list[RankRequest]:
    """Users by a Zipf law with exponent 0.9, each with a history that grows from visit to visit."""
    generator = np.random.default_rng(seed)
    model = config.model
    users = 120
    weights = 1.0 / np.arange(1, users + 1) ** 0.9
    items = 1.0 / np.arange(1, model.items + 1) ** 0.8
    by_item = np.cumsum(items / items.sum())
    lengths = np.clip(generator.lognormal(5.3, 0.5, users), 32, 400).astype(int)

    def drawn(n: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        places = np.searchsorted(by_item, generator.random(n))
        return np.minimum(places, model.items - 1).astype(np.int64)

    histories = [drawn(length) for length in lengths]
    requests = []
    for user in generator.choice(users, size=count, p=weights / weights.sum()):
        histories[user] = np.concatenate([histories[user], drawn(2)])[-model.max_sequence_tokens :]
        history = histories[user]
        requests.append(
            RankRequest(
                user=int(user) + 1,
                items=history,
                timestamps=np.arange(len(history), dtype=np.int64) * 3600,
                actions=None,
                candidates=drawn(32),
                query_time=len(history) * 3600,
                request_tokens=len(history),
            )
        )
    return requests


def _drive(engine: Engine, requests: list[RankRequest]) -> tuple[list[_Answer], float]:
    """All requests from `_CLIENTS` clients; answers, and the seconds it took."""
    free = threading.Semaphore(_CLIENTS)
    answers: list[_Answer] = []
    failures: list[Exception] = []
    begun_s = time.perf_counter()
    for request in requests:
        free.acquire()
        sent_s = time.perf_counter()

        def finish(
            outcome: RankResult | Exception, sent_s: float = sent_s, tokens: int = request.tokens
        ) -> None:
            if isinstance(outcome, Exception):
                failures.append(outcome)
            else:
                answers.append(
                    _Answer(
                        (time.perf_counter() - sent_s) * 1e3,
                        outcome.service_ms,
                        tokens,
                        outcome.kv_reused_tokens,
                        outcome.rows_looked_up,
                        outcome.rows_missed,
                    )
                )
            free.release()

        engine.submit(request, None, finish)
    for _ in range(_CLIENTS):
        free.acquire()
    if failures:
        raise failures[0]
    return answers, time.perf_counter() - begun_s


def _summary(answers: list[_Answer], seconds: float, engine: Engine) -> dict[str, Any]:
    table = np.array(answers)
    latency, counters = table[:, 0], engine.counters
    tail = (99, "p99_ms") if len(table) >= 1000 else (95, "p95_ms")
    return {
        "n": len(table),
        "requests_per_s": len(table) / seconds,
        "p50_ms": float(np.percentile(latency, 50)),
        tail[1]: float(np.percentile(latency, tail[0])),
        "mean_service_ms": float(table[:, 1].mean()),
        "kv_reused_share": float(table[:, 3].sum() / table[:, 2].sum()),
        "row_miss_ratio": float(table[:, 5].sum() / max(1.0, table[:, 4].sum())),
        "gather_ms_per_batch": counters.gather_ms / max(1, counters.batches),
        "compute_ms_per_batch": counters.compute_ms / max(1, counters.batches),
        "requests_per_batch": counters.requests / max(1, counters.batches),
    }


def measure_exactness(config: Config, count: int, seed: int) -> dict[str, Any]:
    """Largest score differences from a float64 reference, computed whole (cold) and with all whole
    pages reused (warm), for each dtype of dense weights and KV."""
    exact = ReferenceScorer.from_config(config, torch.float64)
    size = config.pool.page_tokens
    requests = make_requests(config, count, seed)
    wanted = [
        exact.score(r.items, r.timestamps, r.candidates, r.actions, r.query_time) for r in requests
    ]
    figures: dict[str, Any] = {
        "n": count,
        "score_std": float(np.mean([scores.std() for scores in wanted])),
    }
    for dtype in ("float32", "bfloat16"):
        shape = config.model.model_copy(update={"dtype": dtype})
        model = HSTU(shape, draw_dense(shape, config.server.seed), torch.device("cpu"))
        page = (2, size, shape.heads, shape.head_dim)
        layers = [
            torch.zeros(shape.max_sequence_tokens // size, *page, dtype=model.dtype)
            for _ in range(shape.layers)
        ]
        worst = {"cold": 0.0, "warm": 0.0}
        for request, scores in zip(requests, wanted, strict=True):
            pages = np.arange(-(-request.tokens // size), dtype=np.int64)
            for name, cached in (("cold", 0), ("warm", request.tokens // size * size)):
                batch = Batch([request], [cached])
                rows = {
                    table: exact.tables[table][torch.from_numpy(ids)]
                    for table, ids in table_ids(shape, batch.item_ids()).items()
                }
                got = model.score(batch, rows, PagedHistory(layers, [pages])).numpy()
                worst[name] = max(worst[name], max_error(got, scores))
        figures[dtype] = {f"max_abs_error_{name}": error for name, error in worst.items()}
    return figures


def run(quick: bool, seed: int, device: str = "cpu") -> dict[str, Any]:
    """Latency and throughput of the three arms, and the ratios between them."""
    configure_log()
    rounds, per_round = (2, 150) if quick else (6, 500)
    base = load_config("demo")
    requests = make_requests(base, rounds * per_round, seed)
    warm_up = make_requests(base, per_round, seed + 1)
    engines = {
        name: Engine(load_config("demo", change), device=device) for name, change in _ARMS.items()
    }
    answers: dict[str, list[_Answer]] = {name: [] for name in engines}
    seconds = dict.fromkeys(engines, 0.0)
    try:
        for engine in engines.values():
            engine.start()
            _drive(engine, warm_up)
        for number in range(rounds):
            part = requests[number * per_round : (number + 1) * per_round]
            for name, engine in engines.items():
                got, took_s = _drive(engine, part)
                answers[name] += got
                seconds[name] += took_s
        figures: dict[str, Any] = {
            name: _summary(answers[name], seconds[name], engine) for name, engine in engines.items()
        }
    finally:
        for engine in engines.values():
            engine.close()
    pipelined = figures["pipelined"]
    for other in ("serial", "uncached"):
        figures[f"pipelined_over_{other}"] = {
            "p50": pipelined["p50_ms"] / figures[other]["p50_ms"],
            "throughput": pipelined["requests_per_s"] / figures[other]["requests_per_s"],
        }
    return {
        "model": base.model.name,
        "clients": _CLIENTS,
        "link_bytes_per_s": base.pool.link_bytes_per_s,
        **figures,
        "exactness": measure_exactness(base, 20 if quick else 200, seed),
    }
