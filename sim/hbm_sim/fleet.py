"""Several nodes behind the real router scoring (`hbm_router.Chooser`), with α chosen on each.

The router hears what nodes say at their heartbeats, learns from answers, and knows its own requests
in flight, all on the stream's clock. A request is served by the split that its node has when it
arrives there.
"""

from __future__ import annotations

import dataclasses
import heapq
import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from hbm_policy.twin import Twin
from hbm_pool.contracts.digest import NODE_SCHEMA, NodeState
from hbm_pool.contracts.identity import DIGEST_KEY_MASK, digest_key
from hbm_pool.contracts.records import CURVES, TELEMETRY, CostModel
from hbm_router.choice import Choice, Facts
from hbm_router.choose import Chooser
from hbm_router.config import RouterSettings
from hbm_router.cost import CostTable, Trust
from hbm_router.dataplane import PRECISION_GAIN, SERVICE_GAIN
from hbm_router.discovery import Backend
from hbm_router.fleet import Fleet, Ticket
from hbm_router.memory import SpeculativeResidency
from hbm_router.outlier import OutlierDetector
from hbm_router.snapshot import NodeView, Residency, Snapshot

from hbm_sim import engine_moves as moves
from hbm_sim.curve_track import TwinSamples, tick_count, tick_ns
from hbm_sim.engine import EngineNode
from hbm_sim.engine_kernel import empty_outcome
from hbm_sim.loop import Arm, Observer
from hbm_sim.node_spec import NodeSpec
from hbm_sim.stream import Stream

SNAPSHOT_S: Final = 0.1
"""How often the router takes over what nodes have said since."""
RATE_WINDOW_S: Final = 5.0
"""Behind the ratios of a heartbeat, as in the sidecar."""
ORACLE: Final = "oracle"
"""Policy that no router has: it knows each node's queue and resident users at this very moment."""
ORACLE_TIE: Final = 0.05


@dataclasses.dataclass(frozen=True)
class FleetRun:
    """What happened. Columns of the stream `[n]`; `[nodes]` for each node."""

    latency_ms: npt.NDArray[np.float64]  # NaN: refused
    service_ms: npt.NDArray[np.float64]
    kv_hit: npt.NDArray[np.bool_]
    missed_rows: npt.NDArray[np.float64]
    dropped: npt.NDArray[np.bool_]
    node: npt.NDArray[np.int16]  # -1: no node took it
    alpha: npt.NDArray[np.float64]  # [ticks, nodes] applied
    requests: npt.NDArray[np.int64]  # [nodes]
    moved_bytes: npt.NDArray[np.int64]  # [nodes]
    predicted: dict[str, int]
    """KV predictions of the router: tp, fp, fn, tn."""


def run_fleet(
    stream: Stream,
    spec: NodeSpec,
    nodes: int,
    seed: int,
    *,
    policy: str = "cost_ms",
    settings: Mapping[str, Any] | None = None,
    arms: Callable[[int], Arm] | None = None,
    twins: bool = False,
    alpha: float = 0.5,
    tick_s: float = 0.25,
    heartbeat_s: float = 1.0,
    network_ms: float = 0.5,
    refill_bytes_per_s: float = 1.0e9,
) -> FleetRun:
    """All requests of a stream over 1 to 64 nodes.

    `policy` and further `settings` are the router's own, or `ORACLE`; `heartbeat_s` is how old a
    node's words may be. `arms(k)` chooses α on node k, which has a twin of its own with `twins`.
    Equal inputs give an equal run. Raises ValueError for a number of nodes out of range.
    """
    if not 1 <= nodes <= 64:
        raise ValueError(f"{nodes} nodes; 1 to 64 can be simulated")
    simulation = _Fleet(
        stream, spec, nodes, seed, policy, dict(settings or {}), alpha, heartbeat_s, network_ms
    )
    if arms is not None:
        simulation.add_arms(arms, twins, tick_s, refill_bytes_per_s, seed)
    return simulation.run(tick_s)


class _Node:
    """One node and what its sidecar says of it."""

    def __init__(self, name: str, engine: EngineNode) -> None:
        self.name = name
        self.engine = engine
        self.sequence = 0
        self.record = np.zeros((), TELEMETRY)
        self.window: deque[npt.NDArray[Any]] = deque()
        self.arm: Arm | None = None
        self.observer: Observer | None = None
        self.twin: Twin | None = None
        self.fresh: list[int] = []

    def view(self, time_s: float, now_ns: int) -> NodeView:
        """State and residency as a heartbeat and a digest carry them."""
        engine, record = self.engine, self.record
        engine.telemetry(record, now_ns)
        self.window.append(record.copy())
        horizon = now_ns - round(RATE_WINDOW_S * 1e9)
        while len(self.window) > 2 and int(self.window[1]["monotonic_ns"]) <= horizon:
            self.window.popleft()
        old = self.window[0]

        def grown(field: str) -> float:
            return float(record[field]) - float(old[field])

        self.sequence += 1
        requests, accesses = grown("requests"), grown("emb_accesses")
        tokens = grown("kv_tokens_computed") + grown("candidate_tokens")
        state = NodeState(
            schema=NODE_SCHEMA,
            name=self.name,
            url=f"http://{self.name}:1",
            boot_epoch=engine.boot_epoch,
            sequence=self.sequence,
            heartbeat_unix_ms=now_ns // 1_000_000,
            alpha=engine.alpha,
            queue_depth=int(record["queue_depth"]),
            queue_ms=engine.backlog_ms(time_s),
            service_ms=grown("service_ms") / requests if requests else 0.0,
            cost_fixed_ms=float(record["cost_fixed_ms"]),
            cost_token_ms=float(record["cost_token_ms"]),
            cost_token_context_ms=float(record["cost_token_context_ms"]),
            cost_row_ms=float(record["cost_row_ms"][..., 0]),
            rows_per_token=accesses / tokens if tokens else 0.0,
            emb_miss_ratio=grown("emb_misses") / accesses if accesses else 0.0,
            page_tokens=engine.spec.info.page_tokens,
            draining=False,
            digest_sequence=self.sequence,
            digest_crc=self.sequence,
            model=engine.spec.info.model,
            model_version=1,
        )
        held = engine.residents()
        keys = held.users & DIGEST_KEY_MASK
        order = np.argsort(keys, kind="stable")
        residency = Residency(
            keys[order],
            held.tokens[order].astype(np.uint32),
            np.zeros(0, np.uint32),
            len(order),
            engine.boot_epoch,
            self.sequence,
            self.sequence,
        )
        return NodeView(state, time_s, residency, time_s)


class _Fleet:
    def __init__(
        self,
        stream: Stream,
        spec: NodeSpec,
        nodes: int,
        seed: int,
        policy: str,
        settings: dict[str, Any],
        alpha: float,
        heartbeat_s: float,
        network_ms: float,
    ) -> None:
        self.stream, self.spec = stream, spec
        self.outcome = empty_outcome(len(stream))
        self.nodes: list[_Node] = []
        for index in range(nodes):
            engine = EngineNode(spec, alpha, stream.rate, sampled_rows=len(stream.row_keys))
            engine.join(stream, self.outcome)
            self.nodes.append(_Node(f"node-{index}", engine))
        self.heartbeat_s, self.network_s = heartbeat_s, network_ms / 1e3
        self.now_s = 0.0
        self.all_knowing = policy == ORACLE
        self.been: dict[int, set[int]] = {}  # user -> nodes that have served it; for the oracle
        policy = "cost_ms" if self.all_knowing else policy
        chosen = RouterSettings(**({"backends": "x=http://x:1", "policy": policy} | settings))
        self.fleet = Fleet()
        self.fleet.update([Backend(each.name, each.name, 1) for each in self.nodes])
        self.speculation = SpeculativeResidency(chosen.speculative_ttl_s)
        self.chooser = Chooser(
            chosen,
            self.fleet,
            OutlierDetector(self.fleet, chosen, self._clock),
            self.speculation,
            self._clock,
            random.Random(seed),
        )
        self.trust = Trust(chosen.fresh_s, chosen.half_life_s, chosen.expire_s)
        self.views: dict[str, NodeView] = {}
        self.predicted = {"tp": 0, "fp": 0, "fn": 0, "tn": 0}
        self.node_of = np.full(len(stream), -1, np.int16)
        self.answers: list[tuple[float, int, Ticket, Choice]] = []
        self.samples: TwinSamples | None = None

    def _clock(self) -> float:
        return self.now_s

    def add_arms(
        self,
        arms: Callable[[int], Arm],
        twins: bool,
        tick_s: float,
        refill_bytes_per_s: float,
        seed: int,
    ) -> None:
        rate = min(self.spec.info.sample_rate, self.stream.rate)
        info = dataclasses.replace(self.spec.info, sample_rate=rate)
        if twins:
            self.samples = TwinSamples(self.stream, info)
        for index, node in enumerate(self.nodes):
            node.arm = arms(index)
            node.arm.start(self.spec, seed + index)
            node.observer = Observer(
                node.engine, seed + index, tick_s=tick_s, refill_bytes_per_s=refill_bytes_per_s
            )
            if twins:
                node.twin = Twin(info, clock_ns=lambda: round((1.0 + self.now_s) * 1e9))

    def run(self, tick_s: float) -> FleetRun:
        stream, nodes = self.stream, self.nodes
        ticks = tick_count(stream, tick_s)
        alpha = np.zeros((ticks, len(nodes)))
        arrivals = stream.arrival_s.tolist()
        # Heartbeats of the nodes are spread over the period.
        beats = [(index / len(nodes) * self.heartbeat_s, index) for index in range(len(nodes))]
        heapq.heapify(beats)
        tick = 0
        heard, look_s = False, 0.0
        for request, arrival_s in enumerate(arrivals):
            while (tick + 1) * tick_s <= arrival_s:
                alpha[tick] = self._tick(tick, tick_s)
                tick += 1
            while beats[0][0] <= arrival_s:
                due_s, index = beats[0]
                self.now_s = due_s
                node = nodes[index]
                self.views[node.name] = node.view(due_s, tick_ns(0, due_s))
                heapq.heapreplace(beats, (due_s + self.heartbeat_s, index))
                heard = True
            self.now_s = arrival_s
            self._answers_until(arrival_s)
            if heard and arrival_s >= look_s:
                heard, look_s = False, arrival_s + SNAPSHOT_S
                previous = self.chooser.snapshot
                snapshot = Snapshot(self.fleet.names, self.views, previous)
                self.chooser.use(CostTable(snapshot, self.trust))
            self._route(request, arrival_s)
        while tick < ticks:
            alpha[tick] = self._tick(tick, tick_s)
            tick += 1
        outcome = self.outcome
        return FleetRun(
            latency_ms=outcome.latency_ms,
            service_ms=outcome.service_ms,
            kv_hit=outcome.cached_tokens > 0,
            missed_rows=outcome.missed_rows,
            dropped=outcome.dropped,
            node=self.node_of,
            alpha=alpha,
            requests=np.bincount(self.node_of[self.node_of >= 0], minlength=len(nodes)),
            moved_bytes=np.array([node.engine.moved_bytes for node in nodes]),
            predicted=self.predicted,
        )

    def _route(self, request: int, arrival_s: float) -> None:
        stream, outcome = self.stream, self.outcome
        user, tokens = int(stream.user[request]), int(stream.tokens[request])
        facts = Facts(user, tokens, int(stream.candidates[request]), "header")
        choice = self.chooser.choose(facts)
        if not isinstance(choice, Choice):
            outcome.dropped[request] = True
            outcome.latency_ms[request] = np.nan
            return
        if self.all_knowing:
            choice = choice._replace(node=self.fleet.nodes[self._soonest(request, arrival_s)])
        index = choice.node.index
        node = self.nodes[index]
        self.node_of[request] = index
        self.speculation.put(digest_key(user), node.name, tokens, arrival_s)
        ticket = self.chooser.admit(choice)
        node.engine.take(request)
        if node.twin is not None:
            node.fresh.append(request)
        latency_ms = outcome.latency_ms[request]
        took_s = 0.0 if outcome.dropped[request] else float(latency_ms) / 1e3
        heapq.heappush(
            self.answers, (arrival_s + took_s + 2.0 * self.network_s, request, ticket, choice)
        )

    def _soonest(self, request: int, arrival_s: float) -> int:
        """The node that would answer first: its true queue, and true costs of what of the request
        is not resident there now. Rows are expected to miss as often as they have so far. Of near
        ties a holder of the user is taken, else the user's hash home: caches fill evenly."""
        stream, costs = self.stream, self.spec.costs
        user, length = int(stream.user[request]), int(stream.tokens[request])
        scored = int(stream.candidates[request])
        been = self.been.setdefault(user, set())
        engines = [node.engine for node in self.nodes]
        looked_up = sum(engine.count(moves.LOOKED_UP) for engine in engines)
        row_ms = costs.row_ms[0] * sum(engine.count(moves.MISSED) for engine in engines)
        row_ms /= max(1, looked_up)
        ends_ms = np.empty(len(engines))
        held = np.zeros(len(engines), np.int64)
        for index, engine in enumerate(engines):
            if index in been:
                residents = engine.residents()
                held[index] = min(length, int(residents.tokens[residents.users == user].sum()))
            computed = length - int(held[index])
            context = length if self.spec.context == "whole" else length - computed / 2.0
            compute_ms = costs.fixed_ms + costs.token_ms * (computed + scored)
            compute_ms += costs.token_context_ms * (computed * context + scored * length)
            rows = float(stream.candidate_lookups[request])
            rows += float(stream.history_lookups[request]) * computed / max(1, length)
            overlap = self.spec.info.cost_model == CostModel.OVERLAP
            gather_ms = rows * row_ms
            takes_ms = max(compute_ms, gather_ms) if overlap else compute_ms + gather_ms
            ends_ms[index] = engine.backlog_ms(arrival_s) + takes_ms
        ties = np.flatnonzero(ends_ms <= (1.0 + ORACLE_TIE) * ends_ms.min()).tolist()
        ties = [index for index in ties if held[index]] or ties
        home = self.fleet.ring.home(user)
        best: int = home if home in ties else min(ties, key=ends_ms.__getitem__)
        been.add(best)
        return best

    def _answers_until(self, time_s: float) -> None:
        """What the router learns from answers, as its data plane does."""
        answers, chooser = self.answers, self.chooser
        while answers and answers[0][0] <= time_s:
            _, request, ticket, choice = heapq.heappop(answers)
            chooser.release(ticket)
            key = digest_key(int(self.stream.user[request]))
            if self.outcome.dropped[request]:
                self.speculation.drop(key, choice.node.name)
                continue
            reused = bool(self.outcome.cached_tokens[request])
            if choice.kv == "hit":
                node = choice.node
                node.kv_precision += PRECISION_GAIN * (float(reused) - node.kv_precision)
                node.kv_precision = max(0.05, node.kv_precision)
                self.predicted["tp" if reused else "fp"] += 1
            else:
                self.predicted["fn" if reused else "tn"] += 1
            took_ms = float(self.outcome.service_ms[request])
            chooser.mean_service_ms += SERVICE_GAIN * (took_ms - chooser.mean_service_ms)

    def _tick(self, tick: int, tick_s: float) -> npt.NDArray[np.float64]:
        time_s = (tick + 1) * tick_s
        self.now_s = time_s
        for node in self.nodes:
            if node.arm is None or node.observer is None:
                continue
            curve = None
            if node.twin is not None and self.samples is not None:
                if node.fresh:
                    feed = [self.samples[request] for request in node.fresh]
                    node.twin.feed(feed, 0, self.spec.declares())
                    node.fresh.clear()
                curve = np.zeros((), CURVES)
                node.twin.curves(curve)
                curve["boot_epoch"] = node.engine.boot_epoch
                curve["monotonic_ns"] = tick_ns(tick, tick_s)
            action = node.arm.act(node.observer.observe(tick, time_s, curve))
            node.engine.command(action.alpha, action.refill_bytes_per_s, action.drop_only)
        return np.array([node.engine.alpha for node in self.nodes])
