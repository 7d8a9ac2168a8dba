"""Each answer says how many rows were copied from the host for it, and all of them add up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np
import pytest
from hbm_pool.contracts.records import TELEMETRY
from hbm_serving.batching import RankResult
from hbm_serving.config import Config
from hbm_serving.engine import Engine
from hbm_serving.features import RankRequest, table_ids
from hbm_serving.pooled import PooledMemory

Draw = Callable[..., RankRequest]


@pytest.fixture(params=[True, False], ids=["pool", "no cache"])
def engine(request: pytest.FixtureRequest, config: Config) -> Iterator[Engine]:
    server = config.server.model_copy(update={"cache": request.param, "calibrate_s": 0.0})
    engine = Engine(config.model_copy(update={"server": server}))
    engine.start()
    yield engine
    engine.close()


def rank_together(engine: Engine, requests: list[RankRequest]) -> list[RankResult]:
    """One batch: the requests wait until all of them are in the queue."""
    futures: list[Future[RankResult]] = [Future() for _ in requests]

    def finish(future: Future[RankResult]) -> Callable[[RankResult | Exception], None]:
        def finished(outcome: RankResult | Exception) -> None:
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        return finished

    def submit() -> None:
        for request, future in zip(requests, futures, strict=True):
            engine.submit(request, None, finish(future))

    before = engine.counters.batches
    engine.between_batches(submit).result(30)
    results = [future.result(30) for future in futures]
    assert engine.counters.batches == before + 1
    return results


def missed_in_all(engine: Engine) -> int:
    record = np.zeros((), dtype=TELEMETRY)
    engine.memory.fill(record)
    return int(record["emb_misses"])


def rows_of(config: Config, *requests: RankRequest) -> set[tuple[str, int]]:
    """Table and row of everything that requests look up."""
    items = np.concatenate([np.append(each.items, each.candidates) for each in requests])
    tables = table_ids(config.model, items)
    return {(name, int(row)) for name, rows in tables.items() for row in rows}


def test_a_request_is_told_of_its_own_misses(engine: Engine, config: Config, draw: Draw) -> None:
    generator = np.random.default_rng(1)
    cached = isinstance(engine.memory, PooledMemory)
    if isinstance(engine.memory, PooledMemory):
        engine.between_batches(engine.memory.pool.emb.reset).result(30)
    known = draw(generator, 20, 5, user=0)
    (first,) = rank_together(engine, [known])
    assert first.rows_missed == len(rows_of(config, known))
    # Of several lengths, so that the batch computes them in another order than they came.
    long, short = (draw(generator, tokens, 5, user=0) for tokens in (40, 3))
    one, again, other = rank_together(engine, [long, known, short])
    missed = rows_of(config, long, known, short)
    if cached:
        missed -= rows_of(config, known)
        assert again.rows_missed == 0
    assert one.rows_missed + again.rows_missed + other.rows_missed == len(missed)
    assert other.rows_missed == len(rows_of(config, short) & missed)
    assert one.rows_missed >= len(missed - rows_of(config, known, short))


def test_all_of_them_add_up(engine: Engine, config: Config, draw: Draw) -> None:
    """Empty histories, repeated items and users who return are among them."""
    generator = np.random.default_rng(2)
    before = missed_in_all(engine)
    told = 0
    for _ in range(40):
        requests = [
            draw(generator, int(generator.integers(0, 50)), int(generator.integers(1, 16)), user=u)
            for u in generator.choice(20, int(generator.integers(1, 5)), replace=False)
        ]
        for request in requests:
            request.items[: len(request.items) // 2] %= 50
        results = rank_together(engine, requests)
        for result in results:
            assert 0 <= result.rows_missed <= result.rows_looked_up
        told += sum(result.rows_missed for result in results)
    assert told == missed_in_all(engine) - before > 0
