"""Which user's KV lies in which extents: plain host code, no tensor, no device read.

Reuse is the longest page-aligned prefix whose rolling fingerprint equals the request's history.
A user's extents are one array in order of the history, so page j lies in extent
`extents[j // pages_per_extent]`. Users without an open handle stand in one list in order of last
use; the coldest loses the tail of its history (or all of it) when room is needed. Every operation
costs the same whatever the histories hold: moving extents between users is a copy of an array.

Not thread-safe: the pool's lock guards it (`hbm_pool.device.kv`).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt

from hbm_pool.errors import HandleError
from hbm_pool.host.extents import ExtentLedger, Extents, Owner
from hbm_pool.host.fences import EpochClock, Lane
from hbm_pool.host.kv_handle import (
    ANONYMOUS,
    Fingerprints,
    KVCounters,
    KVHandle,
    KVStatus,
)
from hbm_pool.host.row_lag import RowLag


class _User:
    __slots__ = ("announced", "cached_pages", "extents", "fingerprints", "handle", "row_epoch")

    def __init__(self) -> None:
        self.extents: array[int] = array("i")
        self.fingerprints = _NO_FINGERPRINTS
        self.cached_pages = 0
        self.announced = 0  # tokens of the last residency event
        self.handle: KVHandle | None = None
        self.row_epoch = 0


_NO_FINGERPRINTS: Fingerprints = np.empty(0, dtype=np.uint32)


class KVIndex:
    """Users, their extents, their order of use. Borrows extents from the ledger as it needs them.

    `limit` is how many extents KV may hold; the pool sets it. `on_event(user, tokens)` is called
    for every change of what is reusable (0: nothing any more).
    """

    def __init__(
        self,
        ledger: ExtentLedger,
        clock: EpochClock,
        *,
        page_tokens: int,
        pages_per_extent: int,
        max_sequence_tokens: int,
        rows: RowLag,
        eviction: Literal["tail", "whole"] = "tail",
    ) -> None:
        self.ledger = ledger
        self.clock = clock
        self.page_tokens = page_tokens
        self.pages_per_extent = pages_per_extent
        self.max_sequence_tokens = max_sequence_tokens
        self.rows = rows
        self.limit = ledger.num_extents
        self.model_version = 0
        self.on_event: Callable[[int, int], None] | None = None
        self._trims = eviction == "tail"
        self._extent_tokens = page_tokens * pages_per_extent
        self._users: dict[int, _User] = {}
        # Users without an open handle, coldest first; and how many extents they hold together.
        self._idle: OrderedDict[int, _User] = OrderedDict()
        self._idle_extents = 0
        self._pinned_extents = 0
        self._spare: array[int] = array("i")
        self._cached_users = 0
        self._cached_tokens = 0
        self._lookups = 0
        self._hits = 0
        self._tokens_reused = 0
        self._tokens_computed = 0
        self._evicted_users = 0
        self._trimmed_users = 0
        self._voided_users = 0
        self._lag_swept_to = 0
        self._uncached = 0
        self._busy = 0

    # -- lookup and allocation -------------------------------------------------------------------

    @property
    def evictable_extents(self) -> int:
        """Extents that no open handle pins."""
        return self._idle_extents + len(self._spare)

    def extents_for(self, tokens: int) -> int:
        """Extents of a history of that many tokens."""
        return -(-tokens // self._extent_tokens)

    def shortfall(self, user: int, tokens: int) -> int:
        """Extents missing for this history even after evicting all that may be evicted; 0: fits."""
        entry = self._users.get(user)
        own = len(entry.extents) if entry is not None else 0
        return max(0, self.extents_for(tokens) - own - self._obtainable(own))

    def acquire(self, user: int, fingerprints: Fingerprints, tokens: int) -> KVHandle | None:
        """Lookup and allocation in one step; see `KVCache.acquire`.

        None, and nothing changed, when there is no room even after evicting all that may be.
        """
        self._check_request(fingerprints, tokens)
        if user == ANONYMOUS:
            return KVHandle(self, user, fingerprints, tokens, KVStatus.UNCACHED)
        entry = self._users.get(user)
        if entry is None:
            needed = -(-tokens // self._extent_tokens)
            if needed > self._obtainable(0):
                return None
            entry = _User()
            self._users[user] = entry
            self._obtain(entry, needed)
            matched = 0
        else:
            if entry.handle is not None:
                self._busy += 1
                return KVHandle(self, user, fingerprints, tokens, KVStatus.BUSY)
            own = len(entry.extents)
            needed = -(-tokens // self._extent_tokens)
            if needed - own > self._obtainable(own):
                return None
            del self._idle[user]
            self._idle_extents -= own
            matched = self._match(entry, fingerprints)
            if needed > own:
                self._obtain(entry, needed - own)
            elif needed < own:
                self._release(entry.extents[needed:])
                del entry.extents[needed:]
            if matched != entry.cached_pages:
                self._set_cached_silently(entry, matched)
        handle = KVHandle(self, user, fingerprints, tokens, KVStatus.READY)
        handle.extents = entry.extents
        handle.model_version = self.model_version
        handle.epoch = self.clock.begin(Lane.KV)
        self._lookups += 1
        if matched:
            self._hits += 1
            handle.cached_tokens = matched * self.page_tokens
            handle.row_epoch = entry.row_epoch
            handle.row_lag_s = self.rows.lag_s(entry.row_epoch)
        else:
            handle.row_epoch = self.rows.epoch
        entry.handle = handle
        self._pinned_extents += len(entry.extents)
        return handle

    def refuse(self, user: int, fingerprints: Fingerprints, tokens: int) -> KVHandle:
        """The handle of a request for which there is no room: computed without pages, counted."""
        self._uncached += 1
        return KVHandle(self, user, fingerprints, tokens, KVStatus.UNCACHED)

    def commit(self, handle: KVHandle) -> None:
        """Publishes the handle's whole pages and drops its pins; see `KVCache.commit`."""
        entry = self._close(handle)
        if handle.status is not KVStatus.BUSY:
            self._tokens_reused += handle.cached_tokens
            self._tokens_computed += handle.tokens - handle.cached_tokens
        if entry is None:
            return
        if handle.model_version != self.model_version:
            self._voided_users += 1
            self._remove(handle.user, entry)
            return
        pages = handle.tokens // self.page_tokens
        if pages == 0:
            self._remove(handle.user, entry)
            return
        entry.fingerprints = handle.fingerprints
        entry.row_epoch = handle.row_epoch
        self._set_cached(handle.user, entry, pages)
        self._idle[handle.user] = entry
        self._idle_extents += len(entry.extents)

    def abort(self, handle: KVHandle) -> None:
        """Keeps what was cached before and gives the rest back; see `KVCache.abort`."""
        entry = self._close(handle)
        if entry is None:
            return
        pages = handle.cached_tokens // self.page_tokens
        if pages == 0 or handle.model_version != self.model_version:
            self._remove(handle.user, entry)
            return
        keep = -(-pages // self.pages_per_extent)
        self._release(entry.extents[keep:])
        del entry.extents[keep:]
        self._set_cached(handle.user, entry, pages)
        self._idle[handle.user] = entry
        self._idle_extents += keep

    # -- giving up -------------------------------------------------------------------------------

    def release(self, n: int) -> Extents:
        """Up to `n` extents for the other side, `[<= n] int32`, still KV's in the ledger.

        Spare ones first, then the coldest users; fewer when the rest is pinned.
        """
        n = min(n, self.evictable_extents)
        given: array[int] = array("i")
        self._from_spare(given, n)
        self._evict_into(given, n - len(given))
        return np.array(given, dtype=np.int32)

    def evict(self, user: int) -> bool:
        """Drops one user's KV. False when the user is unknown or has an open handle."""
        entry = self._users.get(user)
        if entry is None or entry.handle is not None:
            return False
        del self._idle[user]
        self._idle_extents -= len(entry.extents)
        self._remove(user, entry)
        return True

    def void_all(self) -> int:
        """Drops every user's KV; open handles stay, and what they commit is decided then."""
        users = list(self._idle)
        for user in users:
            self.evict(user)
        for user, entry in self._users.items():
            self._set_cached(user, entry, 0)
        self._voided_users += len(users)
        return len(users)

    def void_lagging(self) -> int:
        """Drops users whose KV is too far behind pushed rows; lookups void the pinned ones.

        O(users), but only when time or a push has made more KV unusable since the last call.
        """
        usable = self.rows.oldest_usable_epoch()
        if usable == self._lag_swept_to:
            return 0
        self._lag_swept_to = usable
        lagging = [user for user, entry in self._idle.items() if entry.row_epoch < usable]
        for user in lagging:
            self.evict(user)
        self._voided_users += len(lagging)
        return len(lagging)

    def set_model_version(self, version: int) -> None:
        """A new model makes all KV worthless, also what open handles are about to commit."""
        if version != self.model_version:
            self.model_version = version
            self.void_all()

    # -- reading ---------------------------------------------------------------------------------

    def counters(self) -> KVCounters:
        """All counters at once."""
        return KVCounters(
            lookups=self._lookups,
            hits=self._hits,
            tokens_reused=self._tokens_reused,
            tokens_computed=self._tokens_computed,
            users=self._cached_users,
            tokens=self._cached_tokens,
            evicted_users=self._evicted_users,
            trimmed_users=self._trimmed_users,
            voided_users=self._voided_users,
            uncached=self._uncached,
            busy=self._busy,
            pinned_extents=self._pinned_extents,
            spare_extents=len(self._spare),
        )

    def is_open(self, user: int) -> bool:
        """True while a handle of this user is open."""
        entry = self._users.get(user)
        return entry is not None and entry.handle is not None

    def cached_tokens(self, user: int) -> int:
        """Reusable tokens of a user, without touching anything."""
        entry = self._users.get(user)
        return entry.cached_pages * self.page_tokens if entry is not None else 0

    def residents(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Users with reusable KV and how many tokens, `[n] int64`, `[n] uint32`."""
        held = [(user, entry.announced) for user, entry in self._users.items() if entry.announced]
        users = np.fromiter((user for user, _ in held), dtype=np.int64, count=len(held))
        tokens = np.fromiter((tokens for _, tokens in held), dtype=np.uint32, count=len(held))
        return users, tokens

    def violations(self) -> list[str]:
        """What is wrong inside, or between index and ledger; empty when all is well."""
        found = []
        lists = [entry.extents for entry in self._users.values()]
        lists.append(self._spare)
        held = np.concatenate([np.array(part, dtype=np.int32) for part in lists])
        if len(np.unique(held)) != len(held):
            found.append("kv: an extent belongs to two users")
        if not np.array_equal(np.sort(held), self.ledger.owned(Owner.KV)):
            found.append("kv: the users' extents are not the extents the ledger lends to KV")
        pinned = idle = users = tokens = 0
        for user, entry in self._users.items():
            found.extend(self._user_violations(user, entry))
            if entry.handle is not None:
                pinned += len(entry.extents)
            else:
                idle += len(entry.extents)
            users += entry.cached_pages > 0
            tokens += entry.cached_pages * self.page_tokens
        kept = (self._pinned_extents, self._idle_extents, self._cached_users, self._cached_tokens)
        if kept != (pinned, idle, users, tokens):
            found.append(
                f"kv: counted pinned, idle extents, users, tokens {kept}; found "
                f"{(pinned, idle, users, tokens)}"
            )
        return found

    def _user_violations(self, user: int, entry: _User) -> Iterable[str]:
        if (entry.handle is None) != (user in self._idle):
            yield f"kv: user {user} must be either pinned by a handle or evictable"
        if entry.handle is not None and not (entry.handle.open and entry.handle.user == user):
            yield f"kv: user {user} is pinned by a handle that is not live"
        if entry.cached_pages > len(entry.extents) * self.pages_per_extent:
            yield f"kv: user {user} has {entry.cached_pages} cached pages beyond its extents"
        if entry.cached_pages > len(entry.fingerprints):
            yield f"kv: user {user} has cached pages without a fingerprint"
        if entry.handle is None and entry.announced != entry.cached_pages * self.page_tokens:
            yield f"kv: user {user} was announced with {entry.announced} tokens"

    # -- inside ----------------------------------------------------------------------------------

    def _check_request(self, fingerprints: Fingerprints, tokens: int) -> None:
        if not 0 <= tokens <= self.max_sequence_tokens:
            raise ValueError(
                f"history has {tokens} tokens; the cache keeps 0..{self.max_sequence_tokens}. "
                "Drop whole blocks from its start (contracts.history.first_kept_token)"
            )
        if len(fingerprints) != tokens // self.page_tokens:
            raise ValueError(
                f"{len(fingerprints)} fingerprints for {tokens} tokens; there must be one for each "
                f"whole page of {self.page_tokens} tokens"
            )

    def _obtainable(self, own: int) -> int:
        """Extents a user with `own` idle extents of its own can get now, on top of those."""
        ledger = self.ledger
        grant = min(ledger.num_free, self.limit - ledger.count(Owner.KV))
        return len(self._spare) + max(0, grant) + self._idle_extents - own

    def _obtain(self, entry: _User, n: int) -> None:
        """Adds `n` obtainable extents to the entry: spare, then free, then evicted."""
        extents = entry.extents
        goal = len(extents) + n
        if self._spare:
            self._from_spare(extents, n)
        ledger = self.ledger
        short = goal - len(extents)
        if short and ledger.num_free:
            granted = min(short, ledger.num_free, self.limit - ledger.count(Owner.KV))
            if granted > 0:
                extents.frombytes(ledger.take(Owner.KV, granted).tobytes())
                short -= granted
        if short:
            self._evict_into(extents, short)

    def _from_spare(self, extents: array[int], n: int) -> None:
        left = max(0, len(self._spare) - n)
        extents.extend(self._spare[left:])
        del self._spare[left:]

    def _evict_into(self, extents: array[int], n: int) -> None:
        """Moves exactly `n` extents from the coldest users; the caller knows there are enough."""
        idle = self._idle
        self._idle_extents -= n
        while n > 0:
            user = next(iter(idle))
            victim = idle[user]
            have = len(victim.extents)
            if have > n and self._trims:
                self._trim(user, victim, extents, n)
                return
            del idle[user]
            del self._users[user]
            self._evicted_users += 1
            if victim.cached_pages:
                self._cached_users -= 1
                self._cached_tokens -= victim.cached_pages * self.page_tokens
            if victim.announced and self.on_event is not None:
                self.on_event(user, 0)
            if have <= n:
                extents.extend(victim.extents)
            else:
                extents.extend(victim.extents[:n])
                self._idle_extents -= have - n
                self._release(victim.extents[n:])
            n -= have

    def _trim(self, user: int, victim: _User, extents: array[int], n: int) -> None:
        """Moves `n` extents from the tail of a user's history, which keeps its beginning."""
        keep = len(victim.extents) - n
        extents.extend(victim.extents[keep:])
        del victim.extents[keep:]
        self._trimmed_users += 1
        self._set_cached(user, victim, min(victim.cached_pages, keep * self.pages_per_extent))

    def _release(self, extents: array[int]) -> None:
        """Extents a user no longer needs: the lane is ordered, so KV may reuse them at once."""
        self._spare.extend(extents)

    def _match(self, entry: _User, fingerprints: Fingerprints) -> int:
        """Whole pages at the start that agree. Rolling fingerprints agree up to a point and differ
        after it (but for chance, 2^-32), so the last page decides, else bisection."""
        high = min(entry.cached_pages, len(fingerprints))
        if high == 0:
            return 0
        if self.rows.lags_too_much(entry.row_epoch):
            self._voided_users += 1
            return 0
        known = entry.fingerprints
        if known[high - 1] == fingerprints[high - 1]:
            return high
        low, high = 0, high - 1
        while low < high:
            middle = (low + high + 1) // 2
            if known[middle - 1] == fingerprints[middle - 1]:
                low = middle
            else:
                high = middle - 1
        return low

    def _close(self, handle: KVHandle) -> _User | None:
        if handle.index is not self:
            raise HandleError(f"{handle!r} belongs to another cache")
        if not handle.open:
            raise HandleError(f"{handle!r} was committed or aborted before")
        handle.open = False
        if handle.status is not KVStatus.READY:
            return None
        entry = self._users[handle.user]
        assert entry.handle is handle
        entry.handle = None
        self._pinned_extents -= len(entry.extents)
        self.clock.end(Lane.KV, handle.epoch)
        return entry

    def _remove(self, user: int, entry: _User) -> None:
        """Forgets a user that is neither pinned nor in the order of use."""
        del self._users[user]
        self._release(entry.extents)
        self._set_cached(user, entry, 0)

    def _set_cached_silently(self, entry: _User, pages: int) -> None:
        before = entry.cached_pages
        self._cached_tokens += (pages - before) * self.page_tokens
        self._cached_users += (pages > 0) - (before > 0)
        entry.cached_pages = pages

    def _set_cached(self, user: int, entry: _User, pages: int) -> None:
        """What of the user is reusable from now on; announces it when it changed."""
        if pages != entry.cached_pages:
            self._set_cached_silently(entry, pages)
        tokens = pages * self.page_tokens
        if tokens != entry.announced:
            entry.announced = tokens
            if self.on_event is not None:
                self.on_event(user, tokens)
