"""What a request holds of the KV cache, and what the cache counts."""

from __future__ import annotations

from array import array
from enum import IntEnum
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Fingerprints = npt.NDArray[np.uint32]
ANONYMOUS: Final = 0
"""User hash of a request without a user: never cached."""


class KVStatus(IntEnum):
    """What a handle lets its request do."""

    READY = 0
    """Pages for the whole history; the first `cached_tokens` tokens hold valid KV."""
    UNCACHED = 1
    """No pages: compute the request without the cache (anonymous, or no room)."""
    BUSY = 2
    """Another handle of this user is open: wait until it is closed, or join its request."""


NO_EXTENTS: Final[array[int]] = array("i")


class PageShape(Protocol):
    """What a handle must know of the index that made it."""

    page_tokens: int
    pages_per_extent: int


class KVHandle:
    """One request's hold on its user's pages, from `acquire` to `commit` or `abort`.

    `page_ids` are arena-global, in order of the history, and stay valid while the handle is open.
    """

    __slots__ = (
        "_page_ids",
        "cached_tokens",
        "epoch",
        "extents",
        "fingerprints",
        "index",
        "model_version",
        "open",
        "row_epoch",
        "row_lag_s",
        "status",
        "tokens",
        "user",
    )

    def __init__(
        self,
        index: PageShape,
        user: int,
        fingerprints: Fingerprints,
        tokens: int,
        status: KVStatus,
    ) -> None:
        self.index = index
        self.extents = NO_EXTENTS
        self._page_ids: npt.NDArray[np.int32] | None = None
        self.user = user
        self.fingerprints = fingerprints
        self.tokens = tokens
        """Length of the history in tokens."""
        self.status = status
        self.cached_tokens = 0
        """Tokens at the start of the history whose KV need not be computed: whole pages."""
        self.row_lag_s = 0.0
        """For how long the oldest reused KV has been behind pushed rows; 0: it is not."""
        self.row_epoch = 0
        self.model_version = 0
        self.epoch = 0
        self.open = True

    @property
    def ready(self) -> bool:
        """True when the request has pages."""
        return self.status is KVStatus.READY

    @property
    def num_pages(self) -> int:
        """Pages of the whole history, the last one possibly partly filled; 0 without pages."""
        if self.status is not KVStatus.READY:
            return 0
        return -(-self.tokens // self.index.page_tokens)

    @property
    def page_ids(self) -> npt.NDArray[np.int32]:
        """Pages of the whole history, `[num_pages] int32`."""
        if self._page_ids is None:
            per_extent = self.index.pages_per_extent
            extents = np.array(self.extents, dtype=np.int32)
            pages = np.repeat(extents, per_extent).reshape(-1, per_extent)
            pages *= per_extent
            pages += np.arange(per_extent, dtype=np.int32)
            self._page_ids = pages.ravel()[: self.num_pages]
        return self._page_ids

    def __repr__(self) -> str:
        return (
            f"KVHandle(user={self.user}, {self.status.name}, tokens={self.tokens}, "
            f"cached_tokens={self.cached_tokens}, open={self.open})"
        )


class KVCounters(NamedTuple):
    """Cumulative, except `users`, `tokens`, `pinned_extents` and `spare_extents`."""

    lookups: int
    hits: int
    """Lookups that reused at least one page."""
    tokens_reused: int
    tokens_computed: int
    """History tokens of committed requests that were not reused."""
    users: int
    """Users with reusable KV."""
    tokens: int
    """Reusable tokens of all of them."""
    evicted_users: int
    """Users that lost all their KV for want of room (not by a version change or abort)."""
    trimmed_users: int
    """Times a user lost the tail of the history for want of room."""
    voided_users: int
    """Users whose KV a new model version or too old row values made worthless."""
    uncached: int
    """Requests that got no pages for want of room."""
    busy: int
    """Acquires that found the user's handle open."""
    pinned_extents: int
    spare_extents: int
