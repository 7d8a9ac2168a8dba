"""What a pool is made of, checked before anything is reserved. Sizes in bytes, lengths in tokens.

Wrong values raise pydantic's ValidationError, a ValueError, whose message says what to change;
commands turn it into one line and exit code 2.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from hbm_pool.contracts.records import MAX_CLASSES
from hbm_pool.host.extent_size import choose_extent_bytes, extents_for_tokens, stored_row_bytes

Dtype = Literal["float32", "float16", "bfloat16", "float8_e4m3fn", "int8"]
DTYPE_BYTES: Final = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int8": 1,
}
MIN_CLASS_EXTENTS: Final = 2
"""A width class needs one extent on probation and one of main (replacement rule TZ)."""
PINNED_BATCHES: Final = 2
"""Batches whose KV is pinned at once: one computes while the rows of the next are gathered."""

_STRICT: Final = ConfigDict(extra="forbid")
Alpha = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


@dataclass(frozen=True, config=_STRICT)
class TableSpec:
    """One embedding table: `rows` rows of `width` elements."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    rows: Annotated[int, Field(ge=1, lt=1 << 40)]
    width: Annotated[int, Field(ge=1, le=1 << 16)]
    dtype: Dtype = "float32"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as the table has it, without padding."""
        return self.width * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, config=_STRICT)
class KVSpec:
    """Shape of the KV of one token, and how many tokens make a page."""

    layers: Annotated[int, Field(ge=1, le=1024)]
    heads: Annotated[int, Field(ge=1, le=1024)]
    head_dim: Annotated[int, Field(ge=1, le=4096)]
    page_tokens: Annotated[int, Field(ge=1, le=4096)]
    dtype: Dtype = "float32"

    @property
    def token_bytes(self) -> int:
        """Bytes of one token: K and V of all layers."""
        return 2 * self.layers * self.heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: `page_tokens` tokens of all layers."""
        return self.page_tokens * self.token_bytes


@dataclass(frozen=True, config=_STRICT)
class WidthClass:
    """Tables whose rows have the same width and dtype; an EMB extent holds one class."""

    width: int
    dtype: Dtype
    row_bytes: int
    """Bytes from one row to the next: the row, padded so that an extent holds whole rows."""
    rows_per_extent: int
    tables: tuple[int, ...]
    """Indices into `PoolConfig.tables`, as in row keys."""
    catalogue_rows: int
    """Rows of these tables together."""


class PoolShape(BaseModel):
    """How many bytes, cut how, for which tables and KV: what does not depend on α."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pool_bytes: Annotated[int, Field(ge=1)]
    """Reserved exactly, rounded down to whole extents."""
    extent_bytes: Annotated[int, Field(ge=1)] | None = None
    """None: chosen by `plan_memory`."""
    tables: Annotated[tuple[TableSpec, ...], Field(min_length=1, max_length=1 << 16)]
    kv: KVSpec
    max_sequence_tokens: Annotated[int, Field(ge=1)]
    """Longest history whose KV is kept."""

    @model_validator(mode="after")
    def _check_shape(self) -> PoolShape:
        self._check_tables()
        self._check_sizes()
        return self

    def _check_tables(self) -> None:
        names = [table.name for table in self.tables]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tables share the name {twice[0]!r}; give every table its own")
        kinds = {(table.width, table.dtype) for table in self.tables}
        if len(kinds) > MAX_CLASSES:
            raise ValueError(
                f"tables have {len(kinds)} different (width, dtype) pairs and a pool keeps at most "
                f"{MAX_CLASSES} apart; pad some tables to a common width"
            )

    def _check_sizes(self) -> None:
        kv = self.kv
        if self.max_sequence_tokens % kv.page_tokens:
            raise ValueError(
                f"page_tokens={kv.page_tokens} does not divide max_sequence_tokens="
                f"{self.max_sequence_tokens}; choose a page size that does"
            )
        if self.extent_bytes is not None and self.extent_bytes % kv.page_bytes:
            below = self.extent_bytes // kv.page_bytes * kv.page_bytes
            raise ValueError(
                f"extent_bytes={self.extent_bytes} is not a multiple of the KV page "
                f"({kv.page_tokens} tokens x {kv.token_bytes} bytes = {kv.page_bytes} bytes); use "
                f"{below or kv.page_bytes} or {below + kv.page_bytes}"
            )
        for table in self.tables:
            if table.row_bytes > self.bytes_per_extent:
                raise ValueError(
                    f"table {table.name!r}: one row has {table.row_bytes} bytes and an extent "
                    f"{self.bytes_per_extent}; raise extent_bytes"
                )
        user = self.extents_per_user
        least = user + MIN_CLASS_EXTENTS * len(self.classes)
        if self.num_extents < least:
            raise ValueError(
                f"pool_bytes={self.pool_bytes} holds {self.num_extents} extents of "
                f"{self.bytes_per_extent} bytes; one user of max_sequence_tokens="
                f"{self.max_sequence_tokens} needs {user} and the tables "
                f"{least - user}: raise pool_bytes to at least {least * self.bytes_per_extent} or "
                "lower max_sequence_tokens"
            )

    @cached_property
    def bytes_per_extent(self) -> int:
        """`extent_bytes`, or the size chosen where it is None."""
        if self.extent_bytes is not None:
            return self.extent_bytes
        return choose_extent_bytes(
            self.kv.page_tokens, self.kv.token_bytes, [table.row_bytes for table in self.tables]
        )

    @cached_property
    def num_extents(self) -> int:
        """Whole extents in the pool."""
        return self.pool_bytes // self.bytes_per_extent

    @cached_property
    def pages_per_extent(self) -> int:
        """KV pages of one extent."""
        return self.bytes_per_extent // self.kv.page_bytes

    @cached_property
    def extents_per_user(self) -> int:
        """KV extents of a history of `max_sequence_tokens`."""
        return extents_for_tokens(
            self.max_sequence_tokens, self.kv.page_tokens, self.pages_per_extent
        )

    @cached_property
    def classes(self) -> tuple[WidthClass, ...]:
        """Width classes in the order in which the tables name them."""
        kinds = list(dict.fromkeys((table.width, table.dtype) for table in self.tables))
        classes = []
        for width, dtype in kinds:
            members = [i for i, t in enumerate(self.tables) if (t.width, t.dtype) == (width, dtype)]
            itemsize = DTYPE_BYTES[dtype]
            row_bytes = stored_row_bytes(width * itemsize, itemsize, self.bytes_per_extent)
            classes.append(
                WidthClass(
                    width=width,
                    dtype=dtype,
                    row_bytes=row_bytes,
                    rows_per_extent=self.bytes_per_extent // row_bytes,
                    tables=tuple(members),
                    catalogue_rows=sum(self.tables[i].rows for i in members),
                )
            )
        return tuple(classes)


class PoolConfig(PoolShape):
    """Everything a pool needs to know. Immutable; `model_copy(update=…)` does not re-check."""

    alpha: Alpha = 0.5
    alpha_min: Alpha = 0.1
    alpha_max: Alpha = 0.9
    max_batch_users: Annotated[int, Field(ge=1)]
    """Users of one batch: with `max_sequence_tokens` the most KV one batch can pin."""
    link_bytes_per_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Makes host-to-device copies on CPU cost what they cost on this link; None: no model."""
    refill_bytes_per_s: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Budget of the refiller until told otherwise; 0: it rests."""
    slice_budget_us: Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False)] = 60.0
    """Time for which one slice of a planned move relocates rows at a batch boundary."""
    max_kv_row_lag_s: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 300.0
    """How long KV computed from older row values is reused after rows were pushed; 0: never."""
    emb_index: Literal["auto", "host", "device"] = "auto"
    """Where keys and replacement of EMB live; auto: on the GPU if there is one and it is cheap."""
    kv_eviction: Literal["tail", "whole"] = "tail"
    """What the coldest user loses when room is needed: the tail of the history, or all of it."""

    @model_validator(mode="after")
    def _check(self) -> PoolConfig:
        self._check_bounds()
        return self

    def _check_bounds(self) -> None:
        if not self.alpha_min <= self.alpha <= self.alpha_max:
            raise ValueError(
                f"alpha_min={self.alpha_min} <= alpha={self.alpha} <= alpha_max={self.alpha_max} "
                "does not hold; change one of them"
            )
        total = self.num_extents
        need_emb = MIN_CLASS_EXTENTS * len(self.classes)
        if self.min_emb_extents < need_emb:
            raise ValueError(
                f"alpha_min={self.alpha_min} leaves {self.min_emb_extents} of {total} extents to "
                f"the tables, which need {need_emb}; use alpha_min >= "
                f"{_up(need_emb / total)} or a larger pool_bytes"
            )
        if self.min_emb_extents > self.max_emb_extents:
            raise ValueError(
                f"no whole number of {total} extents lies between alpha_min={self.alpha_min} and "
                f"alpha_max={self.alpha_max}; widen the bounds or use a larger pool_bytes"
            )
        pinned = PINNED_BATCHES * self.max_batch_users * self.extents_per_user
        left = total - self.max_emb_extents
        if left < pinned:
            highest = (total - pinned) / total
            bytes_needed = self._pool_bytes_for(pinned)
            lower = f"use alpha_max <= {_down(highest)}, " if highest > self.alpha_min else ""
            raise ValueError(
                f"alpha_max={self.alpha_max} leaves {left} of {total} extents to KV, but "
                f"{PINNED_BATCHES} batches of max_batch_users={self.max_batch_users} with "
                f"{self.max_sequence_tokens} tokens pin {pinned}: {lower}"
                f"pool_bytes >= {bytes_needed}, fewer users per batch or shorter histories"
            )

    def _pool_bytes_for(self, pinned: int) -> int:
        if self.alpha_max >= 1.0:
            return self.pool_bytes + pinned * self.bytes_per_extent
        total = math.floor((pinned - 1) / (1.0 - self.alpha_max))
        while total - math.floor(self.alpha_max * total + _EPSILON) < pinned:
            total += 1
        return total * self.bytes_per_extent

    @cached_property
    def min_emb_extents(self) -> int:
        """EMB extents at `alpha_min`, rounded up."""
        return math.ceil(self.alpha_min * self.num_extents - _EPSILON)

    @cached_property
    def max_emb_extents(self) -> int:
        """EMB extents at `alpha_max`, rounded down."""
        return math.floor(self.alpha_max * self.num_extents + _EPSILON)

    def emb_extents(self, alpha: float) -> int:
        """EMB extents for an α, rounded and kept within the bounds."""
        wanted = round(alpha * self.num_extents)
        return min(max(wanted, self.min_emb_extents), self.max_emb_extents)


_EPSILON: Final = 1e-9
"""Products such as 0.9 * 10 are a rounding error away from whole numbers."""


def _up(value: float) -> float:
    return math.ceil(value * 1000 - _EPSILON) / 1000


def _down(value: float) -> float:
    return math.floor(value * 1000 + _EPSILON) / 1000
