"""Varints over arrays, against the one-number-at-a-time definition."""

from __future__ import annotations

import numpy as np
from hbm_pool.contracts.varint import decode_varints, encode_varints
from hypothesis import example, given
from hypothesis import strategies as st

NUMBERS = st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 300), max_size=40)


def _one(value: int) -> bytes:
    raw = bytearray()
    while value >= 128:
        raw.append(value & 127 | 128)
        value >>= 7
    return bytes([*raw, value])


@given(NUMBERS)
@example([0, 127, 128, 2**62, 2**63 - 1])
def test_encoding_is_that_of_each_number(values: list[int]) -> None:
    raw = encode_varints(np.array(values, dtype=np.uint64))
    assert raw == b"".join(map(_one, values))
    decoded = decode_varints(raw, len(values), 63)
    assert decoded is not None
    assert decoded.tolist() == values


@given(NUMBERS, st.integers(1, 63))
def test_numbers_beyond_the_bound_are_refused(values: list[int], bits: int) -> None:
    decoded = decode_varints(encode_varints(np.array(values, dtype=np.uint64)), len(values), bits)
    assert (decoded is not None) == all(value < 1 << bits for value in values)


@given(st.binary(max_size=60), st.integers(0, 60), st.sampled_from([7, 32, 40, 63]))
@example(b"\x80\x00", 1, 32)
@example(b"\x80", 0, 32)
@example(b"\xff" * 8 + b"\x7f", 1, 63)
@example(b"\xff" * 9 + b"\x02", 1, 63)
def test_any_bytes_decode_to_what_encodes_to_them_or_to_nothing(
    raw: bytes, count: int, bits: int
) -> None:
    decoded = decode_varints(raw, count, bits)
    if decoded is not None:
        assert len(decoded) == count
        assert encode_varints(decoded) == raw
