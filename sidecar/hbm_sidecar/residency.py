"""Who is resident on the server, kept in step through the residency ring and its snapshots.

Events are applied as they come. After a gap in the ring nobody knows what was lost, so the mirror
asks for a snapshot, keeps its last good content meanwhile, and collects the events behind the gap.
A snapshot that was taken behind the gap replaces everything; collected events newer than it are
applied on top, and the mirror is exact again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.records import ResidencyEvent, ResidencySnapshot, UserCached


class ResidencyView(NamedTuple):
    """What a digest says: users with their tokens, those last heard of last, and coverage as last
    snapshotted."""

    users: npt.NDArray[np.int64]  # [n]
    tokens: npt.NDArray[np.uint32]  # [n]
    shard_rows: npt.NDArray[np.uint32]  # [s], empty until the first snapshot
    sequence: int

    def most_tokens(self, limit: int) -> ResidencyView:
        """At most `limit` of the users: those with the most tokens, of equal ones those heard of
        last.

        A router that does not know of a user's KV may have it all computed again, which costs by
        its tokens.
        """
        if len(self.users) <= limit:
            return self
        kept = np.sort(np.argsort(self.tokens, kind="stable")[-limit:])
        return self._replace(users=self.users[kept], tokens=self.tokens[kept])


class ResidencyMirror:
    """One server's resident users. Not thread-safe: one task feeds and reads it."""

    def __init__(self) -> None:
        self.boot_epoch = 0
        self.sequence = 0
        """Of the newest event applied."""
        self.exact = False
        """False from a gap until a snapshot behind it has been taken over."""
        self.version = 0
        """Grows with every change of content."""
        self.gaps = 0
        self.snapshots = 0
        self.shard_rows: npt.NDArray[np.uint32] = np.zeros(0, dtype=np.uint32)
        self._tokens: dict[int, int] = {}
        self._behind_gap: list[ResidencyEvent] = []
        self._needed = 0
        self._snapshot_sequence = -1

    def __len__(self) -> int:
        return len(self._tokens)

    def restart(self, boot_epoch: int, newest: int) -> None:
        """Another server, or the first one seen: start empty and wait for a snapshot.

        `newest`: residency sequence of its telemetry.
        """
        self.boot_epoch = boot_epoch
        self.sequence = 0
        self.version += 1
        self.shard_rows = np.zeros(0, dtype=np.uint32)
        self._tokens.clear()
        self._snapshot_sequence = -1
        self._wait_for_snapshot(newest)

    def feed(self, events: Iterable[ResidencyEvent], gap: bool, newest: int) -> None:
        """Take over what `ServerView.read_residency` returned: events, and whether more were lost.

        A jump in the sequence is a gap even when the ring did not report one. `newest`: residency
        sequence of the telemetry, read before the ring.
        """
        for event in events:
            if event.sequence <= self.sequence:
                continue
            if event.sequence != self.sequence + 1:
                if self.exact:
                    self.gaps += 1
                if self.exact or self._behind_gap:
                    self._wait_for_snapshot(newest)
            self._apply(event)
            if not self.exact:
                if not self._behind_gap:
                    self._needed = event.sequence - 1
                self._behind_gap.append(event)
        # The second case: telemetry tells of events that are neither in the ring nor here.
        if gap or (self.exact and self.sequence < newest):
            self.gaps += 1
            self._wait_for_snapshot(newest)

    def take(self, snapshot: ResidencySnapshot) -> bool:
        """Take over a snapshot; False: of another boot, from before the gap, or no news."""
        if snapshot.boot_epoch != self.boot_epoch or snapshot.sequence < self._snapshot_sequence:
            return False
        if not self.exact:
            if snapshot.sequence < self._needed:
                return False
            self._replace(snapshot)
        elif np.array_equal(snapshot.shard_rows, self.shard_rows):
            return False
        self.shard_rows = snapshot.shard_rows.copy()
        self._snapshot_sequence = snapshot.sequence
        self.snapshots += 1
        self.version += 1
        return True

    def view(self) -> ResidencyView:
        """Content as arrays, `[n]`."""
        count = len(self._tokens)
        return ResidencyView(
            users=np.fromiter(self._tokens.keys(), dtype=np.int64, count=count),
            tokens=np.fromiter(self._tokens.values(), dtype=np.uint32, count=count),
            shard_rows=self.shard_rows,
            sequence=self.sequence,
        )

    def _wait_for_snapshot(self, needed: int) -> None:
        self.exact = False
        self._needed = needed
        self._behind_gap.clear()

    def _replace(self, snapshot: ResidencySnapshot) -> None:
        newer = [event for event in self._behind_gap if event.sequence > snapshot.sequence]
        self._tokens = dict(zip(snapshot.users.tolist(), snapshot.tokens.tolist(), strict=True))
        self.sequence = snapshot.sequence
        self.exact = True
        self._behind_gap.clear()
        for event in newer:
            self._apply(event)

    def _apply(self, event: ResidencyEvent) -> None:
        if isinstance(event, UserCached):
            self._tokens.pop(event.user, None)  # to the end of the order
            self._tokens[event.user] = event.tokens
        else:
            self._tokens.pop(event.user, None)
        self.sequence = event.sequence
        self.version += 1
