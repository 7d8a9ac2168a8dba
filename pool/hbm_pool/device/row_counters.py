"""What the embedding cache counts: per gather, per width class, in all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from hbm_pool.device.row_index import Found, Inserted, Keys
from hbm_pool.device.row_requests import RowRequest
from hbm_pool.device.width_class import EmbClass

NOTHING_MISSED: Final[Mapping[str, npt.NDArray[np.integer]]] = MappingProxyType({})


class GatherStats(NamedTuple):
    """What one gather found. `hits + misses == accesses`: a row that a batch asks for twice is
    looked up and copied once."""

    accesses: int
    unique: int
    hits: int
    misses: int
    """Distinct rows that were copied from the store."""
    conflict_misses: int
    """Of those, rows that found no place in the cache."""
    ghost_hits: int
    """Of those, rows that had left probation a short while ago."""
    bytes: int
    """Copied from the store."""
    link_ms: float
    """Waited for the link."""
    class_accesses: tuple[int, ...]
    class_misses: tuple[int, ...]
    missed_at: Mapping[str, npt.NDArray[np.integer]]
    """Per table that missed: for each of the rows that were copied the place of an id that asked
    for it, ascending."""


class ClassCounters(NamedTuple):
    """One width class since the cache was made; extents and rows as they are now."""

    extents: int
    accesses: int
    hits: int
    misses: int
    conflict_misses: int
    ghost_hits: int
    evictions: int
    promotions: int
    relocations: int
    index_bytes: int


class EmbeddingCounters(NamedTuple):
    """The whole cache since it was made."""

    accesses: int
    hits: int
    misses: int
    conflict_misses: int
    ghost_hits: int
    evictions: int
    relocated_rows: int
    refill_rows: int
    row_epoch: int
    classes: tuple[ClassCounters, ...]


def count_gather(
    num_classes: int,
    requests: Sequence[RowRequest],
    found: Sequence[Found],
    missed: Sequence[Keys],
    inserted: Sequence[Inserted],
) -> GatherStats:
    """Sums over the tables of a gather; `missed` is per table or empty, `inserted` per table that
    missed, in their order."""
    if len(requests) == 1 and not missed:  # the quick way of the usual case: one table, all hits
        number, n = requests[0].kind.number, found[0].accesses
        none = (0,) * num_classes
        per_class = (*none[:number], n, *none[number + 1 :])
        return GatherStats(n, found[0].unique, n, 0, 0, 0, 0, 0.0, per_class, none, NOTHING_MISSED)
    accesses = [0] * num_classes
    misses = [0] * num_classes
    missed_at: dict[str, npt.NDArray[np.integer]] = {}
    total = unique = missed_rows = ghosts = conflicts = nbytes = 0
    for request, one in zip(requests, found, strict=True):
        accesses[request.kind.number] += one.accesses
        total += one.accesses
        unique += one.unique
    if missed:
        became = iter(inserted)
        for request, one, keys in zip(requests, found, missed, strict=True):
            if keys.size:
                missed_at[request.table.name] = one.missed_places()
                result = next(became)
                misses[request.kind.number] += keys.size
                missed_rows += keys.size
                ghosts += result.ghost_hits
                conflicts += result.conflicts
                nbytes += keys.size * request.kind.row_bytes
    return GatherStats(
        accesses=total,
        unique=unique,
        hits=total - missed_rows,
        misses=missed_rows,
        conflict_misses=conflicts,
        ghost_hits=ghosts,
        bytes=nbytes,
        link_ms=0.0,
        class_accesses=tuple(accesses),
        class_misses=tuple(misses),
        missed_at=missed_at,
    )


def count_cache(classes: Sequence[EmbClass], refill_rows: int, row_epoch: int) -> EmbeddingCounters:
    """All counters at once; the caller holds the cache's lock."""
    counted = []
    accesses = misses = conflicts = ghosts = evictions = relocations = 0
    for kind in classes:
        rows = kind.index.counters()
        accesses += kind.accesses
        misses += kind.misses
        conflicts += rows.conflicts
        ghosts += rows.ghost_hits
        evictions += rows.evictions
        relocations += rows.relocations
        counted.append(
            ClassCounters(
                kind.num_extents,
                kind.accesses,
                kind.accesses - kind.misses,
                kind.misses,
                rows.conflicts,
                rows.ghost_hits,
                rows.evictions,
                rows.promotions,
                rows.relocations,
                kind.index.index_bytes,
            )
        )
    return EmbeddingCounters(
        accesses=accesses,
        hits=accesses - misses,
        misses=misses,
        conflict_misses=conflicts,
        ghost_hits=ghosts,
        evictions=evictions,
        relocated_rows=relocations,
        refill_rows=refill_rows,
        row_epoch=row_epoch,
        classes=tuple(counted),
    )
