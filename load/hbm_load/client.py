"""The open-loop load generator: each request leaves at its intended time, whatever came before.

Latency counts from the intended time, so a stalled server shows in every request it delays and
not only in those it happened to hold (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import orjson

from hbm_load.body import HttpRequest, rank_request
from hbm_load.connection import ConnectionLost, ConnectionPool, Response
from hbm_load.errors import ClientError
from hbm_load.records import Outcome, Records
from hbm_load.trace import Trace


@dataclasses.dataclass(frozen=True, slots=True)
class LoadConfig:
    """How requests are sent."""

    url: str
    """`http://host:port` of the router, or of a server; a path after it goes before `/v1/rank`."""
    timeout_s: float = 10.0
    """From the intended time; an answer later than that is a timeout."""
    max_in_flight: int = 1024
    """Requests beyond it are dropped and counted, so that a dead target cannot fill the memory."""
    sample_share: float = 0.01
    """Share of requests whose scores are kept, to be checked against a reference."""
    deadline_ms: float | None = None
    """Sent along as a header; None: not sent."""


class LoadClient:
    """Sends one trace once."""

    def __init__(
        self,
        trace: Trace,
        config: LoadConfig,
        *,
        on_done: Callable[[int], None] | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        target = urlsplit(config.url)
        if target.scheme != "http" or not target.hostname:
            raise ClientError(f"url {config.url!r} is not of the form http://host:port")
        if len(trace) == 0:
            raise ClientError("the trace holds no requests")
        self.run_id = uuid.uuid4().hex[:12]
        self.records = Records.empty(
            trace, self.run_id, {"run_id": self.run_id, "seed": trace.seed, **(meta or {})}
        )
        self.in_flight = 0
        self._trace = trace
        self._config = config
        self._on_done = on_done
        self._host = f"{target.hostname}:{target.port or 80}"
        self._prefix = target.path.rstrip("/")
        self._pool = ConnectionPool(target.hostname, target.port or 80)
        self._start_s = 0.0
        random = np.random.default_rng([trace.seed, 5])
        self._sampled = random.random(len(trace)) < config.sample_share
        if config.sample_share > 0.0 and not self._sampled.any():
            self._sampled[len(trace) // 2] = True

    async def run(self, stop: asyncio.Event | None = None) -> Records:
        """Sends everything and waits for the last answer. `stop` ends it early."""
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()
        # A moment ahead, so that the first request is not late because of its own preparation.
        self._start_s = loop.time() + 0.05
        self.records.meta["start_monotonic_ns"] = time.monotonic_ns() + 50_000_000
        self.records.meta["start_unix_s"] = time.time() + 0.05
        try:
            for index, offset_s in enumerate(self._trace.time_s):
                request = rank_request(
                    self._trace.request(index),
                    self._host,
                    self.records.request_id[index],
                    self._config.deadline_ms,
                    self._prefix,
                )
                if await _stopped_before(stop, self._start_s + float(offset_s)):
                    break
                if self.in_flight >= self._config.max_in_flight:
                    self.records.outcome[index] = Outcome.DROPPED
                    self._finished(index)
                    continue
                task = loop.create_task(self._send(index, request))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            if tasks:
                await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()
            self._pool.close()
        return self.records

    async def _send(self, index: int, request: HttpRequest) -> None:
        loop = asyncio.get_running_loop()
        records = self.records
        deadline = self._start_s + float(self._trace.time_s[index]) + self._config.timeout_s
        self.in_flight += 1
        records.sent_s[index] = loop.time() - self._start_s
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._pool.exchange(request)
        except TimeoutError:
            records.outcome[index] = Outcome.TIMEOUT
        except ConnectionLost:
            records.outcome[index] = Outcome.LOST
        except OSError:
            records.outcome[index] = Outcome.REFUSED
        else:
            records.done_s[index] = loop.time() - self._start_s
            records.answer(index, response)
            if self._sampled[index] and records.outcome[index] is Outcome.OK:
                records.scores[index] = _scores(response)
        finally:
            self.in_flight -= 1
            self._finished(index)

    def _finished(self, index: int) -> None:
        if self._on_done is not None:
            self._on_done(index)


async def _stopped_before(stop: asyncio.Event | None, when_s: float) -> bool:
    """Waits until `when_s` (loop time) or until `stop` is set; True for the latter."""
    delay = when_s - asyncio.get_running_loop().time()
    if stop is None:
        await asyncio.sleep(max(0.0, delay))
        return False
    if delay <= 0.0:
        await asyncio.sleep(0)
        return stop.is_set()
    try:
        async with asyncio.timeout(delay):
            await stop.wait()
    except TimeoutError:
        return False
    return True


def _scores(response: Response) -> list[float]:
    """Scores of an answer; empty when it holds none, which no reference equals."""
    try:
        return [float(score) for score in orjson.loads(response.body)["scores"]]
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return []
