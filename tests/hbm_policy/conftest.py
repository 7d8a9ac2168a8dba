"""Readings and request streams as a small node would produce them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hbm_policy import Curve, PolicyState, Reading, decide
from hbm_pool.contracts.records import CostModel, Mode, RowClass, ServerInfo, TableMap

TICK_NS = 250_000_000
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


def _info(**fields: Any) -> ServerInfo:
    """A small server: 64 extents of 4 pages of 4 tokens, two width classes."""
    values: dict[str, Any] = {
        "node": "n",
        "model": "m",
        "extents": 64,
        "extent_bytes": 4096,
        "page_tokens": 4,
        "pages_per_extent": 4,
        "max_sequence_tokens": 128,
        "drop_block_tokens": 32,
        "tables": (TableMap("item", 3000, 0, False), TableMap("side", 500, 1, True)),
        "classes": (RowClass(64, 32, 3000, (0,)), RowClass(32, 64, 500, (1,))),
        "cost_model": CostModel.SERIAL,
        "sample_rate": 1.0,
        "alpha_min": 0.1,
        "alpha_max": 0.9,
        "slo_ms": 50.0,
        "device": "cpu",
    }
    return ServerInfo(**(values | fields))


@pytest.fixture(scope="session")
def valley() -> Callable[..., Curve]:
    return _valley


@pytest.fixture(scope="session")
def reading() -> Callable[..., Reading]:
    return _reading


@pytest.fixture(scope="session")
def make_info() -> Callable[..., ServerInfo]:
    return _info


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
        generation = 0
        decisions = []
        for tick in range(start, start + ticks):
            seen = _reading(
                tick,
                alpha=alpha,
                alpha_target=alpha,
                command_generation=generation,
                curve=_valley(best, monotonic_ns=tick * TICK_NS, requests=1000 * tick),
                **fields,
            )
            decision = decide(seen, state)
            state = decision.state
            decisions.append(decision)
            if decision.apply:
                alpha, generation = decision.target, decision.generation
        return decisions, state

    return run
