"""The split of the extents between both caches, and how it changes while requests are served.

Locks, always taken in this order:

1. `Split.moving_lock`: one thread at a time changes the number of EMB extents (a slice of a move,
   a shortfall of KV). A batch boundary that finds it taken goes on without a slice.
2. `Split.lock`, the pool's lock: extent ledger, KV index, row lag, target α and counters. Held for
   microseconds, never while the EMB side or a tensor is touched.
3. The EMB side's own lock, inside its methods; never taken while 2 is held.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

import numpy as np

from hbm_pool.host.extents import ExtentLedger, Extents, Owner
from hbm_pool.host.fences import EpochClock, Lane
from hbm_pool.host.kv_index import KVIndex

GROWTH_SLICE_EXTENTS: Final = 512
"""Extents that change hands towards EMB at one batch boundary of a planned move."""
RAMP_PAUSE_S: Final = 0.75
"""Targets in one direction that follow each other within this time are one ramp: a controller sets
one per tick (250 ms) and rests longer between moves."""


class EmbSide(Protocol):
    """What the split asks of the EMB side. Extents are arena-global ids, `[n] int32`."""

    @property
    def num_extents(self) -> int:
        """Extents it holds, those being emptied included."""

    def grow(self, extents: Extents) -> None:
        """Takes over extents, whatever their bytes are."""

    def plan_shrink(self, n: int) -> int:
        """Marks `n` more extents to be emptied; returns how many were found."""

    def cancel_shrink(self) -> int:
        """Keeps the marked extents that are not released yet; returns how many."""

    def shrink_step(self, budget_us: float) -> Extents:
        """Relocates rows for about `budget_us`; returns the extents it emptied."""

    def drop(self, n: int) -> Extents:
        """Gives up `n` extents with all their rows, O(extents); marked ones go first."""


class SplitCounters(NamedTuple):
    """Where the split is and what moving it has cost so far."""

    emb_extents: int
    target_emb_extents: int
    moving: bool
    moves: int
    """Changes of the target α that were reached; a ramp of targets is one."""
    moved_extents: int
    """Extents that changed sides, both directions."""
    reclaimed_extents: int
    """Extents EMB gave up because KV's pins left no room (outside of moves)."""


class Split:
    """Moves the boundary between both sides towards a target, slice by slice."""

    def __init__(
        self,
        ledger: ExtentLedger,
        kv: KVIndex,
        emb: EmbSide,
        clock: EpochClock,
        *,
        emb_extents: int,
        min_emb_extents: int,
        max_emb_extents: int,
        slice_budget_us: float,
        lock: threading.Lock,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ledger = ledger
        self.kv = kv
        self.emb = emb
        self.clock = clock
        self.lock = lock
        self.moving_lock = threading.Lock()
        self.min_emb_extents = min_emb_extents
        self.max_emb_extents = max_emb_extents
        self.slice_budget_us = slice_budget_us
        self.moves = 0
        self.moved_extents = 0
        self.reclaimed_extents = 0
        self._target = emb_extents
        self._drop_only = False
        self._requested: tuple[int, bool] | None = None
        self._under_way = False
        self._blocked = False  # the newest slice had nothing that it might take
        self._clock_s = clock_s
        self._direction = 0  # of the newest change of the target: -1, 1; 0 before the first
        self._counted = True  # whether that change is among `moves`
        self._reached_s = -math.inf  # when a target was reached last
        self._promised = 0  # extents EMB has marked for us and not released yet
        emb.grow(ledger.take(Owner.EMB, emb_extents))
        kv.limit = ledger.num_extents - emb_extents

    @property
    def alpha(self) -> float:
        """EMB extents ÷ all extents, exactly."""
        return self.ledger.count(Owner.EMB) / self.ledger.num_extents

    @property
    def target_emb_extents(self) -> int:
        """EMB extents at the newest target, taken over or not."""
        requested = self._requested
        return self._target if requested is None else requested[0]

    @property
    def moving(self) -> bool:
        """True from the request for another α until it is reached."""
        return self._under_way or self._requested is not None

    @property
    def has_slices(self) -> bool:
        """True while a move has a slice to do now: what is pinned has to wait."""
        return self._requested is not None or (self._under_way and not self._blocked)

    def counters(self) -> SplitCounters:
        """All of it at once; the caller holds `lock`."""
        return SplitCounters(
            emb_extents=self.ledger.count(Owner.EMB),
            target_emb_extents=self.target_emb_extents,
            moving=self.moving,
            moves=self.moves,
            moved_extents=self.moved_extents,
            reclaimed_extents=self.reclaimed_extents,
        )

    def set_target(self, alpha: float, *, drop_only: bool = False) -> None:
        """The α to move to, kept within the bounds; taken over at the next batch boundary.

        `drop_only` hands over at once and relocates nothing: for emergencies, since EMB misses
        jump until it is warm again. Raises ValueError when α is not a number in 0..1.
        """
        if not (math.isfinite(alpha) and 0.0 <= alpha <= 1.0):
            raise ValueError(f"target alpha is {alpha}; it must be a number from 0 to 1")
        wanted = round(alpha * self.ledger.num_extents)
        wanted = min(max(wanted, self.min_emb_extents), self.max_emb_extents)
        with self.lock:
            self._requested = (wanted, drop_only)

    def step(self) -> bool:
        """One batch boundary: frees what work has left, takes a target over, does one slice.

        True when it did a slice, also when that was the last one.
        """
        if not self.moving_lock.acquire(blocking=False):
            return False
        try:
            return self._step()
        finally:
            self.moving_lock.release()

    def reclaim(self, user: int, tokens: int) -> bool:
        """Asks the side that holds the bytes to let KV have room for this history.

        Extents free but promised to EMB go first, then EMB drops some, down to its lower bound.
        False, and nothing has changed, when that would not be enough either. What EMB gave up is
        won back at the next boundaries, as far as pins allow.
        """
        with self.moving_lock:
            with self.lock:
                self.ledger.reap()
                short = self.kv.shortfall(user, tokens)
                if short == 0:
                    return True
                held = self.ledger.count(Owner.KV)
                granted = max(0, min(self.ledger.num_free, self.kv.limit - held))
                promised = self.ledger.num_free - granted
                spared = max(0, self.ledger.count(Owner.EMB) - self.min_emb_extents)
                if short > promised + spared:
                    return False
                self.kv.limit = max(self.kv.limit, held + granted + short)
            if short > promised:
                given = self._drop(short - promised)
                with self.lock:
                    self.ledger.give_back(given, self.clock.fence(Lane.EMB))
                    self.ledger.reap()
                    self.reclaimed_extents += len(given)
                    self._under_way = True
            return True

    def can_reserve(self, kv_extents: int, emb_extents: int) -> bool:
        """Whether both sides could have that many more extents at the same time.

        Counts every byte once: what is free or about to be, what KV could evict for either side,
        what EMB could give to KV. Nothing is changed.
        """
        if kv_extents < 0 or emb_extents < 0:
            raise ValueError(f"cannot reserve {kv_extents} KV and {emb_extents} EMB extents")
        with self.lock:
            ledger = self.ledger
            free = ledger.num_free + ledger.num_pending
            evictable = self.kv.evictable_extents
            emb = ledger.count(Owner.EMB)
            if emb + emb_extents > self.max_emb_extents:
                return False
            droppable = max(0, emb - self.min_emb_extents) if emb_extents == 0 else 0
            return kv_extents + emb_extents <= free + evictable + droppable

    # -- inside; moving_lock is held -------------------------------------------------------------

    def _step(self) -> bool:
        with self.lock:
            self.ledger.reap()
            self._take_over()
            self.kv.limit = self.ledger.num_extents - self._target
            if not self._under_way:
                return False
            missing = self._target - self.ledger.count(Owner.EMB)
            drop_only = self._drop_only
        self._blocked = False
        if missing < 0:
            self._shrink_emb(-missing, drop_only)
            self._blocked = self._promised == 0
        else:
            self._cancel_shrink()
            if missing > 0:
                self._blocked = self._grow_emb(missing, drop_only) == 0
        with self.lock:
            if self._target == self.ledger.count(Owner.EMB):
                self._under_way = False
                self._drop_only = False
                self._reached_s = self._clock_s()
                if not self._counted:
                    self._counted = True
                    self.moves += 1
        return True

    def _take_over(self) -> None:
        if self._requested is None:
            return
        target, drop_only = self._requested
        self._requested = None
        if target == self._target and not self._under_way:
            return
        if target != self._target:
            direction = 1 if target > self._target else -1
            paused = self._clock_s() - self._reached_s > RAMP_PAUSE_S
            if direction != self._direction or (paused and self._counted):
                self._counted = False
            self._direction = direction
        self._target = target
        self._drop_only = drop_only
        self._under_way = True

    def _shrink_emb(self, surplus: int, drop_only: bool) -> None:
        if drop_only:
            given = self._drop(surplus)
        else:
            if self._promised > surplus:
                self._cancel_shrink()
            if self._promised < surplus:
                # Choosing costs as much as a slice; relocating begins at the next boundary.
                found = self.emb.plan_shrink(surplus - self._promised)
                self._promised += found
                if found:
                    return
            given = self.emb.shrink_step(self.slice_budget_us)
            self._promised -= len(given)
        if len(given):
            with self.lock:
                self.ledger.give_back(given, self.clock.fence(Lane.EMB))
                self.moved_extents += len(given)

    def _drop(self, n: int) -> Extents:
        given = self.emb.drop(n)
        self._promised = max(0, self._promised - len(given))
        return given

    def _cancel_shrink(self) -> None:
        if self._promised:
            self.emb.cancel_shrink()
            self._promised = 0

    def _grow_emb(self, missing: int, drop_only: bool) -> int:
        """Takes what is free, and has KV give up the rest: spare extents, then the coldest users.
        Pinned users are left alone; the next boundary asks again. -> extents taken."""
        n = missing if drop_only else min(missing, GROWTH_SLICE_EXTENTS)
        with self.lock:
            ledger = self.ledger
            short = n - ledger.num_free - ledger.num_pending
            taken = ledger.take(Owner.EMB, min(n, ledger.num_free))
            if short > 0:
                given = self.kv.release(short)
                fence = self.clock.fence(Lane.KV)
                if fence.done():
                    ledger.hand_over(given, Owner.EMB)
                    taken = np.concatenate((taken, given)) if len(taken) else given
                else:
                    ledger.give_back(given, fence)
            self.moved_extents += len(taken)
        if len(taken):
            self.emb.grow(taken)
        return len(taken)
