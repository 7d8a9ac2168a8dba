"""Readings and request streams as a small node would produce them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hbm_policy import CostConstants, Curve, PolicyState, Reading, decide
from hbm_policy.twin import Twin
from hbm_pool.contracts.history import page_fingerprints
from hbm_pool.contracts.identity import sampled
from hbm_pool.contracts.records import (
    CURVES,
    Mode,
    RequestSample,
    RowClass,
    ServerInfo,
    TableMap,
)

from tests.small_server import keys_of, small_server

TICK_NS = 250_000_000
COSTS = CostConstants(0.5, 0.02, 1e-5, (0.05, 0.03))
ALPHA = tuple(round(0.05 * step, 10) for step in range(2, 19))


def _valley(best: float, depth: float = 8.0, warm: float = 1.0, **fields: Any) -> Curve:
    """A curve with its minimum at `best`."""
    values: dict[str, Any] = {
        "monotonic_ns": TICK_NS,
        "boot_epoch": 7,
        "requests": 1000,
        "requests_lost": 0,
        "warm": warm,
        "alpha": ALPHA,
        "cost_ms": tuple(5.0 + depth * (alpha - best) ** 2 for alpha in ALPHA),
    }
    return Curve(**(values | fields))


def _reading(tick: int = 1, **fields: Any) -> Reading:
    """A sound reading of tick `tick` in mode auto, α 0.5."""
    now_ns = tick * TICK_NS
    values: dict[str, Any] = {
        "now_ns": now_ns,
        "boot_epoch": 7,
        "telemetry_ns": now_ns - 1_000,
        "telemetry_epoch": 7,
        "alpha": 0.5,
        "alpha_target": 0.5,
        "command_generation": 0,
        "moving": False,
        "draining": False,
        "requests": 5 * tick,
        "emb_accesses": 5_000 * tick,
        "emb_slots": 10_000,
        "refill_backlog_rows": 0,
        "link_busy": 0.1,
        "extents": 400,
        "server_alpha_min": 0.1,
        "server_alpha_max": 0.9,
        "mode": int(Mode.AUTO),
        "alpha_min": 0.1,
        "alpha_max": 0.9,
        "alpha_fixed": 0.6,
        "refill_bytes_per_s": 1e6,
        "curve": _valley(0.5, monotonic_ns=now_ns, requests=5 * tick),
    }
    return Reading(**(values | fields))


def _stream(
    info: ServerInfo, seed: int, requests: int, *, users: int = 12, items: int = 300
) -> list[RequestSample]:
    """Users with growing histories, a few of them anonymous, new or with a changed past."""
    random = np.random.default_rng(seed)
    popularity = np.cumsum(1.0 / np.arange(1, items + 1) ** 0.8)
    known: dict[int, npt.NDArray[np.int64]] = {}
    samples = []

    def draw(count: int) -> npt.NDArray[np.int64]:
        ranks = np.searchsorted(popularity, random.random(count) * popularity[-1])
        # Other seeds make other rows hot: a sample of rows is not judged by one draw of them.
        return (ranks * 7 + seed * 131) % info.tables[0].rows

    for _ in range(requests):
        user = int(random.integers(0, users + 1))
        history = known.get(user, draw(int(random.integers(0, 60))))
        if random.random() < 0.05:
            history = draw(len(history))
        history = np.concatenate([history, draw(int(random.integers(0, 6)))])
        history = history[-info.max_sequence_tokens :]
        known[user] = history
        candidates = draw(8)
        rows, wanted = keys_of(info, history), keys_of(info, candidates)
        chosen = np.flatnonzero(sampled(rows, info.sample_rate))
        samples.append(
            RequestSample(
                user=user,
                history_tokens=len(history),
                candidates=len(candidates),
                rows_total=len(rows) + len(wanted),
                history_rows_total=len(rows),
                page_fingerprints=page_fingerprints(
                    history, np.arange(len(history)), None, info.page_tokens
                ),
                history_keys=rows[chosen],
                history_positions=(chosen // len(info.tables)).astype(np.uint32),
                candidate_keys=wanted[sampled(wanted, info.sample_rate)],
            )
        )
    return samples


def _curves(twin: Twin) -> npt.NDArray[Any]:
    record = np.zeros((), CURVES)
    twin.curves(record)
    return record


def _run(
    info: ServerInfo, samples: Sequence[RequestSample], **fields: Any
) -> tuple[Twin, npt.NDArray[Any]]:
    twin = Twin(info, clock_ns=lambda: 5, **fields)
    twin.feed(samples, 0, COSTS)
    return twin, _curves(twin)


@pytest.fixture(scope="session")
def valley() -> Callable[..., Curve]:
    return _valley


@pytest.fixture(scope="session")
def reading() -> Callable[..., Reading]:
    return _reading


@pytest.fixture(scope="session")
def make_info() -> Callable[..., ServerInfo]:
    return small_server


@pytest.fixture(scope="session")
def adopted() -> PolicyState:
    """State after the first sound reading of a server."""
    return decide(_reading(tick=1), PolicyState()).state


@pytest.fixture(scope="session")
def follow() -> Callable[..., tuple[list[Any], PolicyState]]:
    """Runs ticks in which the server applies every command at once."""

    def run(
        state: PolicyState, ticks: int, best: float, *, start: int = 2, **fields: Any
    ) -> tuple[list[Any], PolicyState]:
        alpha = fields.pop("alpha", 0.5)
        depth = fields.pop("depth", 8.0)
        generation = 0
        decisions = []
        for tick in range(start, start + ticks):
            seen = _reading(
                tick,
                alpha=alpha,
                alpha_target=alpha,
                command_generation=generation,
                curve=_valley(best, depth, monotonic_ns=tick * TICK_NS, requests=1000 * tick),
                **fields,
            )
            decision = decide(seen, state)
            state = decision.state
            decisions.append(decision)
            if decision.apply:
                alpha, generation = decision.target, decision.generation
        return decisions, state

    return run


@pytest.fixture(scope="session")
def costs() -> CostConstants:
    """Prices by which candidates differ."""
    return COSTS


@pytest.fixture(scope="session")
def one_class() -> dict[str, Any]:
    """Fields of a server with one table and one width class."""
    return {
        "tables": (TableMap("item", 3000, 0, False),),
        "classes": (RowClass(64, 32, 3000, (0,)),),
    }


@pytest.fixture(scope="session")
def make_stream() -> Callable[..., list[RequestSample]]:
    return _stream


@pytest.fixture(scope="session")
def curves_of() -> Callable[[Twin], npt.NDArray[Any]]:
    return _curves


@pytest.fixture(scope="session")
def run_twin() -> Callable[..., tuple[Twin, npt.NDArray[Any]]]:
    """A twin that has been fed a stream, and its curves."""
    return _run
