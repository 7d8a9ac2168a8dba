"""A small model, its reference, and requests drawn from it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hbm_serving.config import Config, load_config
from hbm_serving.engine import Engine
from hbm_serving.features import RankRequest
from hbm_serving.reference import ReferenceScorer
from hbm_serving.server import Listening, bind, listen

torch.set_num_threads(1)

Draw = Callable[..., RankRequest]
Scores = Callable[[RankRequest], npt.NDArray[np.float32]]


@pytest.fixture(scope="session")
def config() -> Config:
    return load_config("tiny")


@pytest.fixture(scope="session")
def reference(config: Config) -> ReferenceScorer:
    return ReferenceScorer.from_config(config)


@pytest.fixture(scope="session")
def draw(config: Config) -> Draw:
    """A request with random items and growing times."""
    model = config.model

    def drawn(
        generator: np.random.Generator,
        tokens: int,
        candidates: int,
        *,
        user: int = 1,
        actions: bool = True,
    ) -> RankRequest:
        times = np.cumsum(generator.integers(0, 50_000, tokens))
        return RankRequest(
            user=user,
            items=generator.integers(0, model.items, tokens),
            timestamps=times,
            actions=generator.integers(0, model.actions, tokens) if actions else None,
            candidates=generator.integers(0, model.items, candidates),
            query_time=int(times[-1] if tokens else 0) + int(generator.integers(0, 1000)),
            request_tokens=tokens,
        )

    return drawn


@pytest.fixture(scope="session")
def wanted(reference: ReferenceScorer) -> Scores:
    """What the cache-free reference says."""

    def scores(request: RankRequest) -> npt.NDArray[np.float32]:
        return reference.score(
            request.items,
            request.timestamps,
            request.candidates,
            request.actions,
            request.query_time,
        )

    return scores


class Running:
    """A real server in a thread of this process, on free ports."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(30), "the server did not start"

    def _run(self) -> None:
        def on_ready(listening: Listening) -> None:
            self.listening = listening
            self._ready.set()

        public, admin = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(listen(self.engine, public, admin, self._stop, on_ready))
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listening.port}"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.listening.admin_port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.listening.port), timeout=30)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the pipeline busy: requests queue up until the block is left."""
        entered, leave = threading.Event(), threading.Event()

        def hold() -> None:
            entered.set()
            leave.wait(30)

        held = self.engine.between_batches(hold)
        assert entered.wait(30)
        try:
            yield
        finally:
            leave.set()
            held.result(30)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def start_server() -> Iterator[Callable[[Config], Running]]:
    """Starts servers that end with the session, or when stopped."""
    started: list[Running] = []

    def start(config: Config) -> Running:
        started.append(Running(Engine(config)))
        return started[-1]

    yield start
    for server in started:
        if server.engine.state != "stopped":
            server.stop()


@pytest.fixture(scope="session")
def server(config: Config, start_server: Callable[[Config], Running]) -> Running:
    """One server for all tests that do not change it."""
    return start_server(config)


@pytest.fixture(scope="session")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as opened:
        yield opened
