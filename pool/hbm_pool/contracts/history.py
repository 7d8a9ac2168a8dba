"""What a history looks like to a cache: its kept part, its page fingerprints, its table rows.

Model server, twin and simulator must agree on each of these, or a virtual cache would hit where
the real one misses.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

from hbm_pool.contracts.identity import mix64, mix64_array


def first_kept_token(history_tokens: int, max_tokens: int, block_tokens: int) -> int:
    """Where the kept part of a history starts: whole blocks are dropped from the oldest end.

    Dropping a block shifts every position, so all KV of that user is void; a block much longer
    than a page makes that rare. `0` while the history fits into `max_tokens`.
    """
    excess = history_tokens - max_tokens
    if excess <= 0:
        return 0
    return -(-excess // block_tokens) * block_tokens


def page_fingerprints(
    items: npt.NDArray[np.int64],
    timestamps: npt.NDArray[np.int64],
    actions: npt.NDArray[np.int64] | None,
    page_tokens: int,
    seed: int = 0,
) -> npt.NDArray[np.uint32]:
    """Rolling fingerprint of the kept history up to the end of each whole page.

    All inputs `[T] int64`; result `[T // page_tokens] uint32`. Two histories with equal
    fingerprint i agree (up to 2^-32) on all tokens before `(i + 1) * page_tokens`. `seed` names
    the model version, so that KV of another version never matches.
    """
    pages = len(items) // page_tokens
    fingerprints = np.empty(pages, dtype=np.uint32)
    columns = [items, timestamps] if actions is None else [items, timestamps, actions]
    packed = np.ascontiguousarray(np.stack(columns, axis=1)[: pages * page_tokens], dtype="<i8")
    raw = packed.tobytes()
    step = page_tokens * len(columns) * 8
    rolling = mix64(seed & 0xFFFFFFFFFFFFFFFF)
    for page in range(pages):
        rolling = xxhash.xxh3_64_intdigest(raw[page * step : (page + 1) * step], rolling)
        fingerprints[page] = rolling & 0xFFFFFFFF
    return fingerprints


def table_rows(
    items: npt.NDArray[np.int64], table: int, rows: int, hashed: bool
) -> npt.NDArray[np.int64]:
    """Rows of a table that a list of items looks up, `[n] int64` -> `[n] int64`.

    The first table of a model holds one row per item (`hashed=False`); further tables are side
    features whose row is a fixed hash of the item (`hashed=True`), as with the hashing trick.
    """
    if not hashed:
        return items
    salted = items.astype(np.uint64) + np.uint64(mix64(table + 1))
    return (mix64_array(salted) % np.uint64(rows)).astype(np.int64)
