"""What `plan_memory` promises is what a pool then has."""

from __future__ import annotations

import pytest
from hbm_pool.host.config import KVSpec, PoolConfig, TableSpec
from hbm_pool.host.plan import GPU_MEMORY_BYTES, highest_alpha, plan_memory

HSTU = KVSpec(layers=8, heads=4, head_dim=256, page_tokens=32, dtype="bfloat16")
DLRM = KVSpec(layers=5, heads=4, head_dim=128, page_tokens=32, dtype="bfloat16")
TABLES = (TableSpec("item", 50_000_000, 128), TableSpec("user", 1_000_000, 64))


def test_extent_is_about_two_mib_and_64_to_128_tokens() -> None:
    large = plan_memory(HSTU, TABLES, 40 << 30, max_sequence_tokens=4096)
    assert (large.extent_bytes, large.extent_tokens, large.pages_per_extent) == (2 << 20, 64, 2)
    small = plan_memory(DLRM, TABLES, 40 << 30, max_sequence_tokens=4096)
    assert small.extent_tokens == 128
    assert small.extent_bytes == 128 * 10 * 1024


def test_agrees_with_the_pool_it_plans() -> None:
    plan = plan_memory(DLRM, TABLES, 20_000_000_000, max_sequence_tokens=8192, max_batch_users=4)
    config = PoolConfig(
        pool_bytes=20_000_000_000,
        tables=TABLES,
        kv=DLRM,
        max_batch_users=4,
        max_sequence_tokens=8192,
    )
    assert plan.num_extents == config.num_extents
    assert plan.pool_bytes + plan.unused_bytes == 20_000_000_000
    for row in plan.alphas:
        assert row.emb_extents == config.emb_extents(row.alpha)
        assert row.emb_bytes + row.kv_bytes == plan.pool_bytes
        assert row.users == row.kv_extents // config.extents_per_user


def test_tells_which_alpha_a_server_may_use() -> None:
    tables = (TableSpec("item", 100_000, 64), TableSpec("side", 20_000, 32))
    kv = KVSpec(2, 2, 32, 16)
    sizes = {"pool_bytes": 24 << 20, "extent_bytes": 65_536, "max_sequence_tokens": 512}
    plan = plan_memory(kv, tables, **sizes, max_batch_users=4)
    top = highest_alpha(plan)
    assert [row.alpha <= top for row in plan.alphas] == [row.pins_fit for row in plan.alphas]
    PoolConfig(kv=kv, tables=tables, **sizes, max_batch_users=4, alpha_max=top)
    with pytest.raises(ValueError, match="pin 64"):
        PoolConfig(kv=kv, tables=tables, **sizes, max_batch_users=4, alpha_max=top + 0.003)


def test_rows_never_exceed_the_tables_and_use_all_extents() -> None:
    tables = (TableSpec("item", 2_000_000, 128), TableSpec("tiny", 10, 64))
    plan = plan_memory(HSTU, tables, 8 << 30, max_sequence_tokens=4096)
    for row in plan.alphas:
        item, tiny = row.rows
        assert tiny.rows == 10
        assert item.rows <= 2_000_000
        # One extent holds all of the tiny table; the item table gets the others.
        assert item.rows == min(2_000_000, (row.emb_extents - 1) * 4096)


def test_counts_waste() -> None:
    tables = (TableSpec("odd", 1000, 100),)
    plan = plan_memory(HSTU, tables, 8 << 30, max_sequence_tokens=4096, history_tokens=100)
    assert plan.classes[0].row_bytes >= 400
    assert plan.row_padding == (1 - 400 / plan.classes[0].row_bytes,)
    assert plan.user_tail == 1 - 100 / 128


def test_refuses_what_holds_nothing() -> None:
    with pytest.raises(ValueError, match="raise pool_bytes"):
        plan_memory(HSTU, TABLES, 10 << 20, max_sequence_tokens=4096)
    with pytest.raises(ValueError, match="history_tokens=9000"):
        plan_memory(HSTU, TABLES, 8 << 30, max_sequence_tokens=4096, history_tokens=9000)
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        plan_memory(HSTU, TABLES, 8 << 30, max_sequence_tokens=4096, alphas=[1.5])


def test_gpu_sizes_are_below_what_the_box_says() -> None:
    for name, memory in GPU_MEMORY_BYTES.items():
        printed_gb = int(name.rsplit("-", 1)[1])
        assert 0.9 * printed_gb * 2**30 < memory <= printed_gb * 2**30 * 1.0
