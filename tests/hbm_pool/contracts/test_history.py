"""Known answers and properties of histories, as server, twin and simulator see them."""

from __future__ import annotations

import numpy as np
import pytest
from hbm_pool.contracts.history import first_kept_token, page_fingerprints, table_rows
from hypothesis import given
from hypothesis import strategies as st

PAGE = 16
EXPECTED_FINGERPRINTS = [2967394161, 2315315085, 268807461]
EXPECTED_SEEDED = [3501458344, 2517590776, 3035364623]
EXPECTED_ROWS = [752, 566, 401, 529, 296, 998]


def _history(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return (
        random.integers(0, 10_000, tokens),
        np.cumsum(random.integers(1, 1000, tokens)),
        random.integers(0, 4, tokens),
    )


@pytest.mark.parametrize(
    ("tokens", "start"),
    [(0, 0), (4096, 0), (4097, 512), (4608, 512), (4609, 1024), (10_000, 6144)],
)
def test_whole_blocks_are_dropped_from_the_oldest_end(tokens: int, start: int) -> None:
    assert first_kept_token(tokens, 4096, 512) == start


@given(st.integers(0, 100_000), st.integers(1, 5000), st.integers(1, 600))
def test_the_kept_part_fits_and_no_block_is_dropped_in_vain(
    tokens: int, longest: int, block: int
) -> None:
    start = first_kept_token(tokens, longest, block)
    assert start % block == 0
    assert tokens - start <= longest
    assert start == 0 or tokens - (start - block) > longest


def test_fingerprints_are_known() -> None:
    items = np.arange(48)
    times = np.arange(48) * 60
    assert page_fingerprints(items, times, None, PAGE).tolist() == EXPECTED_FINGERPRINTS
    assert page_fingerprints(items, times, items % 3, PAGE, seed=7).tolist() == EXPECTED_SEEDED


@given(st.integers(0, 100), st.data())
def test_fingerprints_agree_up_to_the_first_difference(tokens: int, data: st.DataObject) -> None:
    columns = _history(tokens)
    before = page_fingerprints(*columns, PAGE)
    assert before.dtype == np.uint32
    assert len(before) == tokens // PAGE
    assert page_fingerprints(*columns, PAGE).tolist() == before.tolist()
    if tokens:
        at = data.draw(st.integers(0, tokens - 1))
        column = data.draw(st.integers(0, 2))
        columns[column][at] += 1
        changed = page_fingerprints(*columns, PAGE)
        assert changed[: at // PAGE].tolist() == before[: at // PAGE].tolist()
        assert not np.any(changed[at // PAGE :] == before[at // PAGE :])


def test_a_longer_history_keeps_the_fingerprints_of_its_prefix() -> None:
    columns = _history(90)
    prefix = page_fingerprints(*(column[:50] for column in columns), PAGE)
    assert page_fingerprints(*columns, PAGE)[:3].tolist() == prefix.tolist()


def test_another_model_version_shares_no_page() -> None:
    columns = _history(64)
    one, other = (page_fingerprints(*columns, PAGE, seed=seed) for seed in (1, 2))
    assert not np.any(one == other)


def test_the_fingerprint_does_not_depend_on_layout_in_memory() -> None:
    columns = _history(64)
    strided = tuple(np.repeat(column, 2)[::2] for column in columns)
    assert page_fingerprints(*strided, PAGE).tolist() == page_fingerprints(*columns, PAGE).tolist()


def test_rows_of_side_features_are_a_known_hash() -> None:
    items = np.arange(6)
    assert table_rows(items, 0, 1000, hashed=False).tolist() == [0, 1, 2, 3, 4, 5]
    assert table_rows(items, 1, 1000, hashed=True).tolist() == EXPECTED_ROWS
    assert table_rows(items, 2, 1000, hashed=True).tolist() != EXPECTED_ROWS


@given(st.lists(st.integers(0, 2**40 - 1), max_size=20), st.integers(1, 16), st.integers(1, 10**6))
def test_hashed_rows_lie_in_the_table(items: list[int], table: int, rows: int) -> None:
    found = table_rows(np.array(items, dtype=np.int64), table, rows, hashed=True)
    assert found.dtype == np.int64
    assert np.all((found >= 0) & (found < rows))
