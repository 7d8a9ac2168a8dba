"""What a request would cost on each node, in milliseconds.

    cost(n) = fixed(n)
            + (token(n) + row(n)) * (L + C) + context(n) * (L * L / 2 + L * C)        all computed
            - P(hit, n) * [(token(n) + row(n)) * c + context(n) * c * c / 2]           less reuse
            + queue(n) + own(n) - shared(n)

with L history tokens, C candidates, c = min(cached tokens, L), and

    row(n)   = cost_row_ms * rows_per_token * emb_miss_ratio      expected misses per computed token
    queue(n) = trust(n) * queue_ms
    own(n)   = work of our own requests in flight - trust(n) * the part sent before the heartbeat
    shared(n) = min(work of the user's oldest request in flight on n, what reuse saves, the wait)
    P(hit,n) = trust of the digest * the node's record of predictions that came true

Why each term exists
* Everything is in ms and comes from the node's own measurements, so that another GPU, another α or
  another model version changes the choice without any configuration here. Scores normalised to 0..1
  lose exactly that: queues of 0 and 1 would weigh like queues of 0 and 100.
* A hit saves the computation of the cached tokens *and* their row lookups.
* `queue` is as old as the heartbeat. Between heartbeats every router would send its next hundred
  requests to the node that was idle; `own` adds what this router has sent since.
* Requests sent before the heartbeat are part of the queue that it reports; as trust in it falls
  they count as our own again, until with no trust left the load is what we know first hand.
* `shared`: the second of two concurrent requests of a user waits for the first and reuses what it
  computed. Going elsewhere may be quicker for that user, but computes the history twice, at the
  cost of everybody else there; so that wait is not held against the node, up to what is saved.

When a signal is missing
* a node that said nothing: the medians of the others, no residency, own requests only;
* a node whose words are old: trust is 1 up to `fresh_s`, then halves each `half_life_s`, and is 0
  from `expire_s` on. Its cost constants are kept: hardware does not age in seconds;
* no node with any trust left: there is no cost; `choose` falls back to bounded hashing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hbm_router.snapshot import Snapshot

Array = npt.NDArray[np.float64]


class Trust(NamedTuple):
    """How belief in a node's words falls with their age, seconds."""

    fresh_s: float
    half_life_s: float
    expire_s: float

    def at(self, age_s: Array) -> Array:
        """Ages `[n]` -> trust `[n]` in 0..1."""
        stale = np.maximum(age_s - self.fresh_s, 0.0)
        trust = np.exp2(-stale / self.half_life_s)
        return np.where(age_s >= self.expire_s, 0.0, trust)


class CostTable:
    """Cost constants of one snapshot as arrays over its nodes. Immutable."""

    __slots__ = (
        "_trust",
        "context_ms",
        "coverage",
        "draining",
        "fixed_ms",
        "heard_s",
        "known",
        "page_tokens",
        "queue_ms",
        "residency_heard_s",
        "snapshot",
        "token_ms",
    )

    def __init__(self, snapshot: Snapshot, trust: Trust) -> None:
        views = snapshot.views
        self.snapshot = snapshot
        self._trust = trust
        self.known = np.array([view is not None for view in views], dtype=np.bool_)
        self.heard_s = np.array(
            [view.heard_s if view is not None else -np.inf for view in views], dtype=np.float64
        )
        self.residency_heard_s = np.array(
            [
                view.residency_heard_s
                if view is not None and view.residency is not None
                else -np.inf
                for view in views
            ],
            dtype=np.float64,
        )
        states = [view.state if view is not None else None for view in views]
        self.queue_ms = np.array([s.queue_ms if s else 0.0 for s in states], dtype=np.float64)
        self.draining = np.array([bool(s and s.draining) for s in states], dtype=np.bool_)
        self.page_tokens = [max(1, s.page_tokens) if s else 1 for s in states]
        self.coverage = _coverage(snapshot)
        self.fixed_ms = self._or_median([s.cost_fixed_ms if s else 0.0 for s in states])
        self.context_ms = self._or_median([s.cost_token_context_ms if s else 0.0 for s in states])
        self.token_ms = self._or_median(
            [
                s.cost_token_ms + s.cost_row_ms * s.rows_per_token * s.emb_miss_ratio if s else 0.0
                for s in states
            ]
        )

    def _or_median(self, values: list[float]) -> Array:
        array = np.array(values, dtype=np.float64)
        if self.known.any():
            array[~self.known] = float(np.median(array[self.known]))
        return array

    def load_trust(self, now_s: float) -> Array:
        """Trust in each node's load, `[n]`."""
        return self._trust.at(now_s - self.heard_s)

    def residency_trust(self, now_s: float) -> Array:
        """Trust in each node's residency, `[n]`; 0 where none is known."""
        return self._trust.at(now_s - self.residency_heard_s)


def _coverage(snapshot: Snapshot) -> list[npt.NDArray[np.float64] | None]:
    """Per node `[s]`: resident rows of each shard over what the best node holds of it, 0..1."""
    rows = [
        view.residency.shard_rows if view and view.residency else None for view in snapshot.views
    ]
    most: dict[int, Array] = {}
    for counts in rows:
        if counts is not None:
            best = most.setdefault(len(counts), np.ones(len(counts)))
            np.maximum(best, counts, out=best)
    return [counts / most[len(counts)] if counts is not None else None for counts in rows]


def saved_ms(token_ms: float, context_ms: float, cached_tokens: int) -> float:
    """What reusing `cached_tokens` of a history saves on a node."""
    return token_ms * cached_tokens + context_ms * cached_tokens * cached_tokens / 2


def computed_ms(token_ms: float, context_ms: float, history_tokens: int, candidates: int) -> float:
    """What computing a whole request costs on a node, less its fixed part."""
    return token_ms * (history_tokens + candidates) + context_ms * (
        history_tokens * history_tokens / 2 + history_tokens * candidates
    )
