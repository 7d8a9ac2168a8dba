"""Wrong configuration says what to change; what it says to use is then accepted."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hbm_pool.host.config import DTYPE_BYTES, KVSpec, PoolConfig, TableSpec
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "pool_bytes": 1 << 20,
        "extent_bytes": 4096,
        "tables": (TableSpec("item", 2000, 16), TableSpec("side", 300, 8)),
        "kv": KVSpec(layers=2, heads=2, head_dim=8, page_tokens=4),
        "max_batch_users": 3,
        "max_sequence_tokens": 64,
        **changes,
    }


def problem(**changes: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        PoolConfig(**fields(**changes))
    return caught.value.errors(include_url=False)[0]["msg"]


def test_derives_sizes() -> None:
    config = PoolConfig(**fields())
    assert config.num_extents == 256
    assert config.pages_per_extent == 4
    assert config.extents_per_user == 4
    assert (config.min_emb_extents, config.max_emb_extents) == (26, 230)
    assert [config.emb_extents(a) for a in (0.0, 0.5, 1.0)] == [26, 128, 230]
    wide, narrow = config.classes
    assert (wide.row_bytes, wide.rows_per_extent, wide.tables) == (64, 64, (0,))
    assert (narrow.row_bytes, narrow.rows_per_extent, narrow.tables) == (32, 128, (1,))


def test_tables_of_one_width_share_a_class() -> None:
    tables = (TableSpec("a", 10, 16), TableSpec("b", 10, 8), TableSpec("c", 30, 16))
    classes = PoolConfig(**fields(tables=tables)).classes
    assert [c.tables for c in classes] == [(0, 2), (1,)]
    assert classes[0].catalogue_rows == 40


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha_min": 0.6}, "alpha_min=0.6 <= alpha=0.5"),
        ({"alpha_max": 0.4}, "alpha_max=0.4 does not hold"),
        ({"alpha": float("nan")}, "finite number"),
        ({"alpha_min": 0.0}, "use alpha_min >= 0.016"),
        ({"alpha": 0.501, "alpha_min": 0.501, "alpha_max": 0.502}, "no whole number"),
        ({"pool_bytes": 5 * 4096}, "raise pool_bytes to at least 32768"),
        ({"extent_bytes": 4000}, "use 3072 or 4096"),
        ({"extent_bytes": 100}, "use 1024 or 1024"),
        ({"kv": KVSpec(2, 2, 8, 7)}, "page_tokens=7 does not divide"),
        ({"tables": (TableSpec("a", 1, 8), TableSpec("a", 1, 8))}, "share the name 'a'"),
        ({"tables": tuple(TableSpec(str(w), 9, w) for w in (1, 2, 3, 4, 5))}, "at most 4"),
        ({"tables": (TableSpec("huge", 9, 2048),)}, "one row has 8192 bytes"),
        ({"tables": ()}, "at least 1 item"),
        ({"max_batch_users": 0}, "greater than or equal to 1"),
        ({"link_bytes_per_s": 0.0}, "greater than 0"),
        ({"pool_size": 1}, "not permitted"),
    ],
)
def test_says_what_is_wrong(changes: dict[str, Any], said: str) -> None:
    assert said in problem(**changes)


@pytest.mark.parametrize(
    ("spec", "arguments", "said"),
    [
        (TableSpec, ("a", 10, 8, "float12"), "'float32', 'float16', 'bfloat16'"),
        (TableSpec, ("a", 0, 8), "greater than or equal to 1"),
        (TableSpec, ("a", 10, 0), "greater than or equal to 1"),
        (TableSpec, ("", 10, 8), "at least 1 character"),
        (KVSpec, (0, 1, 1, 1), "greater than or equal to 1"),
        (KVSpec, (1, 1, 1, 1, "int4"), "'float32', 'float16', 'bfloat16'"),
    ],
)
def test_specs_check_their_values(spec: Any, arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        spec(*arguments)


def test_two_batches_must_fit_at_the_highest_alpha() -> None:
    """Each remedy that the message names works on its own."""
    said = problem(alpha_max=0.99, max_batch_users=16)
    assert "2 batches of max_batch_users=16 with 64 tokens pin 128" in said
    alpha_max = re.search(r"alpha_max <= ([0-9.]+)", said)
    pool_bytes = re.search(r"pool_bytes >= (\d+)", said)
    assert alpha_max is not None
    assert pool_bytes is not None
    lowered = PoolConfig(**fields(alpha_max=float(alpha_max[1]), max_batch_users=16))
    assert lowered.num_extents - lowered.max_emb_extents >= 128
    PoolConfig(**fields(alpha_max=0.99, max_batch_users=16, pool_bytes=int(pool_bytes[1])))
    with pytest.raises(ValidationError):
        PoolConfig(
            **fields(alpha_max=0.99, max_batch_users=16, pool_bytes=int(pool_bytes[1]) - 4096)
        )


@settings(max_examples=150, deadline=None)
@given(
    widths=st.lists(st.integers(1, 600), min_size=1, max_size=4, unique=True),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    layers=st.integers(1, 12),
    heads=st.integers(1, 8),
    head_dim=st.sampled_from([8, 24, 32, 64, 128]),
    page_tokens=st.sampled_from([1, 4, 16, 32, 64, 256]),
    extents=st.integers(200, 400),
)
def test_rows_and_pages_tile_whatever_extent_is_chosen(
    widths: list[int],
    dtype: Any,
    layers: int,
    heads: int,
    head_dim: int,
    page_tokens: int,
    extents: int,
) -> None:
    kv = KVSpec(layers, heads, head_dim, page_tokens)
    tables = tuple(TableSpec(str(w), 10_000, w, dtype) for w in widths)
    common = {"kv": kv, "tables": tables, "max_batch_users": 2, "alpha_max": 0.8}
    shape = {"max_sequence_tokens": 512, **common}
    extent_bytes = PoolConfig(pool_bytes=1 << 40, **shape).bytes_per_extent
    assume(extent_bytes * extents < 1 << 40)
    config = PoolConfig(pool_bytes=extent_bytes * extents, **shape)
    assert config.bytes_per_extent == extent_bytes
    assert config.pages_per_extent * kv.page_bytes == extent_bytes
    tokens = config.pages_per_extent * page_tokens
    assert tokens >= 64 or extent_bytes >= max(t.row_bytes for t in tables)
    for width_class in config.classes:
        table = tables[width_class.tables[0]]
        assert table.row_bytes <= width_class.row_bytes
        assert width_class.rows_per_extent * width_class.row_bytes == extent_bytes
        assert width_class.row_bytes % DTYPE_BYTES[dtype] == 0
