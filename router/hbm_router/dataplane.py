"""The data path as a whole: what all connections share, and the clockwork around them.

Everything here runs on one event loop. Snapshots come from another thread and are taken over
between two callbacks; nothing on the path of a request waits for anything but its backend.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable

import structlog
from hbm_pool.contracts.identity import MAX_USER_ID_BYTES, digest_key, user_hash

from hbm_router import wire
from hbm_router.choice import Choice, Facts, NodeCost
from hbm_router.choose import Chooser
from hbm_router.client import ClientConnection
from hbm_router.config import RouterSettings
from hbm_router.cost import CostTable
from hbm_router.discovery import Backend
from hbm_router.fleet import Fleet, Node, Ticket
from hbm_router.memory import LengthRegression, Remembered, SpeculativeResidency, UserMemory
from hbm_router.metrics import NodeRow, RouterMetrics
from hbm_router.outlier import OutlierDetector, RetryBudget
from hbm_router.request import RequestHead
from hbm_router.upstream import UpstreamPool
from hbm_router.wire import Refusal

PRECISION_GAIN = 0.02
SERVICE_GAIN = 0.05
MAX_HISTORY_TOKENS = 10_000_000


class Dataplane:
    """Routes, forwards, learns and sheds."""

    def __init__(
        self,
        settings: RouterSettings,
        metrics: RouterMetrics,
        *,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.rng = rng
        self.now_s = clock
        self.draining = False
        self.fleet = Fleet()
        self.outlier = OutlierDetector(self.fleet, settings, clock, self._ejected)
        self.retry_budget = RetryBudget(settings.retry_ratio)
        self.pure_paths = settings.pure_path_prefixes()
        self.memory = UserMemory(settings.memory_users)
        self.regression = LengthRegression()
        self.speculation = SpeculativeResidency(settings.speculative_ttl_s)
        self.chooser = Chooser(settings, self.fleet, self.outlier, self.speculation, clock, rng)
        self.clients: set[ClientConnection] = set()
        self._pools: dict[int, UpstreamPool] = {}
        self._offered: CostTable | None = None
        self._log = structlog.get_logger("hbm_router")
        metrics.watch_fleet(self.node_rows)

    # -- backends and snapshots

    def set_backends(self, backends: tuple[Backend, ...]) -> None:
        """Takes over what discovery says."""
        self.fleet.update(backends, self._left)
        self.chooser.fleet_changed()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the backends; from any thread."""
        return self.fleet.names

    def offer(self, table: CostTable) -> None:
        """A new snapshot, from any thread; used from the next decision on."""
        self._offered = table

    def pool(self, node: Node) -> UpstreamPool:
        """The connections to a node."""
        if node.pool is None:
            settings = self.settings
            node.pool = UpstreamPool(
                node, settings.connect_timeout_s, settings.upstream_idle_s, self.now_s
            )
        return node.pool

    def _left(self, node: Node) -> None:
        if node.pool is not None:
            node.pool.close()
        self.metrics.forget_node(node.name)

    def _ejected(self, node: Node, reason: str) -> None:
        self.metrics.ejections.labels(node.name, reason).inc()
        self._log.warning("node taken out", node=node.name, reason=reason)

    # -- connections

    def connected(self, client: ClientConnection) -> Refusal | None:
        """A client connected; a refusal when there are too many."""
        self.clients.add(client)
        if len(self.clients) > self.settings.max_connections:
            return Refusal(503, "connections", "too many client connections", True, 1)
        return None

    def disconnected(self, client: ClientConnection) -> None:
        """It is gone."""
        self.clients.discard(client)

    # -- one request

    def refuse(self) -> Refusal | None:
        """Whether a new request must be shed before anything is known about it."""
        self.retry_budget.earn()
        if self.fleet.inflight >= self.settings.max_inflight:
            message = f"{self.fleet.inflight} requests are in flight, which is the limit"
            return Refusal(503, "saturated", message, True, 1)
        return None

    def facts(self, head: RequestHead) -> Facts:
        """What routing may know: headers, else what was learned."""
        known = head.known
        name = known.get(wire.USER_ID)
        user = user_hash(name) if name and len(name) <= MAX_USER_ID_BYTES else None
        remembered = self.memory.get(user) if user is not None else None
        told = wire.non_negative_int(known.get(wire.HISTORY_TOKENS), MAX_HISTORY_TOKENS)
        candidates = wire.non_negative_int(known.get(wire.CANDIDATES), MAX_HISTORY_TOKENS)
        if told is not None:
            history_tokens, source = told, "header"
        elif remembered is not None:
            history_tokens, source = remembered.history_tokens, "memory"
        elif self.regression.ready and head.content_length is not None:
            history_tokens, source = self.regression.tokens(head.content_length), "regression"
        elif self.regression.ready and head.chunked:
            history_tokens, source = self.regression.mean_tokens(), "mean"
        else:
            history_tokens, source = 0, "none"
        if candidates is None:
            candidates = (
                remembered.candidates
                if remembered is not None
                else self.regression.mean_candidates()
            )
        shards = wire.int_list(known.get(wire.TOP_SHARDS))
        if not shards and remembered is not None:
            shards = remembered.shards
        return Facts(
            user,
            history_tokens,
            candidates,
            source,
            wire.non_negative_float(known.get(wire.DEADLINE_MS)),
            shards,
        )

    def choose(self, facts: Facts, exclude: Node | None) -> Choice | Refusal:
        """Chooses a node and measures how long that took."""
        started_ns = time.perf_counter_ns()
        if self._offered is not None:
            table, self._offered = self._offered, None
            self.chooser.use(table)
        choice = self.chooser.choose(facts, exclude)
        if isinstance(choice, Choice):
            self.metrics.decided(choice, (time.perf_counter_ns() - started_ns) * 1e-9)
        return choice

    def admit(self, choice: Choice, facts: Facts) -> Ticket:
        """The request is being sent to the chosen node."""
        if facts.user is not None:
            self.speculation.put(
                digest_key(facts.user), choice.node.name, facts.history_tokens, self.now_s()
            )
        return self.chooser.admit(choice)

    def release(self, ticket: Ticket) -> None:
        """It is over there."""
        self.chooser.release(ticket)

    def learn(
        self,
        choice: Choice,
        facts: Facts,
        head: RequestHead,
        status: int,
        told: dict[bytes, bytes],
    ) -> None:
        """Takes in what a response head says: health, lengths, and whether we were right."""
        node = choice.node
        self.outlier.answered(node, status)
        if status != 200:
            if facts.user is not None:
                self.speculation.drop(digest_key(facts.user), node.name)
            return
        if not told:
            return
        self._check_prediction(choice, facts, told)
        history_tokens = wire.non_negative_int(told.get(wire.HISTORY_TOKENS), MAX_HISTORY_TOKENS)
        if history_tokens is None:
            return
        candidates = wire.non_negative_int(told.get(wire.CANDIDATES), MAX_HISTORY_TOKENS) or 0
        self.regression.observe(head.content_length, history_tokens, candidates)
        if facts.user is not None:
            shards = wire.int_list(told.get(wire.TOP_SHARDS)) or facts.shards
            self.memory.put(facts.user, Remembered(history_tokens, candidates, shards))
            key = digest_key(facts.user)
            self.speculation.put(key, node.name, history_tokens, self.now_s())

    def _check_prediction(self, choice: Choice, facts: Facts, told: dict[bytes, bytes]) -> None:
        reused = wire.non_negative_int(told.get(wire.KV_REUSED_TOKENS))
        if reused is not None and facts.user is not None:
            predicted = choice.kv == "hit"
            if predicted:
                outcome = "tp" if reused else "fp"
                node = choice.node
                node.kv_precision += PRECISION_GAIN * ((1.0 if reused else 0.0) - node.kv_precision)
                node.kv_precision = max(0.05, node.kv_precision)
            else:
                outcome = "fn" if reused else "tn"
            self.metrics.predicted(outcome)
        service_ms = wire.non_negative_float(told.get(wire.SERVICE_MS))
        if service_ms is None:
            return
        chooser = self.chooser
        chooser.mean_service_ms += SERVICE_GAIN * (service_ms - chooser.mean_service_ms)
        if choice.est_ms is not None:
            queue_ms = wire.non_negative_float(told.get(wire.QUEUE_MS)) or 0.0
            self.metrics.cost_error_s.observe((service_ms + queue_ms - choice.est_ms) * 1e-3)

    # -- clockwork

    async def run_sweeper(self) -> None:
        """Ends what takes too long and measures the loop's lag, until cancelled."""
        settings = self.settings
        shortest_s = min(
            settings.head_timeout_s,
            settings.body_timeout_s,
            settings.response_timeout_s,
            settings.write_stall_s,
            settings.upstream_idle_s,
        )
        period_s = min(1.0, max(0.02, shortest_s / 4))
        while True:
            due_s = self.now_s() + period_s
            await asyncio.sleep(period_s)
            now_s = self.now_s()
            self.metrics.loop_lag_s.observe(max(0.0, now_s - due_s))
            self.sweep(now_s)

    def sweep(self, now_s: float) -> None:
        """One round of `run_sweeper`."""
        for client in list(self.clients):
            client.sweep(now_s)
        for node in self.fleet.nodes:
            if node.pool is not None:
                node.pool.sweep(now_s)
        metrics = self.metrics
        metrics.client_connections.set(len(self.clients))
        metrics.inflight.set(self.fleet.inflight)
        metrics.memory_users.set(len(self.memory))
        metrics.speculative_users.set(len(self.speculation))
        metrics.panic.set(self.outlier.panic)
        metrics.snapshot_entries.set(self.chooser.snapshot.entries)

    # -- views, from any thread

    def node_rows(self) -> Iterable[NodeRow]:
        """Per node what the gauges show."""
        now_s = self.now_s()
        chooser = self.chooser
        snapshot = chooser.snapshot
        views = dict(zip(snapshot.names, snapshot.views, strict=True))
        for node in list(self.fleet.nodes):
            view = views.get(node.name)
            row = {
                "node_inflight": float(node.inflight),
                "node_healthy": float(self.outlier.healthy(node, now_s)),
                "node_trust": chooser.trust_of(node.index),
                "node_kv_precision": node.kv_precision,
                "node_connections": float(node.pool.open_connections if node.pool else 0),
            }
            if view is not None:
                row["digest_age_seconds"] = now_s - view.heard_s
                if view.residency is not None:
                    row["digest_users"] = float(len(view.residency.keys))
                    row["digest_bytes"] = float(view.residency.blob_bytes)
            yield node.name, row

    def explain(self, user: str | None, head: RequestHead) -> tuple[Facts, list[NodeCost]]:
        """How a request would be routed; nothing changes. On the event loop only."""
        if user:
            head.known[wire.USER_ID] = user.encode()
        facts = self.facts(head)
        return facts, self.chooser.explain(facts)
