"""All GPU benchmarks in one run: what a GPU machine is asked for.

* `link`: pinned host-to-device copies of one extent and of 64 MiB: the ceiling of every miss and
  every refill.
* `embedding`: lookup + gather against `index_select` on the device (`hbm_bench.embedding`).
* `serving`: pipelined, serial and uncached server on the device (`hbm_bench.serving`).
"""

from __future__ import annotations

import time
from typing import Any

import torch

from hbm_bench import embedding, serving


def run(quick: bool, seed: int) -> dict[str, Any]:
    """All figures; needs a CUDA device."""
    return {
        "link": {
            f"{size >> 10}_kib_gb_per_s": _copy_gb_per_s(size, 20 if quick else 200)
            for size in (embedding.EXTENT_BYTES, 64 << 20)
        },
        "embedding": embedding.run(quick, seed, device="cuda"),
        "serving": serving.run(quick, seed, device="cuda"),
    }


def _copy_gb_per_s(size: int, copies: int) -> float:
    """Bandwidth of pinned copies on one stream, until all have arrived."""
    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(copies):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return size * copies / (time.perf_counter() - begin) / 1e9
