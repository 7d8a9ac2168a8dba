"""A file of fixed layout that one process writes and others map read-only.

The file is made under a temporary name, its space is reserved, it is filled and then renamed into
place. From then on its size never changes: a store into an unbacked or truncated mapping would
kill the process with SIGBUS. A new owner makes a new file; readers notice the changed inode.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
import struct
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from hbm_pool.contracts.records import ABI_VERSION

MAGIC: Final = b"HBM-CB\r\n"
"""The line end shows a transfer that took the file for text."""
PAGE_BYTES: Final = 4096
HEADER_BYTES: Final = PAGE_BYTES

# magic, ABI version, side, file bytes, boot epoch, layout CRC, number of regions; then per region
# its offset and bytes; then the CRC of all of it.
_HEADER: Final = struct.Struct("<8sIIQQII")
_REGION: Final = struct.Struct("<QQ")
_CRC: Final = struct.Struct("<I")


class ControlBlockError(Exception):
    """The control block cannot be used; the message says why and what to do."""


class ControlBlockMissing(ControlBlockError):
    """The peer has not made its file yet."""


class ControlBlockMismatch(ControlBlockError):
    """The file is there, but it is not one that this release understands."""


def new_boot_epoch() -> int:
    """A number no earlier boot had: Unix time in ns, its lowest 20 bits random. Below 2^63."""
    return (time.time_ns() & ~0xFFFFF) | secrets.randbits(20)


class FileLayout:
    """Name, side and regions of one of the two files. The sizes are part of the ABI."""

    def __init__(self, file_name: str, side: int, regions: Mapping[str, int], records: str) -> None:
        """`regions` maps a name to its bytes; `records` describes what lies in them (any change
        of it changes the layout CRC, so that a forgotten ABI version is noticed)."""
        self.file_name = file_name
        self.side = side
        self._regions: dict[str, tuple[int, int]] = {}
        offset = HEADER_BYTES
        for name, size in regions.items():
            self._regions[name] = (offset, size)
            # Writers never share a page, so a kill or a fault stays within one region.
            offset += -(-size // PAGE_BYTES) * PAGE_BYTES
        self.file_bytes = offset
        self._layout_crc = zlib.crc32(f"{list(regions.items())} {records}".encode())

    def region(self, name: str) -> slice:
        """Where a region lies in the file."""
        offset, size = self._regions[name]
        return slice(offset, offset + size)

    def header(self, boot_epoch: int, abi_version: int = ABI_VERSION) -> bytes:
        """The first bytes of the file."""
        head = _HEADER.pack(
            MAGIC,
            abi_version,
            self.side,
            self.file_bytes,
            boot_epoch,
            self._layout_crc,
            len(self._regions),
        )
        head += b"".join(_REGION.pack(*place) for place in self._regions.values())
        return head + _CRC.pack(zlib.crc32(head))

    def check_header(self, raw: bytes, path: Path) -> int:
        """The boot epoch in a header; `ControlBlockMismatch` when it is not this very layout."""
        if len(raw) < _HEADER.size or not raw.startswith(MAGIC):
            raise ControlBlockMismatch(
                f"{path} is no control block (it starts with {raw[:8]!r}); remove it and restart "
                "its owner"
            )
        _, abi_version, side, file_bytes, boot_epoch, _, _ = _HEADER.unpack_from(raw)
        if abi_version != ABI_VERSION:
            raise ControlBlockMismatch(
                f"{path} has control block version {abi_version}, this program speaks "
                f"{ABI_VERSION}: run the same release of the model server and of the sidecar"
            )
        if side != self.side:
            raise ControlBlockMismatch(
                f"{path} is the file of another side ({side}, expected {self.side}); was it "
                "renamed? Remove it and restart its owner"
            )
        if raw[: len(self.header(0))] != self.header(boot_epoch):
            raise ControlBlockMismatch(
                f"{path} has a damaged header or another layout ({file_bytes} bytes, expected "
                f"{self.file_bytes}); remove it and restart its owner with this release"
            )
        return int(boot_epoch)


class MappedFile:
    """One mapping of one file. Regions are memoryviews into it; it lives as long as they do."""

    def __init__(self, path: Path, layout: FileLayout, fd: int, *, writable: bool) -> None:
        """Checks and maps the open file `fd`. `ControlBlockMismatch` when it is not ours."""
        if sys.byteorder != "little":
            raise ControlBlockError("the control block needs a little-endian machine")
        self.path = path
        self.layout = layout
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ControlBlockMismatch(f"{path} is not a regular file; remove it")
        self.boot_epoch = layout.check_header(os.pread(fd, HEADER_BYTES, 0), path)
        if status.st_size != layout.file_bytes:
            raise ControlBlockMismatch(
                f"{path} has {status.st_size} bytes instead of {layout.file_bytes}; remove it and "
                "restart its owner"
            )
        if status.st_blocks * 512 < status.st_size:
            # Touching a hole may need a page that the file system does not have: SIGBUS.
            raise ControlBlockMismatch(
                f"{path} is sparse ({status.st_blocks * 512} of {status.st_size} bytes backed): "
                "its space was never reserved, or its file system does not reserve (use a "
                "memory-backed run directory); remove it and restart its owner"
            )
        self._identity = (status.st_dev, status.st_ino)
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._view = memoryview(mmap.mmap(fd, status.st_size, access=access))

    @classmethod
    def create(
        cls, directory: Path, layout: FileLayout, fill: Callable[[MappedFile], None] | None = None
    ) -> MappedFile:
        """Makes the file anew and renames it into place; `fill` writes its first contents.

        `ControlBlockError` when it cannot be made, above all when there is no room for it; then
        nothing is left behind and an older file stays as it was.
        """
        path = directory / layout.file_name
        # A fixed name: what a killed owner left behind is found and removed by the next one.
        temporary = directory / f".{layout.file_name}.new"
        try:
            temporary.unlink(missing_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(temporary, flags, 0o644)
        except OSError as error:
            raise ControlBlockError(
                f"cannot create {path}: {error.strerror}; the run directory must exist and be "
                "writable for this user"
            ) from error
        try:
            os.fchmod(fd, 0o644)
            os.posix_fallocate(fd, 0, layout.file_bytes)
            os.pwrite(fd, layout.header(new_boot_epoch()), 0)
            mapped = cls(path, layout, fd, writable=True)
            if fill is not None:
                fill(mapped)
            os.rename(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
                raise ControlBlockError(
                    f"no room for {path}: it needs {layout.file_bytes} bytes "
                    f"({error.strerror}); enlarge the volume of the run directory"
                ) from error
            raise ControlBlockError(f"cannot create {path}: {error.strerror}") from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return mapped

    @classmethod
    def open(cls, directory: Path, layout: FileLayout, *, writable: bool = False) -> MappedFile:
        """Maps an existing file. `ControlBlockMissing`, `ControlBlockMismatch`."""
        path = directory / layout.file_name
        mode = os.O_RDWR if writable else os.O_RDONLY
        try:
            # Neither a link nor a pipe in our place may lead or hold us anywhere.
            fd = os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise ControlBlockMissing(
                f"{path} is not there (yet): start its owner with the same run directory"
            ) from error
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise ControlBlockMismatch(f"{path} is not a regular file; remove it") from error
            raise ControlBlockError(f"cannot open {path}: {error.strerror}") from error
        try:
            return cls(path, layout, fd, writable=writable)
        except OSError as error:
            raise ControlBlockError(f"cannot map {path}: {error.strerror}") from error
        finally:
            os.close(fd)

    def region(self, name: str) -> memoryview:
        """The bytes of a region."""
        return self._view[self.layout.region(name)]

    def replaced(self) -> bool:
        """Whether another file lies at the path now. False while there is none."""
        try:
            status = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) != self._identity
