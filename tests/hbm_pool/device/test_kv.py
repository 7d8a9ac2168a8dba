"""The KV cache over real pages: what a batch reads is what was committed."""

from __future__ import annotations

import threading

import numpy as np
import torch
from hbm_pool import Arena, ExtentLedger, KVCache, KVHandle, KVSpec, KVStatus
from hbm_pool.host.fences import EpochClock
from hbm_pool.host.kv_index import KVIndex
from hbm_pool.host.row_lag import RowLag

SPEC = KVSpec(layers=2, heads=1, head_dim=2, page_tokens=4)
PAGES_PER_EXTENT = 2


def make_cache(extents: int) -> KVCache:
    clock = EpochClock()
    lock = threading.Lock()
    index = KVIndex(
        ExtentLedger(extents),
        clock,
        page_tokens=SPEC.page_tokens,
        pages_per_extent=PAGES_PER_EXTENT,
        max_sequence_tokens=64,
        rows=RowLag(300.0, lambda: 0.0),
    )
    arena = Arena(extents, PAGES_PER_EXTENT * SPEC.page_bytes)
    return KVCache(arena, SPEC, index, lock, clock, lambda user, tokens: False)


def acquire(cache: KVCache, user: int, tokens: int) -> KVHandle:
    prints = np.arange(tokens // SPEC.page_tokens, dtype=np.uint32) + np.uint32(user << 8)
    return cache.acquire(user, prints, tokens)


def write(cache: KVCache, handle: KVHandle) -> None:
    """Writes `user * 1000 + position` as K and its negative as V of every new token."""
    pages = torch.from_numpy(handle.page_ids).long()
    positions = torch.arange(handle.cached_tokens, handle.tokens)
    page, offset = pages[positions // 4], positions % 4
    for number, layer in enumerate(cache.layer_pages):
        values = (handle.user * 1000 + positions + number * 0.5)[:, None, None].expand(-1, 1, 2)
        layer[page, 0, offset] = values
        layer[page, 1, offset] = -values


def test_flashinfer_indices_of_a_batch() -> None:
    cache = make_cache(16)
    handles = [acquire(cache, 1, 18), acquire(cache, 0, 9), acquire(cache, 2, 8)]
    indices = cache.batch_indices(handles)
    assert indices.kv_indptr.tolist() == [0, 5, 5, 7]
    assert indices.kv_last_page_len.tolist() == [2, 0, 4]
    pages = indices.kv_indices.tolist()
    assert pages[:5] == handles[0].page_ids.tolist()
    assert pages[5:] == handles[2].page_ids.tolist()
    assert len(set(pages)) == 7
    assert {t.dtype for t in indices} == {torch.int32}
    empty = cache.batch_indices([])
    assert [len(t) for t in empty] == [1, 0, 0]


def test_what_was_written_is_read_again_after_others_came_and_went() -> None:
    cache = make_cache(12)
    for user, tokens in [(1, 30), (2, 17), (3, 40), (1, 33), (4, 20), (1, 41), (2, 20), (3, 44)]:
        handle = acquire(cache, user, tokens)
        assert handle.ready
        write(cache, handle)
        pages = torch.from_numpy(handle.page_ids).long()
        for number, layer in enumerate(cache.layer_pages):
            keys = layer[pages, 0, :, 0, 0].flatten()[:tokens]
            values = layer[pages, 1, :, 0, 1].flatten()[:tokens]
            expected = user * 1000 + torch.arange(tokens) + number * 0.5
            assert torch.equal(keys, expected.float())
            assert torch.equal(values, -expected.float())
        cache.commit(handle)
    assert cache.counters().hits > 0
    assert cache.counters().evicted_users + cache.counters().trimmed_users > 0


def test_no_room_anywhere_means_uncached_and_counted() -> None:
    cache = make_cache(4)
    pinned = acquire(cache, 1, 24)
    refused = acquire(cache, 2, 24)
    assert refused.status is KVStatus.UNCACHED
    assert cache.counters().uncached == 1
    cache.commit(refused)
    cache.commit(pinned)
    assert cache.residents()[0].tolist() == [1]


def test_evicting_by_hand() -> None:
    cache = make_cache(8)
    events: list[tuple[int, int]] = []
    cache.on_event = lambda user, tokens: events.append((user, tokens))
    for user in (1, 2):
        cache.commit(acquire(cache, user, 16))
    pinned = acquire(cache, 2, 16)
    assert cache.evict(1)
    assert not cache.evict(1)
    assert not cache.evict(2)
    assert cache.is_open(2)
    cache.commit(pinned)
    assert cache.clear() == 1
    assert events == [(1, 16), (2, 16), (1, 0), (2, 0)]


def test_threads_share_one_cache() -> None:
    """Gather and compute threads on few users and a full pool: books balance, nobody gets stuck."""
    cache = make_cache(24)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        try:
            for _ in range(400):
                user, tokens = int(generator.integers(1, 7)), int(generator.integers(4, 48))
                handle = acquire(cache, user, tokens)
                if handle.ready and generator.random() < 0.2:
                    cache.abort(handle)
                else:
                    cache.commit(handle)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == []
    assert cache.index.violations() + cache.index.ledger.violations() == []
