"""Who is who: 64-bit user hashes, 40-bit digest keys, 64-bit row keys and the hash that samples.

Server, twin and router must agree on each of these bit by bit; `tests/hbm_pool/contracts` pins
them with known answers.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

USER_HASH_BITS: Final = 64
DIGEST_KEY_BITS: Final = 40
DIGEST_KEY_MASK: Final = (1 << DIGEST_KEY_BITS) - 1
ROW_ID_BITS: Final = 40
MAX_USER_ID_BYTES: Final = 256

_MASK64: Final = (1 << 64) - 1


def user_hash(user_id: str | bytes) -> int:
    """XXH3-64 of the user's name as a signed 64-bit integer (the `user_ids` of every API)."""
    raw = user_id.encode() if isinstance(user_id, str) else user_id
    value: int = xxhash.xxh3_64_intdigest(raw)
    return value - (1 << 64) if value >> 63 else value


def digest_key(user: int) -> int:
    """The 40 low bits of a user hash: what a digest carries per resident user."""
    return user & DIGEST_KEY_MASK


def row_key(table: int, row: int) -> int:
    """One number for a (table, row) pair: table in the high 24 bits, row in the low 40."""
    return (table << ROW_ID_BITS) | row


def row_keys(table: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """`row_key` over an array of row ids, `[n] int64` -> `[n] uint64`."""
    return rows.astype(np.uint64) | np.uint64(table << ROW_ID_BITS)


def mix64(key: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood: OOPSLA 2014), a bijection on 64 bits."""
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK64
    return key ^ (key >> 31)


def mix64_array(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`mix64` over an array, `[n] uint64` -> `[n] uint64`."""
    mixed = keys ^ (keys >> np.uint64(30))
    mixed = mixed * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed = mixed * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def sample_threshold(rate: float) -> int:
    """A row is sampled when `mix64(row_key) < sample_threshold(rate)` (SHARDS, FAST 2015).

    `rate` in (0, 1]; 1 samples every row.
    """
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"sampling rate is {rate}; it must be in (0, 1]")
    return min(_MASK64, int(rate * float(1 << 64)))


def sampled(keys: npt.NDArray[np.uint64], rate: float) -> npt.NDArray[np.bool_]:
    """Which of the row keys belong to the sample, `[n] uint64` -> `[n] bool`."""
    if rate >= 1.0:
        return np.ones(keys.shape, dtype=np.bool_)
    return mix64_array(keys) < np.uint64(sample_threshold(rate))
