"""The KV cache of the pool: the index of `hbm_pool.host.kv_index` over pages of the arena."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hbm_pool.device.arena import Arena
from hbm_pool.host.config import KVSpec
from hbm_pool.host.fences import EpochClock, Lane
from hbm_pool.host.kv_handle import Fingerprints, KVCounters, KVHandle
from hbm_pool.host.kv_index import KVIndex


class KVIndices(NamedTuple):
    """Pages of a batch in FlashInfer's terms; requests without pages have an empty range."""

    kv_indptr: torch.Tensor  # [B + 1] int32
    kv_indices: torch.Tensor  # [kv_indptr[-1]] int32, arena-global page ids
    kv_last_page_len: torch.Tensor  # [B] int32, tokens in the last page; 0 without pages


class KVCache:
    """Per-user KV, from `acquire` to `commit` or `abort`. Any thread may call any method.

    The pool's lock guards the index; it is held for microseconds and never while tensors are read
    or written. Pages of one user change hands only between requests, and all work on pages is in
    one order (`batch_indices` puts the caller's CUDA stream behind the stream used before).
    """

    def __init__(
        self,
        arena: Arena,
        spec: KVSpec,
        index: KVIndex,
        lock: threading.Lock,
        clock: EpochClock,
        reclaim: Callable[[int, int], bool],
    ) -> None:
        self.spec = spec
        self.index = index
        self.layer_pages = arena.pages(spec)
        """One strided view per layer, `[num_pages, 2, page_tokens, heads, head_dim]`."""
        self._device = arena.device
        self._lock = lock
        self._clock = clock
        self._reclaim = reclaim

    @property
    def on_event(self) -> Callable[[int, int], None] | None:
        """Called as `(user, tokens)` when what is reusable of a user changed; 0 tokens: evicted.

        It runs under the pool's lock, in order: keep it short and do not call the pool from it.
        """
        return self.index.on_event

    @on_event.setter
    def on_event(self, callback: Callable[[int, int], None] | None) -> None:
        with self._lock:
            self.index.on_event = callback

    def acquire(self, user: int, fingerprints: Fingerprints, tokens: int) -> KVHandle:
        """Finds the user's longest cached prefix and gets pages for the whole history, in one step.

        `tokens` is the length of the kept history, `fingerprints` `[tokens // page_tokens] uint32`
        its rolling page fingerprints; the array is kept and must not change afterwards. The
        handle's status is READY (pages are pinned until `commit` or `abort`), BUSY (a handle of
        this user is open: try again after its commit, or join that request) or UNCACHED (user 0,
        or no room on either side: compute without pages).

        Room comes from free extents, then from the coldest users, then from the EMB side. Nothing
        is evicted when the request would not fit even then. Raises ValueError for a history longer
        than `max_sequence_tokens` or a wrong number of fingerprints.
        """
        with self._lock:
            handle = self.index.acquire(user, fingerprints, tokens)
        if handle is not None:
            return handle
        self._reclaim(user, tokens)
        with self._lock:
            handle = self.index.acquire(user, fingerprints, tokens)
            if handle is None:
                handle = self.index.refuse(user, fingerprints, tokens)
        return handle

    def commit(self, handle: KVHandle) -> None:
        """The KV of the whole history has been written (or queued): publishes it, drops the pins.

        Whole pages become reusable. Under a new model version nothing is published. Raises
        HandleError when the handle is not open.
        """
        with self._lock:
            self.index.commit(handle)

    def abort(self, handle: KVHandle) -> None:
        """The request failed: what was cached before stays, new pages are given back.

        Raises HandleError when the handle is not open.
        """
        with self._lock:
            self.index.abort(handle)

    def order(self) -> None:
        """Puts what the caller's stream does next behind all earlier work on pages.

        Call it before a batch reads or writes pages; `batch_indices` does so itself.
        """
        self._clock.order(Lane.KV)

    def batch_indices(self, handles: Sequence[KVHandle]) -> KVIndices:
        """Pages of a batch, on the arena's device; call it on the stream that computes."""
        self.order()
        pages = [handle.page_ids if handle.ready else _NO_PAGES for handle in handles]
        kv_indptr = np.zeros(len(handles) + 1, dtype=np.int32)
        np.cumsum([len(ids) for ids in pages], out=kv_indptr[1:])
        kv_indices = np.concatenate(pages) if pages else _NO_PAGES
        last = np.array(
            [
                handle.tokens - (len(ids) - 1) * self.spec.page_tokens if len(ids) else 0
                for handle, ids in zip(handles, pages, strict=True)
            ],
            dtype=np.int32,
        )
        return KVIndices(*(self._on_device(part) for part in (kv_indptr, kv_indices, last)))

    def is_open(self, user: int) -> bool:
        """True while a handle of this user is open, and `acquire` would say BUSY."""
        with self._lock:
            return self.index.is_open(user)

    def evict(self, user: int) -> bool:
        """Drops one user's KV; False when there is none or it is pinned."""
        with self._lock:
            return self.index.evict(user)

    def clear(self) -> int:
        """Drops every user's KV but what is pinned; returns how many users that were."""
        with self._lock:
            return self.index.void_all()

    def residents(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Users with reusable KV and how many tokens, `[n] int64`, `[n] uint32`."""
        with self._lock:
            return self.index.residents()

    def counters(self) -> KVCounters:
        """All KV counters at once."""
        with self._lock:
            return self.index.counters()

    def _on_device(self, part: npt.NDArray[np.int32]) -> torch.Tensor:
        host = torch.from_numpy(part)
        if self._device.type == "cpu":
            return host
        return host.pin_memory().to(self._device, non_blocking=True)


_NO_PAGES: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)
