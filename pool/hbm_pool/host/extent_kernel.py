"""Inner loops of the extent ledger, compiled: thousands of extents change hands in microseconds."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from hbm_pool.host.tz_kernel import kernel

OUT_OF_RANGE: Final = -1
MIXED: Final = -2
TWICE: Final = -3


@kernel
def leave(
    owner: npt.NDArray[np.int8],
    generation: npt.NDArray[np.uint32],
    extents: npt.NDArray[np.int32],
    state: int,
) -> int:
    """Puts extents of one owner into `state`, another one, and makes void what points into them;
    returns who that owner was.

    Returns one of the negative codes above, with nothing changed, when the extents are not all of
    one owner.
    """
    first = np.int8(-1)
    for i in range(extents.size):
        extent = extents[i]
        now = owner[extent] if 0 <= extent < owner.size else np.int8(-1)
        if i == 0:
            first = now
        if now != first or now < 0:
            twice = False
            for j in range(i):
                owner[extents[j]] = first
                generation[extents[j]] -= np.uint32(1)
                twice = twice or extents[j] == extent
            if now < 0:
                return OUT_OF_RANGE
            return TWICE if twice else MIXED
        owner[extent] = state
        generation[extent] += np.uint32(1)
    return int(first)


@kernel
def lend(owner: npt.NDArray[np.int8], extents: npt.NDArray[np.int32], state: int) -> None:
    """Puts extents into `state`."""
    for i in range(extents.size):
        owner[extents[i]] = state
