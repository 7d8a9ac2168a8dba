"""Known answers: two releases, or two processes, must never hash one user or row apart."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hbm_pool.contracts import identity
from hypothesis import given
from hypothesis import strategies as st

KEYS = st.integers(0, 2**64 - 1)


def test_user_hash_is_xxh3_as_a_signed_number() -> None:
    # XXH3-64 of "" and of "alice", from the reference implementation (xxhsum -H3).
    assert identity.user_hash("") == 0x2D06800538D394C2
    assert identity.user_hash("alice") == 5593767425381308080
    assert identity.user_hash("alice") == identity.user_hash(b"alice")
    assert identity.user_hash("Zoë") == identity.user_hash("Zoë".encode())


@given(st.text(max_size=64))
def test_user_hash_fits_an_int64(user: str) -> None:
    value = identity.user_hash(user)
    assert int(np.int64(value)) == value
    assert value % 2**64 == xxhash.xxh3_64_intdigest(user.encode())


def test_digest_key_takes_the_low_bits_of_negative_hashes_too() -> None:
    assert identity.digest_key(-1) == 2**40 - 1
    assert identity.digest_key(0x123456789ABCDEF0) == 0x789ABCDEF0
    assert identity.digest_key(-(2**63)) == 0


def test_mix64_is_the_finaliser_of_splitmix64() -> None:
    # splitmix64 seeded with 0 adds the golden gamma, then finalises: its published first output.
    assert identity.mix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    assert identity.mix64(2 * 0x9E3779B97F4A7C15 % 2**64) == 0x6E789E6AA1B965F4
    assert identity.mix64(0) == 0


@given(st.lists(KEYS, max_size=20))
def test_mix64_of_an_array_is_mix64_of_each(keys: list[int]) -> None:
    array = np.array(keys, dtype=np.uint64)
    assert identity.mix64_array(array).tolist() == [identity.mix64(key) for key in keys]
    assert array.tolist() == keys


@given(st.integers(0, 2**24 - 1), st.lists(st.integers(0, 2**40 - 1), max_size=10))
def test_row_keys_name_table_and_row(table: int, rows: list[int]) -> None:
    keys = identity.row_keys(table, np.array(rows, dtype=np.int64)).tolist()
    assert keys == [identity.row_key(table, row) for row in rows]
    assert [(key >> 40, key & (2**40 - 1)) for key in keys] == [(table, row) for row in rows]


def test_the_sample_is_known_and_has_its_size() -> None:
    keys = identity.row_keys(3, np.arange(200_000, dtype=np.int64))
    taken = identity.sampled(keys, 0.01)
    assert np.flatnonzero(taken)[:8].tolist() == [98, 147, 173, 324, 526, 584, 639, 660]
    assert 0.009 < taken.mean() < 0.011
    assert identity.sampled(keys, 1.0).all()


@given(st.floats(1e-6, 1.0), st.floats(1e-6, 1.0), KEYS)
def test_a_smaller_sample_is_part_of_a_larger_one(first: float, second: float, key: int) -> None:
    small, large = sorted((first, second))
    keys = np.array([key], dtype=np.uint64)
    assert not identity.sampled(keys, small)[0] or identity.sampled(keys, large)[0]


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, float("nan")])
def test_a_rate_outside_of_0_1_is_named(rate: float) -> None:
    with pytest.raises(ValueError, match="sampling rate is"):
        identity.sample_threshold(rate)
