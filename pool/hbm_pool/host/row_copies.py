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
    touch,
)

Slots = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int32]

BLOCK: Final = 64
"""Rows looked up together: enough for their cache misses to overlap, few enough to stay in L1."""
LINE_BYTES: Final = 64
AHEAD_LINES: Final = 4
"""Cache lines of a row that are asked for ahead; the hardware follows from there."""

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


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def any_outside(ids: Slots, rows: int) -> bool:
    """Whether some id is not in 0..rows-1."""
    wrong = 0
    for i in range(ids.size):
        wrong |= (ids[i] < 0) | (ids[i] >= rows)
    return wrong != 0


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def gather_batch(
    tz: Tz,
    ids: Slots,
    first_key: int,
    arena: Bytes,
    stride: int,
    nbytes: int,
    out: Bytes,
    slots: Slots,
    seen: Places,
    missed: Slots,
    missed_at: Places,
    missed_from: Places,
) -> tuple[int, int, int]:
    """Looks a batch up, one hit per distinct row, and copies what is hit to `out`.

    `seen` is scratch, a power of two of at least twice the ids; `slots` becomes `[n]`, -1 for
    misses. With an empty `out` nothing is copied. Distinct missed keys come in `missed[:m]`, and
    id `missed_at[i]` waits for the one in `missed_from[i]`, i < k. -> (m, k, distinct hits).
    """
    seen[:] = 0
    mask = seen.size - 1
    rows = tz.state[ROWS]
    base = arena.ctypes.data
    words = tz.words.ctypes.data
    target = out.ctypes.data
    copied = out.size > 0
    lines = min(AHEAD_LINES * LINE_BYTES, nbytes)
    entries = np.empty(BLOCK, np.int64)
    distinct = 0
    waiting = 0
    hits = 0
    for start in range(0, ids.size, BLOCK):
        stop = min(ids.size, start + BLOCK)
        for i in range(start, stop):
            place = find(tz, ids[i] + first_key)
            entry = tz.entries[place] if place >= 0 else 0
            entries[i - start] = entry
            if entry != 0:
                likely = ((entry >> EXTENT_SHIFT) & EXTENT_MASK) * rows + (entry & OFFSET_MASK) - 1
                _ask(words + np.uintp(likely * 4))
                if copied:
                    for line in range(0, lines, LINE_BYTES):
                        _ask(base + np.uintp(likely * stride + line))
        for i in range(start, stop):
            key = ids[i] + first_key
            slot = entry_slot(tz, entries[i - start], key)
            slots[i] = slot
            # Repeated ids: slots are marked as they are, missed keys by their complement.
            mark = slot + 1 if slot >= 0 else ~key
            spot = ((mark * 0x9E3779B1) >> 15) & mask
            while True:
                held = seen[spot]
                if held == 0:
                    if slot >= 0:
                        seen[spot] = mark
                        touch(tz, slot)
                        hits += 1
                    else:
                        seen[spot] = ~distinct
                        missed[distinct] = key
                        missed_at[waiting] = i
                        missed_from[waiting] = distinct
                        distinct += 1
                        waiting += 1
                    break
                if slot >= 0:
                    if held == mark:
                        break
                elif held < 0 and missed[~held] == key:
                    missed_at[waiting] = i
                    missed_from[waiting] = ~held
                    waiting += 1
                    break
                spot = (spot + 1) & mask
        if copied:
            for i in range(start, stop):
                if slots[i] >= 0:
                    _memcpy(
                        target + np.uintp(i * nbytes),
                        base + np.uintp(slots[i] * stride),
                        np.uintp(nbytes),
                    )
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
