"""The KV half of the twin: K virtual KV caches over the metadata of users, at rate 1.

Rules as in the pool's own KV index: a user holds ceil(tokens / extent tokens) extents; a request
reuses the longest page-aligned prefix whose fingerprints agree; room comes from the coldest users,
from the tail of the history or whole; a history that does not fit at all is computed uncached and
changes nothing. All K caches see the same requests, so one copy of a user's fingerprints serves
them: each cache holds a prefix of the newest history and only its length differs.

Memory is bounded: a slot per user that some cache holds, and a chain of chunks (one extent's
fingerprints each) per slot. When either runs out, the coldest user of the roomiest cache leaves
all of them; `Users.counts[CROWDED]` says how often that was.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_pool.host.tz_kernel import kernel, wide

# Places in `Users.counts`.
FREE_SLOTS: Final = 0
FREE_CHUNKS: Final = 1
CROWDED: Final = 2
COUNTS: Final = 4


class Users(NamedTuple):
    """S user slots, K candidates, M chunks, H hash entries. Index S in the lists is their end."""

    capacity: npt.NDArray[np.int64]  # [K] extents
    used: npt.NDArray[np.int64]  # [K]
    offered: npt.NDArray[np.int64]  # [K] extents of all requests so far
    held: npt.NDArray[np.int32]  # [S, K] extents
    pages: npt.NDArray[np.int32]  # [S, K] reusable pages
    older: npt.NDArray[np.int32]  # [S + 1, K]; of S: the hottest
    newer: npt.NDArray[np.int32]  # [S + 1, K]; of S: the coldest
    holders: npt.NDArray[np.int32]  # [S] candidates that hold the user
    name: npt.NDArray[np.int64]  # [S] user hash
    length: npt.NDArray[np.int32]  # [S] whole pages of the newest history
    chain: npt.NDArray[np.int32]  # [S] first chunk, -1: none
    free_slots: npt.NDArray[np.int32]  # [S] stack
    table: npt.NDArray[np.int32]  # [H] slot + 1, 0: empty
    fingerprints: npt.NDArray[np.uint32]  # [M, pages per extent]
    following: npt.NDArray[np.int32]  # [M] next chunk of the chain, -1: last
    free_chunks: npt.NDArray[np.int32]  # [M] stack
    counts: npt.NDArray[np.int64]  # [COUNTS]


def allocate_users(
    kv_extents: npt.NDArray[np.int64], pages_per_extent: int, extents_per_user: int
) -> Users:
    """Empty virtual KV caches of `kv_extents[k]` extents each."""
    points = len(kv_extents)
    # Recency order makes the smaller caches' users a subset of the roomiest one's, but for the
    # last user of each; twice its extents leaves room for what breaks that order.
    slots = 2 * int(kv_extents.max()) + points + 1
    chunks = slots + (points + 1) * extents_per_user
    hash_entries = 1 << (2 * slots - 1).bit_length()
    users = Users(
        capacity=kv_extents.astype(np.int64),
        used=np.zeros(points, np.int64),
        offered=np.zeros(points, np.int64),
        held=np.zeros((slots, points), np.int32),
        pages=np.zeros((slots, points), np.int32),
        older=np.full((slots + 1, points), slots, np.int32),
        newer=np.full((slots + 1, points), slots, np.int32),
        holders=np.zeros(slots, np.int32),
        name=np.zeros(slots, np.int64),
        length=np.zeros(slots, np.int32),
        chain=np.full(slots, -1, np.int32),
        free_slots=np.arange(slots - 1, -1, -1, dtype=np.int32),
        table=np.zeros(hash_entries, np.int32),
        fingerprints=np.zeros((chunks, pages_per_extent), np.uint32),
        following=np.full(chunks, -1, np.int32),
        free_chunks=np.arange(chunks - 1, -1, -1, dtype=np.int32),
        counts=np.zeros(COUNTS, np.int64),
    )
    users.counts[FREE_SLOTS] = slots
    users.counts[FREE_CHUNKS] = chunks
    return users


@kernel
def mix(key: int) -> np.uint64:
    """splitmix64's finaliser (`identity.mix64`), compiled."""
    mixed = np.uint64(key)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@kernel
def home(key: int, mask: int) -> int:
    """Where a key's search in a table of mask + 1 places starts."""
    return wide(mix(key) & np.uint64(mask))


@kernel
def _find(users: Users, user: int) -> int:
    """Slot of a user, or -1."""
    mask = users.table.size - 1
    place = home(user, mask)
    while users.table[place] != 0:
        slot = wide(users.table[place]) - 1
        if users.name[slot] == user:
            return slot
        place = (place + 1) & mask
    return -1


@kernel
def _forget(users: Users, slot: int) -> None:
    """Gives the slot and its chunks back; closes the gap in the table (no tombstones)."""
    mask = users.table.size - 1
    place = home(users.name[slot], mask)
    while users.table[place] != slot + 1:
        place = (place + 1) & mask
    hole = place
    while True:
        place = (place + 1) & mask
        moved = wide(users.table[place])
        if moved == 0:
            break
        wanted = home(users.name[moved - 1], mask)
        if ((place - wanted) & mask) >= ((place - hole) & mask):
            users.table[hole] = moved
            hole = place
    users.table[hole] = 0
    _free_chain(users, slot)
    users.length[slot] = 0
    users.free_slots[users.counts[FREE_SLOTS]] = slot
    users.counts[FREE_SLOTS] += 1


@kernel
def _free_chain(users: Users, slot: int) -> None:
    chunk = wide(users.chain[slot])
    while chunk >= 0:
        users.free_chunks[users.counts[FREE_CHUNKS]] = chunk
        users.counts[FREE_CHUNKS] += 1
        chunk = wide(users.following[chunk])
    users.chain[slot] = -1


@kernel
def _unlink(users: Users, slot: int, k: int) -> None:
    older, newer = users.older[slot, k], users.newer[slot, k]
    users.newer[older, k] = newer
    users.older[newer, k] = older


@kernel
def _link_hottest(users: Users, slot: int, k: int) -> None:
    end = users.holders.size
    hottest = users.older[end, k]
    users.older[slot, k] = hottest
    users.newer[slot, k] = end
    users.newer[hottest, k] = slot
    users.older[end, k] = slot


@kernel
def _drop(users: Users, slot: int, k: int) -> None:
    """Takes all of a user's KV out of candidate k."""
    _unlink(users, slot, k)
    users.used[k] -= users.held[slot, k]
    users.held[slot, k] = 0
    users.pages[slot, k] = 0
    users.holders[slot] -= 1


@kernel
def make_room(users: Users, needed: int, k: int, trims: bool) -> None:
    """Evicts from the coldest users until `needed` extents are free; the caller's is unlinked."""
    end = users.holders.size
    short = needed - (users.capacity[k] - users.used[k])
    per_extent = users.fingerprints.shape[1]
    while short > 0:
        slot = wide(users.newer[end, k])
        have = wide(users.held[slot, k])
        if have <= short or not trims:
            _drop(users, slot, k)
            if users.holders[slot] == 0:
                _forget(users, slot)
            short -= have
        else:
            users.held[slot, k] = have - short
            users.used[k] -= short
            users.pages[slot, k] = min(wide(users.pages[slot, k]), (have - short) * per_extent)
            short = 0


@kernel
def _common_pages(users: Users, slot: int, fingerprints: npt.NDArray[np.uint32]) -> int:
    """Whole pages on which the known history and the new one agree.

    Rolling fingerprints agree up to a point and differ after it, so the last page of a chunk
    speaks for all of it.
    """
    limit = min(wide(users.length[slot]), fingerprints.size)
    per_extent = users.fingerprints.shape[1]
    chunk = wide(users.chain[slot])
    first = wide(0)
    while first < limit:
        last = min(first + per_extent, limit)
        if users.fingerprints[chunk, last - 1 - first] != fingerprints[last - 1]:
            break
        first = last
        chunk = wide(users.following[chunk])
    stop = min(first + per_extent, limit)
    while first < stop and users.fingerprints[chunk, first % per_extent] == fingerprints[first]:
        first += 1
    return first


@kernel
def _remember(users: Users, slot: int, fingerprints: npt.NDArray[np.uint32]) -> None:
    """Keeps the newest history's fingerprints; the caller knows that there are chunks enough."""
    _free_chain(users, slot)
    per_extent = users.fingerprints.shape[1]
    before = wide(-1)
    for first in range(0, fingerprints.size, per_extent):
        users.counts[FREE_CHUNKS] -= 1
        chunk = wide(users.free_chunks[users.counts[FREE_CHUNKS]])
        for page in range(first, min(first + per_extent, fingerprints.size)):
            users.fingerprints[chunk, page - first] = fingerprints[page]
        users.following[chunk] = -1
        if before < 0:
            users.chain[slot] = chunk
        else:
            users.following[before] = chunk
        before = chunk
    users.length[slot] = fingerprints.size


@kernel
def _crowd_out(users: Users, but: int) -> None:
    """Drops the coldest user (not `but`) of the roomiest cache everywhere."""
    end = users.holders.size
    roomiest = wide(np.argmax(users.capacity))
    slot = wide(users.newer[end, roomiest])
    if slot == but:
        slot = wide(users.newer[slot, roomiest])
    if slot == end:
        # Not in the roomiest cache: any other user will do.
        for other in range(end):
            if users.holders[other] > 0 and other != but:
                slot = wide(other)
                break
    if slot == end:
        return
    users.counts[CROWDED] += 1
    for k in range(users.capacity.size):
        if users.held[slot, k] > 0:
            _drop(users, slot, k)
    _forget(users, slot)


@kernel
def serve_user(
    users: Users,
    user: int,
    tokens: int,
    fingerprints: npt.NDArray[np.uint32],
    page_tokens: int,
    trims: bool,
    cached: npt.NDArray[np.int64],
) -> None:
    """One request: `cached[k]` becomes the tokens candidate k reuses, then k holds the history."""
    cached[:] = 0
    if user == 0:
        return
    per_extent = users.fingerprints.shape[1]
    extent_tokens = per_extent * page_tokens
    needed = -(-tokens // extent_tokens)
    pages = fingerprints.size
    slot = _find(users, user)
    known = slot >= 0
    agreed = wide(0)
    if known:
        agreed = _common_pages(users, slot, fingerprints)
        # What is about to be replaced counts as free.
        _free_chain(users, slot)
        users.length[slot] = 0
    chunks = -(-pages // per_extent)
    while users.counts[FREE_CHUNKS] < chunks or (not known and users.counts[FREE_SLOTS] == 0):
        crowded = users.counts[CROWDED]
        _crowd_out(users, slot)
        if users.counts[CROWDED] == crowded:
            break
    if not known:
        users.counts[FREE_SLOTS] -= 1
        slot = wide(users.free_slots[users.counts[FREE_SLOTS]])
        users.name[slot] = user
        users.chain[slot] = -1
        mask = users.table.size - 1
        place = home(user, mask)
        while users.table[place] != 0:
            place = (place + 1) & mask
        users.table[place] = slot + 1
    _remember(users, slot, fingerprints)
    # Held by one more while it is handled, so that evictions do not forget it.
    users.holders[slot] += 1
    for k in range(users.capacity.size):
        users.offered[k] += needed
        reusable = min(wide(users.pages[slot, k]), agreed)
        if needed > users.capacity[k]:
            users.pages[slot, k] = reusable
            continue
        cached[k] = reusable * page_tokens
        if users.held[slot, k] > 0:
            _drop(users, slot, k)
        make_room(users, needed, k, trims)
        if pages > 0:
            users.held[slot, k] = needed
            users.pages[slot, k] = pages
            users.used[k] += needed
            users.holders[slot] += 1
            _link_hottest(users, slot, k)
    users.holders[slot] -= 1
    if users.holders[slot] == 0:
        _forget(users, slot)
