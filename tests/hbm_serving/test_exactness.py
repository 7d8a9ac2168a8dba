"""With any sequence of hits, misses, evictions, moves and updates, scores equal the reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from hbm_serving.batching import RankResult
from hbm_serving.config import Config
from hbm_serving.engine import Engine
from hbm_serving.features import RankRequest
from hbm_serving.reference import ReferenceScorer, max_error
from hbm_serving.weights import draw_dense, save
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

TOLERANCE = 1e-5


def with_changes(config: Config, pool: dict | None = None, server: dict | None = None) -> Config:
    return config.model_copy(
        update={
            "pool": config.pool.model_copy(update=pool or {}),
            "server": config.server.model_copy(update=server or {}),
        }
    )


def send(engine: Engine, request: RankRequest) -> Future[RankResult]:
    future: Future[RankResult] = Future()

    def finish(outcome: RankResult | Exception) -> None:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    engine.submit(request, None, finish)
    return future


class ServerMachine(RuleBasedStateMachine):
    """Users whose histories grow, are cut or rewritten, on a server that is disturbed."""

    config: Config
    pipelined: bool
    device = "cpu"

    def __init__(self) -> None:
        super().__init__()
        strict = {"max_kv_row_lag_s": 0.0}
        self.config = with_changes(
            type(self).config, strict, {"pipeline": type(self).pipelined, "calibrate_s": 0.0}
        )
        self.engine = Engine(self.config, device=type(self).device)
        self.engine.start()
        self.reference = ReferenceScorer.from_config(self.config)
        self.histories: dict[int, np.ndarray] = {}
        self.version = self.engine.model_version
        self.hits = 0

    @initialize(seed=st.integers(0, 2**32 - 1))
    def seed(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def _grown(self, user: int, tokens: int) -> np.ndarray:
        """Columns item, time, action; a history of at most `max_request_history_tokens`."""
        model = self.config.model
        old = self.histories.get(user, np.zeros((0, 3), dtype=np.int64))
        since = int(old[-1, 1]) if len(old) else 0
        new = np.stack(
            [
                self.generator.integers(0, model.items, tokens),
                since + np.cumsum(self.generator.integers(0, 5000, tokens)),
                self.generator.integers(0, model.actions, tokens),
            ],
            axis=1,
        )
        grown = np.concatenate([old, new])[-model.max_request_history_tokens :]
        self.histories[user] = grown
        return grown

    def _request(self, user: int, tokens: int) -> RankRequest:
        history = self._grown(user, tokens)
        model = self.config.model
        return self.engine.parser.build(
            user,
            np.ascontiguousarray(history[:, 0]),
            np.ascontiguousarray(history[:, 1]),
            np.ascontiguousarray(history[:, 2]),
            self.generator.integers(0, model.items, int(self.generator.integers(1, 17))),
            None,
        )

    def _check(self, requests: list[RankRequest]) -> None:
        futures = [send(self.engine, request) for request in requests]
        for request, future in zip(requests, futures, strict=True):
            result = future.result(30)
            expected = self.reference.score(
                request.items,
                request.timestamps,
                request.candidates,
                request.actions,
                request.query_time,
            )
            self.hits += result.kv_reused_tokens > 0
            assert result.model_version == self.version
            assert result.kv_row_lag_s == 0.0
            assert max_error(result.scores, expected) <= TOLERANCE

    @rule(user=st.integers(0, 12), tokens=st.integers(0, 40))
    def rank(self, user: int, tokens: int) -> None:
        self._check([self._request(user, tokens)])

    @rule(users=st.lists(st.integers(0, 12), min_size=2, max_size=10), tokens=st.integers(0, 9))
    def rank_many_at_once(self, users: list[int], tokens: int) -> None:
        self._check([self._request(user, tokens) for user in users])

    @rule(user=st.integers(1, 12), share=st.floats(0.0, 1.0))
    def rewrite_from_the_middle(self, user: int, share: float) -> None:
        history = self.histories.get(user)
        if history is not None:
            self.histories[user] = history[: int(share * len(history))]
        self._check([self._request(user, 6)])

    @rule(alpha=st.floats(0.1, 0.7), drop_only=st.booleans())
    def move(self, alpha: float, drop_only: bool) -> None:
        self.engine.memory.set_target_alpha(alpha, drop_only=drop_only)

    @rule(count=st.integers(1, 50))
    def push_rows(self, count: int) -> None:
        index = int(self.generator.integers(len(self.config.model.tables)))
        table = self.config.model.tables[index]
        ids = self.generator.choice(table.rows, count, replace=False).astype(np.int64)
        values = self.generator.standard_normal((count, table.width), dtype=np.float32)
        # In use by some user with some luck: half of the pushes hit a known history.
        known = [history[:, 0] for history in self.histories.values() if len(history)]
        if index == 0 and known and self.generator.random() < 0.5:
            used = np.unique(np.concatenate(known))[:count]
            ids, values = used, values[: len(used)]
        self.engine.push_rows(table.name, ids, values).result(30)
        self.reference.push_rows(table.name, ids, torch.from_numpy(values))

    @rule()
    def switch_weights(self) -> None:
        self.version += 1
        self.engine.set_weights(self.version, seed=self.version).result(30)
        self.reference.load(draw_dense(self.config.model, self.version))

    @rule()
    def nothing_is_broken(self) -> None:
        assert self.engine.check_integrity().result(30) == []

    def teardown(self) -> None:
        assert self.engine.check_integrity().result(30) == []
        self.engine.close()


@pytest.mark.parametrize("pipelined", [True, False])
def test_scores_equal_the_reference_whatever_happens(config: Config, pipelined: bool) -> None:
    machine = type("Machine", (ServerMachine,), {"config": config, "pipelined": pipelined})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_on_a_gpu_equal_the_reference_on_cpu(config: Config) -> None:
    machine = type(
        "Machine", (ServerMachine,), {"config": config, "pipelined": True, "device": "cuda"}
    )
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=10,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture
def engines(config: Config) -> Iterator[Callable[..., Engine]]:
    started: list[Engine] = []

    def start(**changes: dict) -> Engine:
        started.append(Engine(with_changes(config, changes.get("pool"), changes.get("server"))))
        started[-1].start()
        return started[-1]

    yield start
    for engine in started:
        engine.close()


def test_the_pipeline_scores_as_the_serial_server_does(
    config: Config, engines: Callable[..., Engine], draw: Callable[..., RankRequest]
) -> None:
    generator = np.random.default_rng(3)
    requests = [
        draw(generator, int(generator.integers(0, 60)), 8, user=int(generator.integers(0, 9)))
        for _ in range(120)
    ]
    scores = []
    for server in ({"pipeline": True}, {"pipeline": False}, {"cache": False}):
        engine = engines(server=server)
        futures = [send(engine, request) for request in requests[:60]]
        scores.append([future.result(30).scores for future in futures])
    for other in scores[1:]:
        assert max(map(max_error, scores[0], other)) <= TOLERANCE


def test_a_returning_user_computes_only_new_tokens(
    config: Config, engines: Callable[..., Engine], draw: Callable[..., RankRequest]
) -> None:
    engine = engines()
    request = draw(np.random.default_rng(4), 41, 4, user=77)
    size, tables = config.pool.page_tokens, len(config.model.tables)
    first = send(engine, request).result(30)
    second = send(engine, request).result(30)
    assert (first.kv_reused_tokens, second.kv_reused_tokens) == (0, 41 // size * size)
    assert second.rows_looked_up == (41 % size + 4) * tables
    assert max_error(first.scores, second.scores) <= TOLERANCE
    anonymous = draw(np.random.default_rng(4), 41, 4, user=0)
    for _ in range(2):
        assert send(engine, anonymous).result(30).kv_reused_tokens == 0


def test_requests_of_one_user_reuse_what_the_one_before_cached(
    engines: Callable[..., Engine], draw: Callable[..., RankRequest]
) -> None:
    engine = engines()
    requests = [draw(np.random.default_rng(5), 40, 4, user=5) for _ in range(6)]
    futures = [send(engine, request) for request in requests]
    reused = [future.result(30).kv_reused_tokens for future in futures]
    assert reused == [0, 40, 40, 40, 40, 40]


def test_lag_of_rows_is_stated_and_bounded(
    config: Config, engines: Callable[..., Engine], draw: Callable[..., RankRequest]
) -> None:
    engine = engines()  # 300 s of lag are allowed
    request = draw(np.random.default_rng(6), 40, 4, user=6)
    send(engine, request).result(30)
    values = np.ones((1, config.model.tables[0].width), dtype=np.float32)
    engine.push_rows("item", request.items[:1], values).result(30)
    stale = send(engine, request).result(30)
    assert stale.kv_reused_tokens == 40
    assert 0.0 < stale.kv_row_lag_s < 300.0
    # Candidates see pushed rows at once.
    request.candidates[0] = request.items[0]
    fresh = send(engine, request).result(30)
    assert max_error(fresh.scores, stale.scores) > 1e-3


def test_weights_from_a_file(
    config: Config, engines: Callable[..., Engine], draw: Callable[..., RankRequest], tmp_path
) -> None:
    tables = {table.name: torch.randn(table.rows, table.width) for table in config.model.tables}
    dense = draw_dense(config.model, 9)
    save(tmp_path / "weights.safetensors", dense, tables)
    engine = engines(server={"weights": tmp_path / "weights.safetensors"})
    reference = ReferenceScorer(config.model, dense, tables)
    request = draw(np.random.default_rng(8), 30, 5)
    expected = reference.score(
        request.items, request.timestamps, request.candidates, request.actions, request.query_time
    )
    assert max_error(send(engine, request).result(30).scores, expected) <= TOLERANCE


def test_a_crowded_pool_evicts_moves_and_stays_exact(
    config: Config, engines: Callable[..., Engine], wanted: Callable[[RankRequest], np.ndarray]
) -> None:
    """More users and rows than fit, α going to and fro: both sides evict, every score holds."""
    engine = engines(pool={"pool_bytes": 200 * 4096})
    generator = np.random.default_rng(11)
    model = config.model
    histories = [np.sort(generator.integers(0, 10**6, 60)) for _ in range(60)]
    items = [generator.integers(0, model.items, 60) for _ in range(60)]
    reused = 0
    for number in range(300):
        user = int(generator.zipf(1.3)) % 60
        tokens = min(60, 20 + number // 8)
        request = engine.parser.build(
            user + 1,
            items[user][:tokens],
            histories[user][:tokens],
            None,
            generator.integers(0, model.items, 16),
            10**6,
        )
        if number % 30 == 0:
            alpha = 0.15 if number % 60 else 0.65
            engine.memory.set_target_alpha(alpha, drop_only=number % 90 == 0)
        result = send(engine, request).result(30)
        reused += result.kv_reused_tokens
        assert max_error(result.scores, wanted(request)) <= TOLERANCE
    assert engine.check_integrity().result(30) == []
    found = {sample.name: sample.value for sample in engine.samples() if not sample.labels}
    assert reused > 0
    assert found["hbm_pool_moves"] >= 2
    assert found["hbm_pool_kv_evicted_users"] + found["hbm_pool_kv_trimmed_users"] > 0
    assert found["hbm_pool_emb_evictions"] > 0
