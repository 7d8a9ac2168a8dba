"""The one tensor that is the pool, and zero-copy views over it."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Final

import torch

from hbm_pool.errors import ArenaMemoryError
from hbm_pool.host.config import KVSpec

TORCH_DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int8": torch.int8,
}


class Arena:
    """`num_extents` extents of `extent_bytes` bytes, reserved exactly and at once.

    On CUDA the tensor lies in its own `torch.cuda.MemPool`, so that the caching allocator neither
    splits nor reuses it. On CPU every page is touched, so that memory that is not there is found
    now and not under load. The base pointer never changes: CUDA graphs over views stay valid.

    Raises ArenaMemoryError when the memory is not there, ValueError for an unusable device.
    """

    def __init__(
        self, num_extents: int, extent_bytes: int, device: torch.device | str = "cpu"
    ) -> None:
        if num_extents < 1 or extent_bytes < 1:
            raise ValueError(
                f"an arena of {num_extents} extents of {extent_bytes} bytes is empty; both must be "
                "at least 1"
            )
        self.num_extents = num_extents
        self.extent_bytes = extent_bytes
        self.device = _usable_device(device)
        self._mem_pool: torch.cuda.MemPool | None = None
        nbytes = num_extents * extent_bytes
        if self.device.type == "cuda":
            self.storage = self._reserve_cuda(nbytes)
        else:
            self.storage = _reserve_cpu(nbytes)

    @property
    def nbytes(self) -> int:
        """Size of the arena in bytes."""
        return self.num_extents * self.extent_bytes

    @property
    def base_pointer(self) -> int:
        """Address of the first byte; fixed."""
        return self.storage.data_ptr()

    def rows(self, row_bytes: int, dtype: torch.dtype | str, width: int) -> torch.Tensor:
        """The whole arena as rows, `[num_extents * rows_per_extent, width]`, zero-copy.

        `row_bytes` is the distance from one row to the next; row r of extent e has the index
        `e * (extent_bytes // row_bytes) + r`. Raises ValueError when rows do not fill an extent.
        """
        kind = _torch_dtype(dtype)
        if row_bytes < width * kind.itemsize or self.extent_bytes % row_bytes:
            raise ValueError(
                f"rows of {width} x {kind} at {row_bytes} bytes do not tile an extent of "
                f"{self.extent_bytes} bytes; use a divisor of it that holds the row"
            )
        if row_bytes % kind.itemsize:
            raise ValueError(f"row_bytes={row_bytes} is not a multiple of {kind}'s size")
        table = self.storage.view(kind).view(-1, row_bytes // kind.itemsize)
        return table[:, :width]

    def pages(self, kv: KVSpec) -> list[torch.Tensor]:
        """The whole arena as KV pages: one view per layer, zero-copy,
        `[num_pages, 2, page_tokens, heads, head_dim]`; index 0 of axis 1 is K, 1 is V.

        Page-major: all layers of a page are adjacent, page i of extent e has the arena-global id
        `e * pages_per_extent + i` in every layer. Raises ValueError when pages do not fill an
        extent.
        """
        if self.extent_bytes % kv.page_bytes:
            raise ValueError(
                f"KV pages of {kv.page_bytes} bytes do not tile an extent of {self.extent_bytes} "
                "bytes; use an extent that is a multiple of the page"
            )
        kind = _torch_dtype(kv.dtype)
        shape = (self.nbytes // kv.page_bytes, 2, kv.page_tokens, kv.heads, kv.head_dim)
        token = kv.heads * kv.head_dim
        half = kv.page_tokens * token
        strides = (kv.layers * 2 * half, half, token, kv.head_dim, 1)
        flat = self.storage.view(kind)
        return [
            flat.as_strided(shape, strides, storage_offset=layer * 2 * half)
            for layer in range(kv.layers)
        ]

    def close(self) -> None:
        """Frees the memory once no view is left; the arena is unusable afterwards."""
        self.storage = torch.empty(0, dtype=torch.uint8)
        self._mem_pool = None

    def _reserve_cuda(self, nbytes: int) -> torch.Tensor:
        available, total = torch.cuda.mem_get_info(self.device)
        reason = ""
        # The driver is asked first: a failed cudaMalloc of this size would flush other caches.
        if nbytes <= available:
            self._mem_pool = torch.cuda.MemPool()
            try:
                with torch.cuda.use_mem_pool(self._mem_pool, device=self.device):
                    return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            except torch.OutOfMemoryError as error:
                reason = f" ({str(error).splitlines()[0]})"
                self._mem_pool = None
        raise ArenaMemoryError(
            f"the pool needs {_gib(nbytes)} on {self.device} and {_gib(available)} of "
            f"{_gib(total)} are free{reason}; lower pool_bytes to at most {available}, or stop "
            "what else uses this GPU (nvidia-smi)"
        )


def _reserve_cpu(nbytes: int) -> torch.Tensor:
    available = available_host_bytes()
    if available is None or nbytes <= available:
        try:
            storage = torch.empty(nbytes, dtype=torch.uint8)
            _ask_for_huge_pages(storage.data_ptr(), nbytes)
            return storage.fill_(0)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
    free = "an unknown amount" if available is None else f"{_gib(available)}"
    raise ArenaMemoryError(
        f"the pool needs {_gib(nbytes)} of host memory and {free} is available; lower pool_bytes"
        + (f" to at most {available}" if available is not None else "")
        + ", or raise the memory limit of this process"
    )


def _ask_for_huge_pages(address: int, nbytes: int) -> None:
    """Asks the kernel for 2 MiB pages before the memory is touched: a gather reads rows all over
    the arena, and with 4 KiB pages most of its time is address translation.

    Best effort: where the system has no huge pages the arena works with small ones.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        libc = ctypes.CDLL(None)
        libc.madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_HUGEPAGE)
        )


def available_host_bytes() -> int | None:
    """Memory this process may still take: of the machine and of its cgroup; None if unknown."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such hierarchy, or no limit ("max")
    return max(0, min(found)) if found else None


def _usable_device(device: torch.device | str) -> torch.device:
    wanted = torch.device(device)
    index: int | None = wanted.index  # None for plain "cuda", whatever the stubs say
    if wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r} is not supported; use 'cpu' or 'cuda'")
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r}: no CUDA device is visible here; use 'cpu'")
    if wanted.type == "cuda" and index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return wanted


def _torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[dtype]


def _gib(nbytes: int) -> str:
    if nbytes < 1 << 20:
        return f"{nbytes} bytes"
    return f"{nbytes / (1 << 30):.2f} GiB" if nbytes >= 1 << 28 else f"{nbytes / (1 << 20):.1f} MiB"
