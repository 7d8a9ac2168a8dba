"""From requests to a batch: which tokens are computed, in which order, with which bias.

History tokens whose KV is cached are left out; of every request the new history tokens and the
candidates remain. A batch stores all new history tokens of all requests first and all candidates
after them, so that both halves are plain slices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from hbm_pool.contracts.history import table_rows

from hbm_serving.config import ModelConfig

Ints = npt.NDArray[np.int64]
_NOWHERE: Ints = np.empty(0, dtype=np.int64)


@dataclasses.dataclass(slots=True)
class RankRequest:
    """One request as it is computed: the kept history and the candidates.

    `items`, `timestamps` `[T] int64` (and `actions`, where the model takes them), `candidates`
    `[C] int64` with C >= 1. `user` is the signed 64-bit user hash; 0: anonymous, never cached.
    """

    user: int
    items: Ints
    timestamps: Ints
    actions: Ints | None
    candidates: Ints
    query_time: int
    request_tokens: int
    """History length as sent, before old blocks were dropped."""

    @property
    def tokens(self) -> int:
        return len(self.items)


class Span(NamedTuple):
    """Where one request lies in its batch; all offsets in tokens."""

    cached: int  # history tokens whose KV is reused
    new: int  # history tokens computed now
    tokens: int  # cached + new
    candidates: int
    new_at: int  # offset among the new tokens
    history_at: int  # offset among all history tokens (cached and new)
    candidates_at: int  # offset among the candidates


class Group(NamedTuple):
    """Neighbouring requests `[first, last)` that are padded together."""

    first: int
    last: int


class Batch:
    """Requests in computing order with their offsets. No tensors of the model here.

    Sorted by size, so that groups padded together waste little: `order[i]` is the index of the
    caller's request that stands at place i.
    """

    def __init__(
        self,
        requests: Sequence[RankRequest],
        cached: Sequence[int],
        *,
        padding_waste: float = 0.25,
    ) -> None:
        self.order = sorted(
            range(len(requests)),
            key=lambda i: (requests[i].tokens - cached[i], requests[i].tokens),
        )
        self.requests = [requests[i] for i in self.order]
        self.spans: list[Span] = []
        new_at = history_at = candidates_at = 0
        for index, request in zip(self.order, self.requests, strict=True):
            new = request.tokens - cached[index]
            count = len(request.candidates)
            self.spans.append(
                Span(cached[index], new, request.tokens, count, new_at, history_at, candidates_at)
            )
            new_at += new
            history_at += request.tokens
            candidates_at += count
        self.new_tokens = new_at
        self.history_tokens = history_at
        self.candidates = candidates_at
        self.groups = _pad_groups(self.spans, padding_waste)

    @property
    def computed_tokens(self) -> int:
        return self.new_tokens + self.candidates

    @property
    def context_tokens(self) -> int:
        """Sum over computed tokens of the history tokens each attends to."""
        return sum(
            span.new * (span.cached + span.tokens + 1) // 2 + span.candidates * span.tokens
            for span in self.spans
        )

    def item_ids(self) -> Ints:
        """Item of every computed token, `[new_tokens + candidates] int64`."""
        parts = [
            request.items[span.cached :]
            for request, span in zip(self.requests, self.spans, strict=True)
        ]
        parts += [request.candidates for request in self.requests]
        return np.concatenate(parts)

    def count_by_request(self, places: Sequence[npt.NDArray[np.integer]]) -> Ints:
        """How many places among the computed tokens (as in `item_ids`) belong to each request,
        `[requests] int64` in computing order."""
        starts = [span.new_at for span in self.spans]
        starts += [self.new_tokens + span.candidates_at for span in self.spans]
        owners = np.searchsorted(starts, np.concatenate((*places, _NOWHERE)), side="right") - 1
        return np.bincount(owners % len(self.spans), minlength=len(self.spans))

    def action_rows(self) -> Ints:
        """Row of the action embedding per computed token: 0 says "none", action a is a + 1."""
        rows = np.zeros(self.computed_tokens, dtype=np.int64)
        for request, span in zip(self.requests, self.spans, strict=True):
            if request.actions is not None:
                rows[span.new_at : span.new_at + span.new] = request.actions[span.cached :] + 1
        return rows


def table_ids(model: ModelConfig, items: Ints) -> dict[str, Ints]:
    """Rows of every table that `items` look up, `[n] int64` each."""
    return {
        table.name: table_rows(items, index, table.rows, hashed=index > 0)
        for index, table in enumerate(model.tables)
    }


def _pad_groups(spans: Sequence[Span], waste: float) -> list[Group]:
    """Greedy: a request joins the group before it while padding adds at most `waste` of work."""
    groups: list[Group] = []
    first, work, widest = 0, 0, (0, 0, 0)
    for index, span in enumerate(spans):
        grown = (
            max(widest[0], span.new),
            max(widest[1], span.candidates),
            max(widest[2], span.tokens),
        )
        own = (span.new + span.candidates) * max(1, span.tokens)
        padded = (index - first + 1) * (grown[0] + grown[1]) * max(1, grown[2])
        if index > first and padded > (1.0 + waste) * (work + own):
            groups.append(Group(first, index))
            first, work = index, 0
            grown = (span.new, span.candidates, span.tokens)
        work += own
        widest = grown
    groups.append(Group(first, len(spans)))
    return groups


# -- relative bias ---------------------------------------------------------------------------


def position_bucket(distance: Ints, buckets: int) -> Ints:
    """Bucket of a token distance >= 0: exact up to 8, then two per octave, capped.

    As T5's relative buckets (Raffel et al., JMLR 2020, section 2.1) in shape.
    """
    far = 8 + _half_octave(np.maximum(distance, 8)) - 6
    return np.minimum(np.where(distance < 8, distance, far), buckets - 1)


def _half_octave(value: Ints) -> Ints:
    """Two buckets per octave of an integer >= 1, read from the bits of its float32."""
    bits = value.astype(np.float32).view(np.int32) >> 22
    return bits.astype(np.int64) - 254


def time_bucket(seconds: torch.Tensor, buckets: int) -> torch.Tensor:
    """Bucket of a time difference `int64` (any shape) -> `int32`: two per octave, capped.

    HSTU buckets log(t_i - t_j) too (generative-recommenders, `RelativeBucketedTimeAndPosition
    BasedBias`); here the logarithm is read from the bits of the float32, exact on every device
    and for every shape. Differences below 1 share bucket 0.
    """
    bits = seconds.clamp(min=1).to(torch.float32).view(torch.int32)
    return (bits >> 22).sub_(254).clamp_(max=buckets - 1)


class BiasIndex:
    """Index into a layer's bias table for every (query, key) pair of a group.

    A layer's table has `(position_buckets + 1) * time_buckets` entries: the last row of buckets
    is the future and holds `MASKED`, so the causal mask costs nothing extra.
    """

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        attention = model.attention
        self.time_buckets = attention.time_buckets
        self.future = attention.position_buckets
        self.entries = (attention.position_buckets + 1) * attention.time_buckets
        reach = model.max_sequence_tokens
        distance = np.arange(-reach, reach + 1, dtype=np.int64)
        buckets = position_bucket(np.maximum(distance, 0), attention.position_buckets)
        buckets[distance < 0] = self.future
        self._reach = reach
        self._position_entry = torch.from_numpy(buckets * attention.time_buckets).to(
            device=device, dtype=torch.int32
        )
        self._arange = torch.arange(reach + 1, device=device)
        self.own = 0  # distance 0, time difference 0

    def history(self, times: torch.Tensor, cached: torch.Tensor, new: int) -> torch.Tensor:
        """`times` [G, T] int64, `cached` [G] int64 -> [G, new, T] int32.

        Row r of a group is the token at position `cached + r`; rows past a shorter request's end
        hold values nobody reads.
        """
        tokens = times.shape[1]
        rows = cached[:, None] + self._arange[:new]
        own_time = times.gather(1, rows.clamp(max=max(tokens - 1, 0)))
        position = (rows[:, :, None] - self._arange[:tokens]).clamp_(-self._reach, self._reach)
        return self._combine(position, own_time[:, :, None] - times[:, None, :])

    def candidates(
        self, times: torch.Tensor, tokens: torch.Tensor, query_time: torch.Tensor
    ) -> torch.Tensor:
        """`times` [G, T], `tokens`, `query_time` [G] int64 -> [G, 1, T] int32.

        All candidates of a request stand at the position after its history, at the query time.
        """
        width = times.shape[1]
        distance = tokens[:, None] - self._arange[:width]
        index = self._combine(distance.clamp(min=0), query_time[:, None] - times)
        masked = self.future * self.time_buckets
        return index.masked_fill_(distance <= 0, masked)[:, None, :]

    def _combine(self, distance: torch.Tensor, seconds: torch.Tensor) -> torch.Tensor:
        flat = (distance + self._reach).view(-1)
        entry = self._position_entry.index_select(0, flat).view(distance.shape)
        return entry.add_(time_bucket(seconds, self.time_buckets))
