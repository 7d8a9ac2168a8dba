"""Little-endian base-128 numbers (as in Protocol Buffers) over whole numpy arrays."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

_PAYLOAD: Final = np.uint64(0x7F)
_MORE: Final = np.uint8(0x80)


def encode_varints(values: npt.NDArray[np.uint64]) -> bytes:
    """`[n] uint64` -> 1 byte per 7 bits of each value, at least one, at most ten."""
    if not len(values):
        return b""
    width = max(1, -(-int(values.max()).bit_length() // 7))
    lengths = np.ones(len(values), dtype=np.intp)
    for index in range(1, width):
        lengths += (values >> np.uint64(7 * index)) != 0
    ends = np.cumsum(lengths)
    starts = ends - lengths
    raw = np.empty(int(ends[-1]), dtype=np.uint8)
    for index in range(width):
        longer = np.flatnonzero(lengths > index)
        group = (values[longer] >> np.uint64(7 * index)) & _PAYLOAD
        raw[starts[longer] + index] = group.astype(np.uint8) | _MORE
    raw[ends - 1] &= np.uint8(0x7F)
    return raw.tobytes()


def decode_varints(raw: bytes, count: int, max_bits: int) -> npt.NDArray[np.uint64] | None:
    """`count` numbers below `2 ** max_bits` (63 at most) that fill `raw` exactly, `[count] uint64`.

    None when the bytes say anything else, or a number in more bytes than it needs.
    """
    data = np.frombuffer(raw, dtype=np.uint8)
    ends = np.flatnonzero(data < _MORE)
    if len(ends) != count or (len(data) and data[-1] >= _MORE):
        return None
    if not count:
        return np.empty(0, dtype=np.uint64)
    starts = np.empty(count, dtype=np.intp)
    starts[0] = 0
    starts[1:] = ends[:-1] + 1
    lengths = ends - starts + 1
    width = int(lengths.max())
    if width > -(-max_bits // 7) or np.any((data[ends] == 0) & (lengths > 1)):
        return None
    values = (data[starts] & np.uint8(0x7F)).astype(np.uint64)
    for index in range(1, width):
        longer = np.flatnonzero(lengths > index)
        group = (data[starts[longer] + index] & np.uint8(0x7F)).astype(np.uint64)
        values[longer] |= group << np.uint64(7 * index)
    if int(values.max()) >> max_bits:
        return None
    return values
