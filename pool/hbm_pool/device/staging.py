"""Page-locked buffers for what a GPU reads out of host memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from hbm_pool.host.file_store import DEFAULT_BUFFER_BYTES, DEFAULT_BUFFERS


def staging_ring(
    device: torch.device | str,
    *,
    buffers: int = DEFAULT_BUFFERS,
    buffer_bytes: int = DEFAULT_BUFFER_BYTES,
) -> list[npt.NDArray[np.uint8]]:
    """`buffers` arrays `[buffer_bytes] uint8` for `FileRowStore`, page-locked when the arena is
    on a GPU. Raises ValueError for sizes below 1."""
    if buffers < 1 or buffer_bytes < 1:
        raise ValueError(f"{buffers} staging buffers of {buffer_bytes} bytes are none; use 1 each")
    pinned = torch.device(device).type == "cuda"
    return [
        torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=pinned).numpy()
        for _ in range(buffers)
    ]
