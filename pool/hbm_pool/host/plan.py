"""What a pool of a given size holds at each α, before anything starts (`hbm plan`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from hbm_pool.host.config import (
    MIN_CLASS_EXTENTS,
    PINNED_BATCHES,
    KVSpec,
    PoolShape,
    TableSpec,
    WidthClass,
)
from hbm_pool.host.extent_size import extents_for_tokens

_MIB: Final = 1 << 20
GPU_MEMORY_BYTES: Final = {
    "a100-40": 40_326 * _MIB,
    "a100-80": 81_050 * _MIB,
    "h100-80": 80_995 * _MIB,
    "h200-141": 143_155 * _MIB,
}
"""Memory as CUDA reports it (`total_memory`), a little less than what is printed on the box."""
DEFAULT_RESERVE_BYTES: Final = 6 << 30
"""Kept out of the pool: CUDA context, dense weights, activations of one batch, gather buffers."""
DEFAULT_ALPHAS: Final = tuple(step / 10 for step in range(1, 10))


class ClassRows(NamedTuple):
    """Rows of one width class at one α."""

    tables: tuple[str, ...]
    rows: int
    coverage: float
    """Rows held ÷ rows of these tables."""


class AlphaPlan(NamedTuple):
    """What the pool holds at one α."""

    alpha: float
    """EMB extents ÷ all extents, as the pool would report it."""
    emb_extents: int
    kv_extents: int
    emb_bytes: int
    kv_bytes: int
    rows: tuple[ClassRows, ...]
    kv_tokens: int
    users: int
    """Users whose whole history of `history_tokens` fits."""
    pins_fit: bool
    """Two batches' pins and every class's least extents fit: a server may go to this α."""


class MemoryPlan(NamedTuple):
    """Sizes of a pool, and what it holds per α."""

    pool_bytes: int
    """As used: whole extents."""
    unused_bytes: int
    """Left over at the end of what was given."""
    extent_bytes: int
    num_extents: int
    page_tokens: int
    page_bytes: int
    pages_per_extent: int
    extent_tokens: int
    token_bytes: int
    classes: tuple[WidthClass, ...]
    row_padding: tuple[float, ...]
    """Share of EMB bytes lost to row padding, per class."""
    user_tail: float
    """Share of KV bytes lost, on average, in the last extent of a history of `history_tokens`."""
    history_tokens: int
    max_sequence_tokens: int
    max_batch_users: int
    alphas: tuple[AlphaPlan, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain = self._asdict()
        plain["classes"] = [
            {
                "width": c.width,
                "dtype": c.dtype,
                "row_bytes": c.row_bytes,
                "rows_per_extent": c.rows_per_extent,
                "catalogue_rows": c.catalogue_rows,
            }
            for c in self.classes
        ]
        plain["alphas"] = [
            {**row._asdict(), "rows": [part._asdict() for part in row.rows]} for row in self.alphas
        ]
        return plain


def plan_memory(
    kv: KVSpec,
    tables: Sequence[TableSpec],
    pool_bytes: int,
    *,
    max_sequence_tokens: int,
    max_batch_users: int = 1,
    history_tokens: int | None = None,
    extent_bytes: int | None = None,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
) -> MemoryPlan:
    """Extent size, rows, users and bytes per α for a model and a pool of `pool_bytes`.

    `history_tokens` is the length users are counted with (default: `max_sequence_tokens`). Among
    the width classes, EMB is divided in proportion to their tables' bytes, never more than a table
    has; a running pool divides by marginal miss cost. Raises ValueError (of `PoolShape`) when the
    pool cannot hold one user and the least of every table.
    """
    shape = PoolShape(
        pool_bytes=pool_bytes,
        extent_bytes=extent_bytes,
        tables=tuple(tables),
        kv=kv,
        max_sequence_tokens=max_sequence_tokens,
    )
    counted = max_sequence_tokens if history_tokens is None else history_tokens
    if not 1 <= counted <= max_sequence_tokens:
        raise ValueError(
            f"history_tokens={counted} must be from 1 to max_sequence_tokens={max_sequence_tokens}"
        )
    return MemoryPlan(
        pool_bytes=shape.num_extents * shape.bytes_per_extent,
        unused_bytes=pool_bytes % shape.bytes_per_extent,
        extent_bytes=shape.bytes_per_extent,
        num_extents=shape.num_extents,
        page_tokens=kv.page_tokens,
        page_bytes=kv.page_bytes,
        pages_per_extent=shape.pages_per_extent,
        extent_tokens=shape.pages_per_extent * kv.page_tokens,
        token_bytes=kv.token_bytes,
        classes=shape.classes,
        row_padding=tuple(
            1.0 - shape.tables[c.tables[0]].row_bytes / c.row_bytes for c in shape.classes
        ),
        user_tail=_user_tail(shape, counted),
        history_tokens=counted,
        max_sequence_tokens=max_sequence_tokens,
        max_batch_users=max_batch_users,
        alphas=tuple(_at(shape, alpha, counted, max_batch_users) for alpha in alphas),
    )


def highest_alpha(plan: MemoryPlan) -> float:
    """The highest α at which two batches' pins still fit (0 when they never do)."""
    per_user = extents_for_tokens(plan.max_sequence_tokens, plan.page_tokens, plan.pages_per_extent)
    pinned = PINNED_BATCHES * plan.max_batch_users * per_user
    return max(0, plan.num_extents - pinned) / plan.num_extents


def _at(shape: PoolShape, alpha: float, history_tokens: int, max_batch_users: int) -> AlphaPlan:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must be from 0 to 1")
    total = shape.num_extents
    emb = round(alpha * total)
    kv = total - emb
    per_user = extents_for_tokens(history_tokens, shape.kv.page_tokens, shape.pages_per_extent)
    pinned = PINNED_BATCHES * max_batch_users * shape.extents_per_user
    return AlphaPlan(
        alpha=emb / total,
        emb_extents=emb,
        kv_extents=kv,
        emb_bytes=emb * shape.bytes_per_extent,
        kv_bytes=kv * shape.bytes_per_extent,
        rows=_class_rows(shape, emb),
        kv_tokens=kv * shape.pages_per_extent * shape.kv.page_tokens,
        users=kv // per_user,
        pins_fit=kv >= pinned and emb >= MIN_CLASS_EXTENTS * len(shape.classes),
    )


def _class_rows(shape: PoolShape, emb_extents: int) -> tuple[ClassRows, ...]:
    """Extents among the classes by table bytes; what a class cannot fill goes to the others."""
    wanted = [-(-c.catalogue_rows // c.rows_per_extent) for c in shape.classes]
    given = [int(i < emb_extents) for i in range(len(wanted))]  # each class its first
    left = emb_extents - sum(given)
    open_classes = [i for i in range(len(wanted)) if given[i] < wanted[i]]
    while left > 0 and open_classes:
        weight = sum(wanted[i] for i in open_classes)
        shares = {i: min(wanted[i] - given[i], left * wanted[i] // weight) for i in open_classes}
        if not any(shares.values()):
            shares = {open_classes[0]: 1}
        for i, share in shares.items():
            given[i] += share
            left -= share
        open_classes = [i for i in open_classes if given[i] < wanted[i]]
    result = []
    for c, extents in zip(shape.classes, given, strict=True):
        rows = min(extents * c.rows_per_extent, c.catalogue_rows)
        names = tuple(shape.tables[i].name for i in c.tables)
        result.append(ClassRows(names, rows, rows / c.catalogue_rows))
    return tuple(result)


def _user_tail(shape: PoolShape, history_tokens: int) -> float:
    extent_tokens = shape.pages_per_extent * shape.kv.page_tokens
    extents = extents_for_tokens(history_tokens, shape.kv.page_tokens, shape.pages_per_extent)
    return 1.0 - history_tokens / (extents * extent_tokens)
