"""A trace: who asks when, with which history and candidates. Made by `generate` or `reader`."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
from hbm_pool.contracts.history import first_kept_token
from hbm_pool.contracts.identity import user_hash

from hbm_load.histories import Events, Histories


class TraceRequest(NamedTuple):
    """One request as the client sends it."""

    user_id: str
    user: int  # int64 hash of user_id, as every API below the HTTP header uses it
    items: npt.NDArray[np.int64]  # [T] history, oldest first
    timestamps: npt.NDArray[np.int64]  # [T] Unix s
    candidates: npt.NDArray[np.int64]  # [C]
    query_time: int  # Unix s
    regime: str


@dataclasses.dataclass(frozen=True)
class Trace:
    """Requests in order of their intended time. Columns have one entry per request.

    Histories of a user only grow from request to request, so cached prefixes stay valid.
    """

    name: str
    seed: int
    catalogue: int  # items; ids are below it
    labels: tuple[str, ...]  # names of the regimes
    time_s: npt.NDArray[np.float64]  # [n] intended time since the start of the trace
    regime: npt.NDArray[np.int16]  # [n] index into labels
    settled: npt.NDArray[np.bool_]  # [n] past the leading part of its step (Scenario.settle_share)
    user: npt.NDArray[np.int64]  # [n] index into histories
    history_length: npt.NDArray[np.int64]  # [n]
    query_time: npt.NDArray[np.int64]  # [n] Unix s
    candidate_offsets: npt.NDArray[np.int64]  # [n + 1] into candidates
    candidates: npt.NDArray[np.int64]
    histories: Histories
    history_limit: int = 4096
    """Longest history that is sent; of a longer one whole blocks are left out at the start."""
    history_block: int = 1024

    def __len__(self) -> int:
        return len(self.time_s)

    @property
    def duration_s(self) -> float:
        """Intended time of the last request; 0 for an empty trace."""
        return float(self.time_s[-1]) if len(self) else 0.0

    def user_id(self, index: int) -> str:
        """The user of request `index`, as in X-User-ID."""
        return self.histories.name(int(self.user[index]))

    def history(self, index: int) -> Events:
        """History of request `index`, as its user has it at that moment."""
        length = int(self.history_length[index])
        events = self.histories.events(int(self.user[index]), length)
        start = first_kept_token(length, self.history_limit, self.history_block)
        return Events(events.items[start:], events.timestamps[start:])

    def request(self, index: int) -> TraceRequest:
        """Everything about request `index`."""
        user_id = self.user_id(index)
        history = self.history(index)
        start, stop = self.candidate_offsets[index], self.candidate_offsets[index + 1]
        return TraceRequest(
            user_id=user_id,
            user=user_hash(user_id),
            items=history.items,
            timestamps=history.timestamps,
            candidates=self.candidates[start:stop],
            query_time=int(self.query_time[index]),
            regime=self.labels[self.regime[index]],
        )

    def subset(self, indices: npt.NDArray[np.int64]) -> Trace:
        """The requests at `indices` (ascending): for example those that one node served."""
        lengths = np.diff(self.candidate_offsets)[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        starts = np.repeat(self.candidate_offsets[:-1][indices] - offsets[:-1], lengths)
        return dataclasses.replace(
            self,
            time_s=self.time_s[indices],
            regime=self.regime[indices],
            settled=self.settled[indices],
            user=self.user[indices],
            history_length=self.history_length[indices],
            query_time=self.query_time[indices],
            candidate_offsets=offsets,
            candidates=self.candidates[starts + np.arange(len(starts))],
        )

    def compressed(self, duration_s: float, max_rate_per_s: float) -> Trace:
        """The leading requests, replayed within `duration_s` at no more than a mean rate.

        For logs, whose own clock may span days; gaps keep their proportions. As many parts as
        before, of what is left.
        """
        if not (duration_s > 0.0 and max_rate_per_s > 0.0):
            raise ValueError(
                f"duration {duration_s} s and rate {max_rate_per_s}/s must both be above 0"
            )
        kept = np.arange(min(len(self), max(1, int(duration_s * max_rate_per_s))), dtype=np.int64)
        part = self.subset(kept)
        # One mean gap after the last request, so that the rate is the one asked for.
        span = float(part.time_s[-1] - part.time_s[0]) * (len(part) + 1) / len(part)
        scale = duration_s / span if span > 0.0 else 0.0
        regime, settled = equal_parts(len(part), len(self.labels))
        return dataclasses.replace(
            part, time_s=(part.time_s - part.time_s[0]) * scale, regime=regime, settled=settled
        )

    def fingerprint(self) -> str:
        """Hash of all columns and of a sample of histories: equal traces, equal hash."""
        digest = xxhash.xxh3_64()
        for column in (
            self.time_s,
            self.regime,
            self.settled,
            self.user,
            self.history_length,
            self.query_time,
            self.candidate_offsets,
            self.candidates,
        ):
            digest.update(np.ascontiguousarray(column).tobytes())
        for index in np.linspace(0, len(self) - 1, min(64, len(self))).astype(int):
            history = self.history(int(index))
            digest.update(self.user_id(int(index)).encode())
            digest.update(np.ascontiguousarray(history.items).tobytes())
            digest.update(np.ascontiguousarray(history.timestamps).tobytes())
        return digest.hexdigest()


def earlier_sum(
    user: npt.NDArray[np.int64], amount: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Per request the sum of `amount` over the same user's earlier requests, `[n] int64`.

    `user` holds indices from 0 on.
    """
    order = np.argsort(user, kind="stable")
    running = np.cumsum(amount[order]) - amount[order]
    starts = np.searchsorted(user[order], np.arange(int(user.max(initial=-1)) + 1))
    earlier = np.empty(len(user), dtype=np.int64)
    earlier[order] = running - running[starts][user[order]]
    return earlier


def equal_parts(count: int, parts: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.bool_]]:
    """`Trace.regime` and `Trace.settled` of a log: parts of equally many requests, the second half
    of each settled."""
    position = np.arange(count) * parts / count
    return position.astype(np.int16), position % 1.0 >= 0.5
