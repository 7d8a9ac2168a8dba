"""The simulator against the reference server: costs fitted on one, hit rates and latencies on both.

In process, serial, one request per batch, the demo model and its link model. First requests one
after the other: least squares over their service times gives the cost constants. Then other
requests of the same users in open loop, at 60 % of what the server can do; the simulator serves
the same ones, arrivals included, with these constants. `error` is simulated over measured, minus 1.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from hbm_load.trace import TraceRequest
from hbm_policy.costs import CostConstants
from hbm_serving.batching import RankResult
from hbm_serving.config import Config, load_config
from hbm_serving.engine import Engine
from hbm_serving.features import RankRequest
from hbm_serving.log import configure_log
from hbm_serving.memory import pool_config
from hbm_sim.model_file import load_node
from hbm_sim.node import Node
from hbm_sim.queueing import queue_ms
from hbm_sim.requests import RowNumbers, sample_of

from hbm_bench.serving import make_requests

UTILISATION = 0.6
CHANGES = {"server.pipeline": False, "server.max_batch_requests": 1}
# Columns of what is measured.
LATENCY, SERVICE, REUSED, MISSED = range(4)


def run(quick: bool, seed: int) -> dict[str, Any]:
    """Fitted constants, then measured beside simulated."""
    configure_log()
    fitting, checking = (300, 300) if quick else (1500, 3000)
    config = load_config("demo", CHANGES)
    requests = make_requests(config, fitting + checking, seed)
    first, second = requests[:fitting], requests[fitting:]
    engine = Engine(config)
    try:
        engine.start()
        one_by_one = _drive(engine, first, np.full(fitting, -1.0))
        costs = fit(config, first, one_by_one)
        mean_s = float(one_by_one[fitting // 2 :, SERVICE].mean()) / 1e3
        gaps = np.random.default_rng(seed).exponential(mean_s / UTILISATION, checking)
        arrival_s = np.cumsum(gaps)
        measured = _drive(engine, second, arrival_s)
    finally:
        engine.close()
    simulated = simulate(costs, first, second, arrival_s)
    figures = {
        name: {
            "measured": before,
            "simulated": after,
            "error": after / before - 1.0 if before else 0.0,
        }
        for name, before, after in zip(NAMES, _figures(measured), _figures(simulated), strict=True)
    }
    return {"n": checking, "costs": costs._asdict(), **figures}


NAMES = (
    "kv_reused_tokens",
    "rows_missed",
    "mean_service_ms",
    "p50_ms",
    "p99_ms",
)


def _figures(table: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Per request, then latencies from the intended arrival."""
    return (
        float(table[:, REUSED].mean()),
        float(table[:, MISSED].mean()),
        float(table[:, SERVICE].mean()),
        float(np.percentile(table[:, LATENCY], 50)),
        float(np.percentile(table[:, LATENCY], 99)),
    )


def _drive(
    engine: Engine, requests: list[RankRequest], arrival_s: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """What the server says of each request, `[n, 4]`. Negative arrivals: one after the other."""
    table = np.zeros((len(requests), 4))
    failures: list[Exception] = []
    left = threading.Semaphore(0)
    begun_s = time.perf_counter()
    for index, request in enumerate(requests):
        due_s = begun_s + arrival_s[index]
        if arrival_s[index] < 0.0:
            due_s = time.perf_counter()
        elif due_s > time.perf_counter():
            time.sleep(max(0.0, due_s - time.perf_counter()))

        def finish(
            outcome: RankResult | Exception, index: int = index, due_s: float = due_s
        ) -> None:
            if isinstance(outcome, Exception):
                failures.append(outcome)
            else:
                table[index] = (
                    (time.perf_counter() - due_s) * 1e3,
                    outcome.service_ms,
                    outcome.kv_reused_tokens,
                    outcome.rows_missed,
                )
            left.release()

        engine.submit(request, None, finish)
        if arrival_s[index] < 0.0:
            left.acquire()
    for _ in range(int((arrival_s >= 0.0).sum())):
        left.acquire()
    if failures:
        raise failures[0]
    return table


def fit(
    config: Config, requests: list[RankRequest], table: npt.NDArray[np.float64]
) -> CostConstants:
    """Least squares of the service time over tokens, contexts and missed rows; outliers (above
    the 98th percentile) are the machine's, not the server's."""
    tokens = np.array([request.tokens for request in requests], np.float64)
    candidates = np.array([len(request.candidates) for request in requests], np.float64)
    new = tokens - table[:, REUSED]
    context = new * (table[:, REUSED] + tokens + 1.0) / 2.0 + candidates * tokens
    columns = np.stack([np.ones(len(tokens)), new + candidates, context, table[:, MISSED]], axis=1)
    kept = table[:, SERVICE] <= np.percentile(table[:, SERVICE], 98)
    names = [0, 1, 2, 3]
    while True:
        found = np.linalg.lstsq(columns[kept][:, names], table[kept, SERVICE], rcond=None)[0]
        worst = int(np.argmin(found))
        if found[worst] >= 0.0:
            break
        del names[worst]
    values = dict(zip(names, found.tolist(), strict=True))
    row_ms = values.get(3, 0.0)
    return CostConstants(
        values.get(0, 0.0),
        values.get(1, 0.0),
        values.get(2, 0.0),
        (row_ms,) * len(pool_config(config).classes),
    )


def simulate(
    costs: CostConstants,
    first: list[RankRequest],
    second: list[RankRequest],
    arrival_s: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """The same requests on the simulated node; the first ones warm it."""
    info, pool = load_node("demo")
    node, numbers = Node(info, costs, pool.alpha), RowNumbers(info)
    served = []
    for request in (*first, *second):
        sample = sample_of(
            TraceRequest(
                user_id=str(request.user),
                user=request.user,
                items=request.items,
                timestamps=request.timestamps,
                candidates=request.candidates,
                query_time=request.query_time,
                regime="",
            ),
            info,
        )
        served.append(node.serve(sample, numbers.lists(sample)))
    counted = served[len(first) :]
    gather = np.array([each.gather_ms for each in counted])
    compute = np.array([each.compute_ms for each in counted])
    latency = queue_ms(arrival_s * 1e3, gather, compute, overlap=False)
    return np.stack(
        [
            latency,
            gather + compute,
            np.array([float(each.cached_tokens) for each in counted]),
            np.array([float(sum(each.misses)) for each in counted]),
        ],
        axis=1,
    )
