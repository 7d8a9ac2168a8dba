"""Which node gets a request. Pure but for the state passed in: clock and generator are arguments.

| policy | rule |
|---|---|
| `cost_ms` | least cost in ms (`cost`); near ties: a holder, else the hash home, else two choices |
| `weighted` | best w_kv·h_kv + w_emb·h_emb + w_ld·(1 − load); is it over 0.85 full, least loaded |
| `chwbl` | hash home of the user within bounded load; anonymous requests: two choices |
| `least_load` | least queue + own requests, in ms; without heartbeats fewest requests in flight |
| `p2c` | of two random nodes the one with fewer requests in flight |
| `round_robin` | one after the other |

`cost_ms` and `weighted` need what nodes say about themselves; when nothing of it can be believed
any more they fall back to `chwbl` (`why=stale`, or `why=hash` where there never was any).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

import numpy as np
from hbm_pool.contracts.identity import digest_key

from hbm_router.choice import Choice, Facts, NodeCost
from hbm_router.config import Policy, RouterSettings
from hbm_router.cost import CostTable, Trust, computed_ms, saved_ms
from hbm_router.fleet import Fleet, Node, Ticket
from hbm_router.memory import SpeculativeResidency
from hbm_router.outlier import OutlierDetector
from hbm_router.snapshot import Snapshot
from hbm_router.wire import Refusal

REFRESH_S: Final = 0.02
"""Trust falls slowly: its arrays are good for this long."""
SPECULATIVE_HIT: Final = 0.95
"""P(hit) where a user was just sent: the request before may have failed or been served uncached."""
_INF: Final = float("inf")


class Chooser:
    """Chooses nodes of a fleet; lives on the data path's event loop."""

    def __init__(
        self,
        settings: RouterSettings,
        fleet: Fleet,
        outlier: OutlierDetector,
        speculation: SpeculativeResidency,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._settings = settings
        self._policy = settings.policy
        self._fleet = fleet
        self._outlier = outlier
        self._speculation = speculation
        self._clock = clock
        self._rng = rng
        self._trust = Trust(settings.fresh_s, settings.half_life_s, settings.expire_s)
        self._turn = 0
        self.mean_service_ms = 1.0
        """Moving average of what servers report: the work of a request where nothing is known."""
        self.informed = False
        """Whether anything the nodes said is still believed."""
        self._computing: dict[int, Ticket] = {}
        """Digest key -> the user's oldest request in flight: what it computes, later ones reuse."""
        self._open: list[bool] = []
        self._open_list: list[int] = []
        self._sheds = settings.max_queue_ms > 0 or settings.shed_over_deadline
        self._health_version = -1
        self._take(CostTable(Snapshot(fleet.names, {}), self._trust))

    # -- state

    def use(self, table: CostTable) -> None:
        """Takes over a new snapshot's table; its names must be those of the fleet."""
        if table.snapshot.names != self._fleet.names:
            views = {
                name: view
                for name, view in zip(table.snapshot.names, table.snapshot.views, strict=True)
                if view is not None
            }
            table = CostTable(Snapshot(self._fleet.names, views), self._trust)
        before = self._heard
        self._take(table)
        for node in self._fleet.nodes:
            heard_s = float(table.heard_s[node.index])
            if heard_s > -_INF and before.get(node.name) != heard_s:
                node.heard()

    def table(self, snapshot: Snapshot) -> CostTable:
        """Builds the table of a snapshot; may run in another thread."""
        return CostTable(snapshot, self._trust)

    def fleet_changed(self) -> None:
        """The list of nodes is another one: what is known of those that stayed is kept."""
        self.use(self._table)

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot in use."""
        return self._table.snapshot

    def _take(self, table: CostTable) -> None:
        self._table = table
        self._snapshot = table.snapshot
        self._heard = dict(zip(table.snapshot.names, table.heard_s.tolist(), strict=True))
        count = len(table.snapshot.names)
        self._own = [0.0] * count
        self._base = [0.0] * count  # all but the request's own computation and our requests
        self._live = np.zeros(count)  # base + own
        self._total = np.empty(count)
        self._scratch = np.empty(count)
        self._token_list: list[float] = table.token_ms.tolist()
        self._context_list: list[float] = table.context_ms.tolist()
        self._fixed_list: list[float] = table.fixed_ms.tolist()
        self._load_trust = [0.0] * count
        self._kv_trust = [0.0] * count
        self._queue_list = [0.0] * count
        self._arrays_until_s = -_INF

    def _refresh(self, now_s: float) -> None:
        """Brings trust, health and load up to date."""
        usable = self._outlier.usable(now_s)
        table = self._table
        self._load_trust = table.load_trust(now_s).tolist()
        self._kv_trust = table.residency_trust(now_s).tolist()
        open_nodes = [ok and not drain for ok, drain in zip(usable, table.draining, strict=True)]
        if not any(open_nodes):
            open_nodes = list(usable)
        self._open = open_nodes
        self._open_list = [index for index, is_open in enumerate(open_nodes) if is_open]
        trust = np.array(self._load_trust)
        base = table.fixed_ms + trust * table.queue_ms
        base[~np.array(open_nodes, dtype=np.bool_)] = _INF
        self._base = base.tolist()
        self._queue_list = (trust * table.queue_ms).tolist()
        self.informed = bool((trust > 0.0).any())
        for node in self._fleet.nodes:
            self.touch(node)
        self._health_version = self._outlier.version
        self._arrays_until_s = now_s + REFRESH_S

    def touch(self, node: Node) -> None:
        """The node's requests in flight have changed."""
        index = node.index
        if 0 <= index < len(self._own):
            own = self._own[index] = node.inflight_ms - self._load_trust[index] * node.before_ms
            self._live[index] = self._base[index] + own

    def admit(self, choice: Choice) -> Ticket:
        """Counts a request onto its node."""
        user = choice.facts.user
        if user is None:
            ticket = self._fleet.admit(choice.node, choice.work_ms)
        else:
            key = digest_key(user)
            ticket = self._fleet.admit(
                choice.node, choice.work_ms, key, choice.facts.history_tokens
            )
            self._computing.setdefault(key, ticket)
        self.touch(choice.node)
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Takes it off again."""
        self._fleet.release(ticket)
        key = ticket.user_key
        if key is not None and self._computing.get(key) is ticket:
            del self._computing[key]
        self.touch(ticket.node)

    # -- choosing

    def choose(self, facts: Facts, exclude: Node | None = None) -> Choice | Refusal:
        """The node for a request; `exclude` names one that has just failed it."""
        now_s = self._clock()
        self._outlier.usable(now_s)
        if now_s >= self._arrays_until_s or self._health_version != self._outlier.version:
            self._refresh(now_s)
        without = exclude.index if exclude is not None else -1
        candidates = self._open_list
        if without >= 0:
            candidates = [index for index in candidates if index != without]
        if not candidates:
            return Refusal(503, "no_backends", "no backend is available", True, 1)
        holders = self._holders(facts.user, now_s) if facts.user is not None else {}
        if facts.source == "none" and holders:
            facts = facts._replace(history_tokens=max(tokens for _, tokens in holders.values()))

        policy = self._policy
        work_ms: float | None = None
        if policy is Policy.COST_MS and self.informed:
            shared = self._shared(facts, holders)
            index, why = self._least_cost(facts, holders, without, shared)
            if index != shared[0]:
                work_ms = float(self._total[index]) - self._waiting_ms(index)
        elif policy is Policy.WEIGHTED and self.informed:
            index, why = self._weighted(facts, holders, candidates)
        elif policy is Policy.LEAST_LOAD:
            index, why = self._least_loaded(candidates), "least_load"
        elif policy is Policy.P2C:
            index, why = self._two_choices(candidates), "p2c"
        elif policy is Policy.ROUND_ROBIN:
            self._turn += 1
            index, why = candidates[self._turn % len(candidates)], "round_robin"
        else:
            index, why = self._by_hash(facts, candidates)
        if self._sheds:
            refusal = self._over_limits(facts, index, holders, candidates)
            if refusal is not None:
                return refusal
        if work_ms is None:
            work_ms = self._work(facts, holders, index)
        return self._choice(facts, holders, index, why, work_ms)

    def _holders(self, user: int | None, now_s: float) -> dict[int, tuple[float, int]]:
        """Index -> (P(hit), cached tokens) of the nodes that may hold the user."""
        if user is None:
            return {}
        nodes = self._fleet.nodes
        key = digest_key(user)
        found = {
            index: (self._kv_trust[index] * nodes[index].kv_precision, tokens)
            for index, tokens in self._snapshot.holders(key)
        }
        lately = self._speculation.get(key, now_s)
        if lately is not None:
            node = self._fleet.by_name.get(lately.node)
            if node is not None:
                self._expect(found, node, lately.tokens)
        computing = self._computing.get(key)
        if computing is not None and computing.node.index >= 0:
            self._expect(found, computing.node, computing.history_tokens)
        return found

    @staticmethod
    def _expect(found: dict[int, tuple[float, int]], node: Node, tokens: int) -> None:
        probability, known = found.get(node.index, (0.0, 0))
        found[node.index] = (
            max(probability, SPECULATIVE_HIT * node.kv_precision),
            max(tokens, known),
        )

    def _shared(self, facts: Facts, holders: dict[int, tuple[float, int]]) -> tuple[int, float]:
        """(index, ms): where the user's history is being computed right now, and how much of the
        wait for it is no reason to go elsewhere; (-1, 0) when nothing of the user is in flight.

        Computing it a second time would take that time from the other node's users. At most what
        is saved there counts, so that many requests of one user at once still spread.
        """
        if facts.user is None or not self._computing:
            return -1, 0.0
        first = self._computing.get(digest_key(facts.user))
        index = first.node.index if first is not None else -1
        if first is None or index < 0:
            return -1, 0.0
        probability, tokens = holders[index]
        saved = probability * saved_ms(
            self._token_list[index],
            self._context_list[index],
            min(tokens, facts.history_tokens),
        )
        return index, min(first.work_ms, saved, self._waiting_ms(index))

    def _least_cost(
        self,
        facts: Facts,
        holders: dict[int, tuple[float, int]],
        without: int,
        shared: tuple[int, float],
    ) -> tuple[int, str]:
        settings, table = self._settings, self._table
        total, scratch = self._total, self._scratch
        length, candidates = facts.history_tokens, facts.candidates
        # A float times an array is a microsecond faster than an integer times it.
        np.multiply(table.token_ms, float(length + candidates), out=total)
        np.multiply(table.context_ms, length * (length / 2 + candidates), out=scratch)
        total += scratch
        total += self._live
        for index, (probability, tokens) in holders.items():
            cached = min(tokens, length)
            total[index] -= probability * saved_ms(
                self._token_list[index], self._context_list[index], cached
            )
        if shared[0] >= 0:
            total[shared[0]] -= shared[1]
        if without >= 0:
            total[without] = _INF
        best = int(total.argmin())
        best_ms = float(total[best])
        threshold = best_ms + max(settings.tie_ms, settings.tie_ratio * best_ms)
        if facts.deadline_ms is not None and best_ms <= facts.deadline_ms < threshold:
            threshold = facts.deadline_ms
        ties: list[int] = (total <= threshold).nonzero()[0].tolist()
        if len(ties) == 1:
            return best, "cost"
        if holders:
            # A second copy of a user's KV costs every later request of others its room.
            held = [index for index in ties if index in holders]
            if held:
                ties = held
        elif facts.user is not None:
            home = self._fleet.ring.home(facts.user)
            if home in ties:
                return home, "home"
        if len(ties) == 1:
            return ties[0], "cost"
        return self._two_choices(ties), "tie"

    def _weighted(
        self, facts: Facts, holders: dict[int, tuple[float, int]], candidates: list[int]
    ) -> tuple[int, str]:
        """The rule of arXiv 2605.04450: unitless scores, for comparison."""
        scores = {index: self._score(facts, holders, index) for index in candidates}
        best = max(candidates, key=scores.__getitem__)
        if self._load(best) > self._settings.weighted_spill_load:
            return min(candidates, key=self._load), "spill"
        return best, "weighted"

    def _score(self, facts: Facts, holders: dict[int, tuple[float, int]], index: int) -> float:
        settings = self._settings
        probability, tokens = holders.get(index, (0.0, 0))
        h_kv = probability * (
            min(1.0, tokens / facts.history_tokens) if facts.history_tokens else 1
        )
        return (
            settings.weight_kv * h_kv
            + settings.weight_emb * self._covered(facts, index)
            + settings.weight_load * (1.0 - self._load(index))
        )

    def _covered(self, facts: Facts, index: int) -> float:
        """Resident share of the user's top shards; of all lookups where those are unknown."""
        coverage = self._table.coverage[index]
        view = self._snapshot.views[index]
        if view is None:
            return 0.0
        if coverage is None or not facts.shards or len(coverage) == 0:
            return 1.0 - view.state.emb_miss_ratio
        inside = [shard for shard in facts.shards if shard < len(coverage)]
        return float(coverage[inside].mean()) if inside else 0.0

    def _load(self, index: int) -> float:
        """Queue and own requests as a share of a full node, 0..1."""
        return min(1.0, self._waiting_ms(index) / self._settings.weighted_full_ms)

    def _waiting_ms(self, index: int) -> float:
        return self._queue_list[index] + self._own[index]

    def _least_loaded(self, candidates: list[int]) -> int:
        nodes = self._fleet.nodes
        if self.informed:
            return min(candidates, key=lambda i: (self._waiting_ms(i), nodes[i].inflight))
        fewest = min(nodes[index].inflight for index in candidates)
        return self._rng.choice([i for i in candidates if nodes[i].inflight == fewest])

    def _two_choices(self, candidates: list[int]) -> int:
        """Power of two choices (Mitzenmacher 2001) on requests in flight."""
        count = len(candidates)
        if count == 1:
            return candidates[0]
        first = int(self._rng.random() * count)
        second = int(self._rng.random() * (count - 1))
        a, b = candidates[first], candidates[second + (second >= first)]
        nodes = self._fleet.nodes
        return a if nodes[a].inflight <= nodes[b].inflight else b

    def _by_hash(self, facts: Facts, candidates: list[int]) -> tuple[int, str]:
        if facts.user is None:
            return self._two_choices(candidates), "p2c"
        allowed = set(candidates)
        placement = self._fleet.ring.place(
            facts.user,
            [node.inflight for node in self._fleet.nodes],
            allowed.__contains__,
            self._settings.bound,
        )
        assert placement is not None, "there is at least one candidate"
        if placement.spilled:
            return placement.node, "spill"
        stale = self._policy is not Policy.CHWBL and bool(self._table.known.any())
        return placement.node, "stale" if stale else "hash"

    # -- results

    def _over_limits(
        self,
        facts: Facts,
        index: int,
        holders: dict[int, tuple[float, int]],
        candidates: list[int],
    ) -> Refusal | None:
        settings = self._settings
        if settings.max_queue_ms and self.informed:
            shortest = min(self._waiting_ms(candidate) for candidate in candidates)
            if shortest > settings.max_queue_ms:
                message = f"every backend would queue longer than {settings.max_queue_ms} ms"
                return Refusal(429, "overload", message, True, 1)
        if settings.shed_over_deadline and facts.deadline_ms is not None and self.informed:
            least = min(self._cost(facts, holders, candidate) for candidate in candidates)
            if least > facts.deadline_ms:
                message = (
                    f"the best backend would take {least:.1f} ms, "
                    f"the deadline is {facts.deadline_ms:g} ms"
                )
                return Refusal(429, "deadline", message, True, 1)
        return None

    def _work(self, facts: Facts, holders: dict[int, tuple[float, int]], index: int) -> float:
        """Expected ms that the request occupies the node."""
        if not self.informed:
            return self.mean_service_ms
        token_ms, context_ms = self._token_list[index], self._context_list[index]
        work = self._fixed_list[index] + computed_ms(
            token_ms, context_ms, facts.history_tokens, facts.candidates
        )
        probability, tokens = holders.get(index, (0.0, 0))
        return work - probability * saved_ms(
            token_ms, context_ms, min(tokens, facts.history_tokens)
        )

    def _cost(self, facts: Facts, holders: dict[int, tuple[float, int]], index: int) -> float:
        return self._work(facts, holders, index) + self._waiting_ms(index)

    def _choice(
        self,
        facts: Facts,
        holders: dict[int, tuple[float, int]],
        index: int,
        why: str,
        work_ms: float,
    ) -> Choice:
        probability, tokens = holders.get(index, (0.0, 0))
        if facts.user is None:
            kv = "none"
        elif probability >= 0.5 and tokens >= self._table.page_tokens[index]:
            kv = "hit"
        elif not self.informed:
            kv = "unknown"
        else:
            kv = "miss"
        return Choice(
            node=self._fleet.nodes[index],
            est_ms=work_ms + self._waiting_ms(index) if self.informed else None,
            work_ms=work_ms,
            hit_probability=probability,
            kv=kv,
            why=why,
            facts=facts,
        )

    def explain(self, facts: Facts) -> list[NodeCost]:
        """Every node's cost for a request, as the next `choose` would see it."""
        now_s = self._clock()
        self._refresh(now_s)
        holders = self._holders(facts.user, now_s)
        shared_index, shared_ms = self._shared(facts, holders)
        lines = []
        for index, node in enumerate(self._fleet.nodes):
            probability, tokens = holders.get(index, (0.0, 0))
            lines.append(
                NodeCost(
                    name=node.name,
                    usable=self._open[index],
                    cost_ms=self._cost(facts, holders, index)
                    - (shared_ms if index == shared_index else 0.0)
                    if self.informed
                    else None,
                    queue_ms=self._queue_list[index],
                    own_ms=self._own[index],
                    hit_probability=probability,
                    cached_tokens=tokens,
                    trust=self._load_trust[index],
                    inflight=node.inflight,
                    score=self._score(facts, holders, index)
                    if self._policy is Policy.WEIGHTED and self.informed
                    else None,
                )
            )
        return lines

    def trust_of(self, index: int) -> float:
        """Trust in a node's words as of the last decision, 0..1."""
        return self._load_trust[index] if index < len(self._load_trust) else 0.0
