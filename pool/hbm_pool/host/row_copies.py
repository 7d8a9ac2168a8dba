"""Compiled look-up and copies of rows between an arena in host memory and contiguous buffers.

Arena and buffers are flat byte arrays: `stride` bytes from one row of the arena to the next,
`nbytes` of payload. No function holds the interpreter lock.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from hbm_pool.host.tz_kernel import (
    EXTENT_MASK,
    EXTENT_SHIFT,
    HITS,
    MISSES,
    OFFSET_MASK,
    ROWS,
    Tz,
    entry_slot,
    find,
    wide,
)
from hbm_pool.host.tz_table import Table, array_of, pointer, table_of, tz_of

Slots = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int32]

BLOCK: Final = 64
"""Rows looked up together: enough for their cache misses to overlap, few enough to stay in L1."""
LINE_BYTES: Final = 64
AHEAD_LINES: Final = 4
"""Cache lines of a row that are asked for ahead; the hardware follows from there."""

SHORT_BYTES: Final = 256
"""Rows of whole cache lines up to this size are copied in place: a call of memcpy costs as much."""

_memcpy = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uintp))


@intrinsic  # type: ignore[untyped-decorator]
def _ask(typingctx: Any, address: Any) -> Any:
    """Asks for the cache line at an address (llvm.prefetch, read, keep)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch",
            [pointer.type],
            ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word]),
        )
        builder.call(function, [pointer, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(types.uintp), generate


@intrinsic  # type: ignore[untyped-decorator]
def _copy_line(typingctx: Any, target: Any, source: Any) -> Any:
    """Copies the 64 bytes at `source` to `target`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = ir.VectorType(ir.IntType(64), 4)
        places = [builder.inttoptr(address, half.as_pointer()) for address in arguments]
        for number in range(2):
            step = ir.Constant(ir.IntType(32), number)
            value = builder.load(builder.gep(places[1], [step]), align=1)
            builder.store(value, builder.gep(places[0], [step]), align=1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp), generate


@numba.njit(nogil=True, cache=True, forceinline=True)  # type: ignore[untyped-decorator]
def _copy_lines(target: int, source: int, nbytes: int) -> None:
    """Copies whole cache lines."""
    for line in range(0, nbytes, LINE_BYTES):
        _copy_line(target + np.uintp(line), source + np.uintp(line))


_SLOTS, _MISSED, _FIRST_AT, _MISSED_AT, _MISSED_FROM, _SEEN, _MARKS, _PLACE = (
    len(Tz._fields) + number for number in range(8)
)


class BatchView:
    """All that a look-up works on, as one `tz_table.Table`: the arrays of the `Tz`, scratch for
    `most_ids` ids, and where the arena is. Keeps the arrays alive."""

    def __init__(
        self, tz: Tz, arena: int, stride_bytes: int, row_bytes: int, most_ids: int
    ) -> None:
        self.most_ids = 1 << max(8, (most_ids - 1).bit_length())
        self.slots = np.empty(self.most_ids, np.int64)
        self.missed = np.empty(self.most_ids, np.int64)
        self.first_at = np.empty(self.most_ids, np.int32)
        self.missed_at = np.empty(self.most_ids, np.int32)
        self.missed_from = np.empty(self.most_ids, np.int32)
        self._seen = np.empty(2 * self.most_ids, np.int32)
        self._marks = np.zeros((tz.words.size >> 6) + 1, np.int64)
        self._place = np.array([arena, stride_bytes, row_bytes], np.int64)
        self._tz = tz
        self.table = table_of(
            (
                *tz,
                self.slots,
                self.missed,
                self.first_at,
                self.missed_at,
                self.missed_from,
                self._seen,
                self._marks,
                self._place,
            )
        )


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def any_outside(ids: int, size: int, rows: int) -> bool:
    """Whether one of `size` int64 ids at an address is not in 0..rows-1."""
    values = numba.carray(pointer(np.uintp(ids)), (size,), np.int64)
    wrong = 0
    for i in range(size):
        wrong |= (values[i] < 0) | (values[i] >= rows)
    return wrong != 0


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def gather_batch(
    view: Table, ids_at: int, size: int, first_key: int, out_at: int
) -> tuple[int, int, int]:
    """Looks a batch up, one hit per distinct row, and copies what is hit to `out_at`.

    `view` is a `BatchView.table` for at least `size` ids, which are int64 at `ids_at`. Its `slots`
    become the slots, -1 for misses. With `out_at` 0 nothing is copied. Distinct missed keys come
    in `missed[:m]`, in order of the first id that asks for each, `first_at[:m]`; and id
    `missed_at[i]` waits for the one in `missed_from[i]`, i < k.
    -> (m, k, distinct hits).
    """
    tz = tz_of(view)
    place = array_of(view, _PLACE, np.int64)
    arena, stride, nbytes = np.uintp(place[0]), place[1], place[2]
    slots = array_of(view, _SLOTS, np.int64)
    missed = array_of(view, _MISSED, np.int64)
    first_at = array_of(view, _FIRST_AT, np.int32)
    missed_at = array_of(view, _MISSED_AT, np.int32)
    missed_from = array_of(view, _MISSED_FROM, np.int32)
    scratch = array_of(view, _SEEN, np.int32)
    marks = array_of(view, _MARKS, np.int64)
    spots = 16
    while spots < 2 * size:
        spots *= 2
    seen = scratch[:spots]
    ids = numba.carray(pointer(np.uintp(ids_at)), (size,), np.int64)
    out = np.uintp(out_at)
    counts: tuple[int, int, int] = _gather(
        tz,
        ids,
        first_key,
        arena,
        stride,
        nbytes,
        out,
        slots,
        seen,
        missed,
        first_at,
        missed_at,
        missed_from,
        marks,
    )
    return counts


@numba.njit(nogil=True, cache=True, error_model="numpy", forceinline=True)  # type: ignore[untyped-decorator]
def _gather(
    tz: Tz,
    ids: Slots,
    first_key: int,
    arena: int,
    stride: int,
    nbytes: int,
    out: int,
    slots: Slots,
    seen: Places,
    missed: Slots,
    first_at: Places,
    missed_at: Places,
    missed_from: Places,
    marks: Slots,
) -> tuple[int, int, int]:
    size = ids.size
    entries = np.empty(BLOCK, np.int64)
    mask = seen.size - 1
    rows = tz.state[ROWS]
    words = tz.words.ctypes.data
    copied = out != 0
    short = nbytes <= SHORT_BYTES and nbytes % LINE_BYTES == 0
    lines = min(AHEAD_LINES * LINE_BYTES, nbytes)
    distinct = 0
    waiting = 0
    hits = 0
    for start in range(0, size, BLOCK):
        stop = min(size, start + BLOCK)
        for i in range(start, stop):
            place = find(tz, ids[i] + first_key)
            entry = tz.entries[place] if place >= 0 else 0
            entries[i - start] = entry
            if entry != 0:
                likely = ((entry >> EXTENT_SHIFT) & EXTENT_MASK) * rows + (entry & OFFSET_MASK) - 1
                _ask(words + np.uintp(likely * 4))
                if copied:
                    for line in range(0, lines, LINE_BYTES):
                        _ask(arena + np.uintp(likely * stride + line))
        for i in range(start, stop):
            key = ids[i] + first_key
            slot = entry_slot(tz, entries[i - start], key)
            slots[i] = slot
            if slot >= 0:
                # One bit per slot tells repeated ids apart, without a branch to guess wrong.
                bits = marks[slot >> 6]
                first = ~(bits >> (slot & 63)) & 1
                marks[slot >> 6] = bits | (1 << (slot & 63))
                hits += first
                word = wide(tz.words[slot])
                if word & 3 != 3:
                    tz.words[slot] = word + first
                continue
            if distinct == 0:
                seen[:] = 0
            spot = ((key * 0x9E3779B1) >> 15) & mask
            while seen[spot] != 0 and missed[seen[spot] - 1] != key:
                spot = (spot + 1) & mask
            if seen[spot] == 0:
                missed[distinct] = key
                first_at[distinct] = i
                distinct += 1
                seen[spot] = distinct
            missed_at[waiting] = i
            missed_from[waiting] = seen[spot] - 1
            waiting += 1
        if copied and short:
            for i in range(start, stop):
                if slots[i] >= 0:
                    _copy_lines(
                        out + np.uintp(i * nbytes), arena + np.uintp(slots[i] * stride), nbytes
                    )
        elif copied:
            for i in range(start, stop):
                if slots[i] >= 0:
                    _memcpy(
                        out + np.uintp(i * nbytes),
                        arena + np.uintp(slots[i] * stride),
                        np.uintp(nbytes),
                    )
    if marks.size < 2 * size:
        marks[:] = 0
    else:
        for i in range(size):
            if slots[i] >= 0:
                marks[slots[i] >> 6] = 0
    tz.state[HITS] += hits
    tz.state[MISSES] += distinct
    return distinct, waiting, hits


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def spread_rows(
    fetched: Bytes, nbytes: int, missed_at: Places, missed_from: Places, out: Bytes
) -> None:
    """Copies fetched rows to the ids that wait: `out[missed_at[i]] = fetched[missed_from[i]]`."""
    source = fetched.ctypes.data
    target = out.ctypes.data
    for i in range(missed_at.size):
        _memcpy(
            target + np.uintp(np.int64(missed_at[i]) * nbytes),
            source + np.uintp(np.int64(missed_from[i]) * nbytes),
            np.uintp(nbytes),
        )


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def store_rows(arena: Bytes, stride: int, nbytes: int, slots: Slots, rows: Bytes) -> None:
    """Writes `rows[i]` to slot `slots[i]` where that is not negative."""
    target = arena.ctypes.data
    source = rows.ctypes.data
    for i in range(slots.size):
        if slots[i] >= 0:
            _memcpy(
                target + np.uintp(slots[i] * stride),
                source + np.uintp(i * nbytes),
                np.uintp(nbytes),
            )


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def move_rows(arena: Bytes, stride: int, nbytes: int, sources: Slots, targets: Slots) -> None:
    """Copies rows between slots. No target is a source of the same call, so order is free."""
    base = arena.ctypes.data
    for i in range(sources.size):
        _memcpy(
            base + np.uintp(targets[i] * stride),
            base + np.uintp(sources[i] * stride),
            np.uintp(nbytes),
        )
