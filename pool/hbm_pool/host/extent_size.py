"""How large an extent is, and how rows and pages tile it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

EXTENT_GOAL_BYTES: Final = 2 << 20
"""Copies want pieces of at least .5 MB; 2 MiB is where throughput is flat on PCIe 4."""
EXTENT_MIN_TOKENS: Final = 64
EXTENT_MAX_TOKENS: Final = 128
"""Larger extents waste more at the end of each user's history, smaller ones make lists long."""
ROW_ALIGNMENT_BYTES: Final = 16
"""Widest vector load of a GPU thread."""


def extents_for_tokens(tokens: int, page_tokens: int, pages_per_extent: int) -> int:
    """KV extents of a history of that many tokens."""
    pages = -(-tokens // page_tokens)
    return -(-pages // pages_per_extent)


def stored_row_bytes(row_bytes: int, itemsize: int, extent_bytes: int) -> int:
    """Bytes from one row to the next in an extent: the smallest divisor of the extent that holds
    the row and keeps it aligned (to 16 bytes; to its own size rounded to elements if smaller).
    """
    alignment = ROW_ALIGNMENT_BYTES if row_bytes >= ROW_ALIGNMENT_BYTES else itemsize
    if extent_bytes % alignment:
        alignment = itemsize
    padded = -(-row_bytes // alignment) * alignment
    while extent_bytes % padded:
        padded += alignment
    return padded


def choose_extent_bytes(page_tokens: int, token_bytes: int, row_bytes: Sequence[int]) -> int:
    """Extent size: whole pages, 64 to 128 tokens of KV, about 2 MiB, little padding of rows.

    Padding counts first (every percent of it is a percent of EMB lost), then the distance to
    2 MiB. A page longer than 128 tokens makes an extent of one page, or of as many as the widest
    row needs.
    """
    page_bytes = page_tokens * token_bytes
    fewest = max(1, -(-EXTENT_MIN_TOKENS // page_tokens))
    most = max(fewest, EXTENT_MAX_TOKENS // page_tokens)
    widest = max(row_bytes, default=0)
    fewest = max(fewest, -(-widest // page_bytes))
    most = max(most, fewest)

    def cost(pages: int) -> tuple[float, int]:
        extent = pages * page_bytes
        waste = max(
            (1 - size / stored_row_bytes(size, 1, extent) for size in row_bytes), default=0.0
        )
        return round(waste, 2), abs(extent - EXTENT_GOAL_BYTES)

    return page_bytes * min(range(fewest, most + 1), key=cost)
