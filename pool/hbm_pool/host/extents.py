"""The extent ledger: who owns which extent of the arena, from one free list.

Caches borrow extents and give them back; they never see each other. An extent is FREE, KV, EMB or
PENDING (given up, but work in flight may still read it), and the four always add up to the arena.
Not thread-safe: the pool's lock guards it (`hbm_pool.device.pool`).
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hbm_pool.errors import ExtentError
from hbm_pool.host import extent_kernel as kernel
from hbm_pool.host.fences import Fence

Extents = npt.NDArray[np.int32]


class Owner(IntEnum):
    """State of an extent."""

    FREE = 0
    KV = 1
    EMB = 2
    PENDING = 3


class Released(NamedTuple):
    """Extents given up together, and the fence they wait for."""

    extents: Extents
    fence: Fence


class ExtentLedger:
    """Owner and generation of every extent. All operations are vectorised over extents.

    `generation[e]` goes up whenever extent e leaves its owner: an index entry made under an older
    generation is void, whatever the extent held, without anybody visiting the entry.
    """

    def __init__(self, num_extents: int) -> None:
        if num_extents < 1:
            raise ValueError(f"num_extents is {num_extents}; a ledger needs at least one extent")
        self.num_extents = num_extents
        self.owner: npt.NDArray[np.int8] = np.zeros(num_extents, dtype=np.int8)
        self.generation: npt.NDArray[np.uint32] = np.zeros(num_extents, dtype=np.uint32)
        # A stack: extents are taken from its end. Descending at first, so that low ids go first.
        self._free: Extents = np.arange(num_extents - 1, -1, -1, dtype=np.int32)
        self._num_free = num_extents
        self._counts = [num_extents, 0, 0, 0]
        self._pending: deque[Released] = deque()

    @property
    def num_free(self) -> int:
        """Extents that can be taken now."""
        return self._num_free

    @property
    def num_pending(self) -> int:
        """Extents that wait for work in flight."""
        return self._counts[Owner.PENDING]

    def count(self, owner: Owner) -> int:
        """Extents in that state."""
        return self._counts[owner]

    def take(self, owner: Owner, n: int) -> Extents:
        """Hands `n` free extents to KV or EMB, `[n] int32`.

        Raises ExtentError when fewer are free; ask first (`num_free`).
        """
        if owner not in (Owner.KV, Owner.EMB):
            raise ExtentError(f"extents cannot be taken for {owner.name}; only for KV or EMB")
        if not 0 <= n <= self._num_free:
            raise ExtentError(f"{n} extents were asked for and {self._num_free} are free")
        if n == 0:
            return np.empty(0, dtype=np.int32)
        left = self._num_free - n
        taken = self._free[left : self._num_free].copy()
        self._num_free = left
        self._counts[Owner.FREE] -= n
        self._lend(owner, taken)
        return taken

    def give_back(self, extents: Extents, fence: Fence | None) -> None:
        """Takes extents back from their one owner; they become free when the fence is done.

        `fence=None`: nothing reads them any more. Raises ExtentError, and changes nothing, when an
        id is out of range, named twice, or not owned by KV or EMB (a sentinel such as -1 must
        never reach the free list).
        """
        if len(extents) == 0:
            return
        now = fence is None or (not self._pending and fence.done())
        given = self._take_from_owner(extents, Owner.FREE if now else Owner.PENDING)
        if now or fence is None:
            self._push_free(given)
        else:
            self._counts[Owner.PENDING] += len(given)
            self._pending.append(Released(given, fence))

    def hand_over(self, extents: Extents, owner: Owner) -> None:
        """`give_back` without a fence and `take` of the same extents, in one step."""
        if owner not in (Owner.KV, Owner.EMB):
            raise ExtentError(f"extents cannot be handed to {owner.name}; only to KV or EMB")
        if len(extents):
            self._counts[owner] += len(self._take_from_owner(extents, owner))

    def reap(self) -> int:
        """Frees pending extents whose fence is done; returns how many became free."""
        if not self._pending:
            return 0
        before = self._num_free
        waiting: deque[Released] = deque()
        for released in self._pending:
            if released.fence.done():
                self.owner[released.extents] = Owner.FREE
                self._counts[Owner.PENDING] -= len(released.extents)
                self._push_free(released.extents)
            else:
                waiting.append(released)
        self._pending = waiting
        return self._num_free - before

    def owned(self, owner: Owner) -> Extents:
        """Ids in that state, ascending, `[n] int32`. O(all extents): for checks and tests."""
        return np.flatnonzero(self.owner == owner).astype(np.int32)

    def violations(self) -> list[str]:
        """What is wrong with the books; empty when they balance."""
        found = []
        counted = np.bincount(self.owner, minlength=4).tolist()
        if counted != self._counts:
            found.append(f"ledger counts {self._counts} (free, kv, emb, pending), owners {counted}")
        if sum(self._counts) != self.num_extents:
            found.append(f"ledger: {self._counts} do not add up to {self.num_extents} extents")
        free = self._free[: self._num_free]
        if not np.array_equal(np.sort(free), self.owned(Owner.FREE)):
            found.append("ledger: the free list is not the set of free extents")
        waiting = [released.extents for released in self._pending]
        pending = np.concatenate(waiting) if waiting else np.empty(0, dtype=np.int32)
        if not np.array_equal(np.sort(pending), self.owned(Owner.PENDING)):
            found.append("ledger: the pending queue is not the set of pending extents")
        return found

    def _lend(self, owner: Owner, extents: Extents) -> None:
        kernel.lend(self.owner, extents, int(owner))
        self._counts[owner] += len(extents)

    def _push_free(self, extents: Extents) -> None:
        n = len(extents)
        self._free[self._num_free : self._num_free + n] = extents
        self._num_free += n
        self._counts[Owner.FREE] += n

    def _take_from_owner(self, extents: Extents, state: Owner) -> Extents:
        """Puts extents of one owner into `state`, or raises and changes nothing."""
        given = np.array(extents, dtype=np.int32)
        owner = kernel.leave(self.owner, self.generation, given, int(state))
        if owner in (Owner.KV, Owner.EMB) and owner != state:
            self._counts[owner] -= len(given)
            return given
        if owner == kernel.OUT_OF_RANGE:
            bad = given[(given < 0) | (given >= self.num_extents)][0]
            raise ExtentError(f"extent {bad} was given back; ids are 0..{self.num_extents - 1}")
        if owner == kernel.TWICE:
            raise ExtentError("an extent was given back twice in one call")
        if owner >= 0:  # all of one owner, but not one to take from
            self.owner[given] = owner
            self.generation[given] -= 1
        owners = ", ".join(sorted({Owner(int(o)).name for o in np.unique(self.owner[given])}))
        raise ExtentError(
            f"extents in state {owners} were given back; all must be owned by one side, KV or EMB"
        )
