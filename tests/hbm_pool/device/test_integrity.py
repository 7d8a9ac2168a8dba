"""`check_integrity` finds what it is there to find: each kind of damage, on a pool in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hbm_pool import KVSpec, Pool, PoolConfig, RamRowStore, TableSpec
from hbm_pool.host.extents import Owner
from hbm_pool.host.fences import Lane
from hbm_pool.host.tz_kernel import MAIN

KV = KVSpec(layers=1, heads=1, head_dim=8, page_tokens=4)
TABLES = (TableSpec("item", 900, 8), TableSpec("side", 300, 4))


@pytest.fixture
def pool(index: str) -> Iterator[Pool]:
    """Both sides full, user 1 pinned by an open handle, an extent pending."""
    config = PoolConfig(
        pool_bytes=64 * 4 * KV.page_bytes,
        extent_bytes=4 * KV.page_bytes,
        tables=TABLES,
        kv=KV,
        max_batch_users=1,
        max_sequence_tokens=32,
        alpha_max=0.8,
        emb_index=index,
    )
    stores = {
        spec.name: RamRowStore(np.ones((spec.rows, spec.width), np.float32), spec.name)
        for spec in TABLES
    }
    with Pool(config, stores, background=False) as made:
        for user in range(2, 20):
            made.kv.commit(made.kv.acquire(user, np.arange(8, dtype=np.uint32), 32))
        handle = made.kv.acquire(1, np.arange(8, dtype=np.uint32), 32)
        for spec in TABLES:
            ids = torch.arange(spec.rows)
            made.emb.gather({spec.name: ids}, {spec.name: torch.empty(spec.rows, spec.width)})
        # An open span of the EMB lane keeps what EMB gives up now pending.
        reading = made.emb._clock.begin(Lane.EMB)
        made.set_target_alpha(0.45, drop_only=True)
        made.begin_batch()
        assert made.stats().extents_pending > 0
        assert made.check_integrity() == []
        yield made
        if handle.open:
            made.emb._clock.end(Lane.EMB, reading)


def _owned(pool: Pool, owner: Owner) -> int:
    return int(pool.ledger.owned(owner)[0])


def miscounted(pool: Pool) -> None:
    pool.ledger._counts[Owner.FREE] += 1


def extent_of_kv_lent_to_emb(pool: Pool) -> None:
    pool.ledger.owner[_owned(pool, Owner.KV)] = Owner.EMB


def pending_forgotten(pool: Pool) -> None:
    pool.ledger._pending.clear()


def lent_and_free(pool: Pool) -> None:
    ledger = pool.ledger
    ledger._free[ledger._num_free] = _owned(pool, Owner.EMB)
    ledger._num_free += 1


def extent_of_two_users(pool: Pool) -> None:
    users = pool.kv.index._users
    users[19].extents[0] = users[1].extents[0]


def pin_of_a_closed_handle(pool: Pool) -> None:
    handle = pool.kv.index._users[1].handle
    assert handle is not None
    handle.open = False


def user_neither_pinned_nor_evictable(pool: Pool) -> None:
    del pool.kv.index._idle[19]


def cached_beyond_its_extents(pool: Pool) -> None:
    pool.kv.index._users[19].cached_pages = 99


def told_wrongly(pool: Pool) -> None:
    pool.kv.index._users[19].announced += 4


def pins_miscounted(pool: Pool) -> None:
    pool.kv.index._pinned_extents -= 1


def extent_of_two_classes(pool: Pool) -> None:
    first, second = (kind.index for kind in pool.emb.classes)
    first.grow(second.extents()[:1])


def extent_promised_to_nobody(pool: Pool) -> None:
    pool.emb._extents._owed = 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (miscounted, "ledger counts"),
        (extent_of_kv_lent_to_emb, "not the extents the ledger lends to"),
        (pending_forgotten, "pending queue"),
        (lent_and_free, "the free list is not the set of free extents"),
        (extent_of_two_users, "an extent belongs to two users"),
        (pin_of_a_closed_handle, "user 1 is pinned by a handle that is not live"),
        (user_neither_pinned_nor_evictable, "user 19 must be either pinned"),
        (cached_beyond_its_extents, "user 19 has 99 cached pages beyond its extents"),
        (told_wrongly, "user 19 was announced with"),
        (pins_miscounted, "counted pinned"),
        (extent_of_two_classes, "is held by classes 0 and 1"),
        (extent_promised_to_nobody, "1 extents are promised, 0 are being emptied"),
    ],
)
def test_damage_is_named(pool: Pool, damage: Callable[[Pool], None], words: str) -> None:
    damage(pool)
    found = pool.check_integrity()
    assert any(words in text for text in found), found


def test_a_row_that_differs_from_its_store_is_named(pool: Pool) -> None:
    assert pool.emb.check_rows() == []
    kind = pool.emb.classes[0]
    keys, slots = kind.index.resident()
    kind.arena_rows[int(slots[0])] += 1.0
    assert pool.emb.check_rows() == [
        f"class 0: row {int(keys[0])} in slot {int(slots[0])} differs from its store"
    ]


@pytest.mark.parametrize("index", ["host"], indirect=True)
def test_damage_of_the_replacement_is_named(pool: Pool) -> None:
    """Its own lists, and a row that is in a slot and cannot be looked up."""
    kind = pool.emb.classes[0].index
    tz = kind.cache.tz  # type: ignore[attr-defined]
    _, slots = kind.resident()
    tz.words[int(slots[0])] = tz.words[int(slots[1])]
    found = "; ".join(pool.check_integrity())
    assert "1 rows are resident twice" in found
    assert "cannot be looked up" in found
    tz.zone[np.flatnonzero(tz.zone == MAIN)[0]] = 0
    assert "are in that zone" in "; ".join(pool.check_integrity())
