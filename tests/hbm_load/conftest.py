from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hbm_load.scenario import Scenario


@pytest.fixture
def scenario() -> Scenario:
    """Two regimes and a drift between them, all knobs of the schema in use."""
    return Scenario.model_validate(
        {
            "schema_version": 1,
            "name": "small",
            "catalogue": 5000,
            "duration_s": 60,
            "regimes": {
                "strangers": {
                    "arrivals": {"rate_per_s": 50},
                    "users": {"one_off_users": 1000000},
                    "items": {"zipf_s": 0.8, "churn": 20, "new_share": 0.25, "new_items": 500},
                    "history": {"median": 30, "minimum": 4, "maximum": 90, "growth": 2},
                    "candidates": 8,
                },
                "regulars": {
                    "arrivals": {"rate_per_s": 50, "modulation_sd": 0.2},
                    "users": {"hot": 1.0, "hot_users": 20},
                    "items": {"zipf_s": 1.1, "zipf_q": 5},
                    "history": {"median": 60, "minimum": 4, "maximum": 90, "growth": 3},
                    "candidates": 8,
                },
            },
            "walk": [
                {"regime": "strangers"},
                {"regime": "regulars", "drift_from": "strangers", "drift_share": 0.5},
                {"regime": "strangers", "share": 2, "label": "again"},
            ],
        }
    )


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


@pytest.fixture
def serve_on() -> Callable[[Handler], contextlib.AbstractAsyncContextManager[int]]:
    """`async with serve_on(handler) as port`: a real TCP server on a free port."""

    @contextlib.asynccontextmanager
    async def serving(handler: Handler) -> AsyncIterator[int]:
        connections: set[asyncio.Task[Any]] = set()

        async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections.add(task)
            try:
                await handler(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                connections.discard(task)
                writer.close()

        server = await asyncio.start_server(tracked, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for task in list(connections):
                task.cancel()

    return serving


@pytest.fixture
def unused_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
