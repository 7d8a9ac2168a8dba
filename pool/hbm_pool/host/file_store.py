"""A table in a file larger than memory, read row by row through a bounded ring of buffers.

Layout: one page of header (JSON, checksummed), then per row its bytes and an 8-byte checksum that
also covers the row's number: a torn, damaged or misplaced row is an error, never a wrong score.
Nothing is mapped: what the process holds is the ring. Rows are read by compiled loops over
`pread`, so that workers hold no interpreter lock; the kernel's page cache is left to the kernel.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt
import orjson
import xxhash
from numba import types

from hbm_pool.errors import RowStoreError
from hbm_pool.host.row_store import Bytes, Ids, check_request

HEADER_BYTES: Final = 4096
CHECKSUM_BYTES: Final = 8
MAGIC: Final = "hbm-rows-1"
DEFAULT_BUFFER_BYTES: Final = 1 << 20
DEFAULT_BUFFERS: Final = 4
_ROWS_PER_TASK: Final = 64
"""Fewer rows than this are not worth another worker."""
_CREATE_BYTES: Final = 4 << 20

_pread = types.ExternalFunction(
    "pread", types.int64(types.int32, types.uintp, types.uintp, types.int64)
)
_pwrite = types.ExternalFunction(
    "pwrite", types.int64(types.int32, types.uintp, types.uintp, types.int64)
)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _checksum(row: int, record: Bytes, nbytes: int) -> np.uint64:
    """64-bit mix of a row's number and bytes (multiply and rotate, as in wyhash)."""
    value = np.uint64(row) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(nbytes)
    word = np.uint64(0)
    for i in range(nbytes):
        word |= np.uint64(record[i]) << np.uint64(8 * (i & 7))
        if (i & 7) == 7 or i == nbytes - 1:
            value = (value ^ word) * np.uint64(0xFF51AFD7ED558CCD)
            value ^= value >> np.uint64(32)
            word = np.uint64(0)
    return value


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _stored_checksum(record: Bytes, nbytes: int) -> np.uint64:
    value = np.uint64(0)
    for i in range(8):
        value |= np.uint64(record[nbytes + i]) << np.uint64(8 * i)
    return value


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _read_rows(
    descriptor: int, ids: Ids, places: Ids, row_bytes: int, buffer: Bytes, out: Bytes
) -> tuple[int, int]:
    """Reads rows `ids` (ascending) into `out[places]`. -> (rows done, 0 ok / 1 short / 2 damaged).

    Neighbouring rows are read with one call as long as they fit the buffer.
    """
    stride = row_bytes + CHECKSUM_BYTES
    most = buffer.size // stride
    base = buffer.ctypes.data
    done = 0
    while done < ids.size:
        run = 1
        while done + run < ids.size and run < most and ids[done + run] == ids[done] + run:
            run += 1
        offset = HEADER_BYTES + ids[done] * stride
        if _pread(descriptor, base, run * stride, offset) != run * stride:
            return done, 1
        for i in range(run):
            record = buffer[i * stride : (i + 1) * stride]
            if _checksum(ids[done + i], record, row_bytes) != _stored_checksum(record, row_bytes):
                return done + i, 2
            target = out[places[done + i]]
            for j in range(row_bytes):
                target[j] = record[j]
        done += run
    return done, 0


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _pack_rows(ids: Ids, values: Bytes, records: Bytes) -> None:
    row_bytes = values.shape[1]
    for i in range(ids.size):
        for j in range(row_bytes):
            records[i, j] = values[i, j]
        value = _checksum(ids[i], values[i], row_bytes)
        for j in range(8):
            records[i, row_bytes + j] = np.uint8((value >> np.uint64(8 * j)) & np.uint64(255))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _write_rows(descriptor: int, ids: Ids, records: Bytes) -> int:
    stride = records.shape[1]
    base = records.ctypes.data
    for i in range(ids.size):
        offset = HEADER_BYTES + ids[i] * stride
        if _pwrite(descriptor, base + i * stride, stride, offset) != stride:
            return i
    return len(ids)


def create_file(
    path: Path, rows: int, row_bytes: int, draw: Callable[[int, int], npt.NDArray[Any]]
) -> None:
    """Writes a table; it appears under `path` only when it is complete.

    `draw(start, stop)` gives rows start..stop-1 as an array of `row_bytes` bytes per row; a few
    MiB are asked for at a time. Raises RowStoreError (no room, wrong size of drawn rows).
    """
    if rows < 1 or row_bytes < 1:
        raise RowStoreError(f"{path}: a table of {rows} rows of {row_bytes} bytes is empty")
    stride = row_bytes + CHECKSUM_BYTES
    total = HEADER_BYTES + rows * stride
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, total)
            step = max(1, _CREATE_BYTES // stride)
            file.seek(HEADER_BYTES)
            for start in range(0, rows, step):
                stop = min(rows, start + step)
                drawn = np.ascontiguousarray(draw(start, stop))
                values = drawn.view(np.uint8).reshape(drawn.shape[0], -1)
                if values.shape != (stop - start, row_bytes):
                    raise RowStoreError(
                        f"{path}: rows {start}..{stop - 1} were drawn as {values.shape} bytes; "
                        f"expected {(stop - start, row_bytes)}"
                    )
                records = np.empty((stop - start, stride), np.uint8)
                _pack_rows(np.arange(start, stop, dtype=np.int64), values, records)
                file.write(records.data)
            file.seek(0)
            file.write(_header(rows, row_bytes))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RowStoreError(
            f"{path}: cannot write a table of {total} bytes ({error.strerror}); free some space or "
            "choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _header(rows: int, row_bytes: int) -> bytes:
    body = orjson.dumps({"magic": MAGIC, "rows": rows, "row_bytes": row_bytes})
    line = b"%016x %s" % (xxhash.xxh3_64_intdigest(body), body)
    return line.ljust(HEADER_BYTES)


class FileRowStore:
    """A table written by `create_file`.

    `buffers` are the ring, uint8 arrays that hold at least one row each (page-locked memory where
    a GPU reads them); by default four of 1 MiB. A read waits for a free one, so that memory stays
    bounded however many threads read. `workers` read at the same time; what is small is read by
    the calling thread. Raises RowStoreError for a file that is not a whole, undamaged table.
    """

    def __init__(
        self,
        path: Path,
        *,
        workers: int = 4,
        buffers: Sequence[Bytes] | None = None,
    ) -> None:
        if workers < 1:
            raise RowStoreError(f"{path}: {workers} workers cannot read; use at least 1")
        self._path = path
        self._rows, self._row_bytes = _read_header(path)
        stride = self._row_bytes + CHECKSUM_BYTES
        if buffers is None:
            size = max(DEFAULT_BUFFER_BYTES, stride)
            buffers = [np.empty(size, np.uint8) for _ in range(DEFAULT_BUFFERS)]
        if not buffers or min(buffer.size for buffer in buffers) < stride:
            raise RowStoreError(
                f"{path}: every staging buffer must hold a row of {stride} bytes; got "
                f"{[buffer.size for buffer in buffers]}"
            )
        self._ring: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        for buffer in buffers:
            self._ring.put(buffer)
        self.staging_bytes = sum(buffer.nbytes for buffer in buffers)
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=f"rows-{path.name}")
        self._write_lock = threading.Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        # Rows are asked for at random: reading ahead would only push other pages out.
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def row_bytes(self) -> int:
        return self._row_bytes

    def read(self, ids: Ids, out: Bytes) -> None:
        check_request(str(self._path), self, ids, out)
        if ids.size == 0:
            return
        places = np.argsort(ids, kind="stable")
        ids = ids[places]
        tasks = min(self._workers, -(-ids.size // _ROWS_PER_TASK))
        if tasks == 1:
            self._read_part(ids, places, out)
            return
        parts = zip(np.array_split(ids, tasks), np.array_split(places, tasks), strict=True)
        waiting = [self._pool.submit(self._read_part, part, where, out) for part, where in parts]
        _first_error(waiting)

    def write(self, ids: Ids, values: Bytes) -> None:
        check_request(str(self._path), self, ids, values)
        records = np.empty((ids.size, self._row_bytes + CHECKSUM_BYTES), np.uint8)
        _pack_rows(np.ascontiguousarray(ids), values, records)
        with self._write_lock:
            done = _write_rows(self._descriptor, np.ascontiguousarray(ids), records)
        if done < ids.size:
            raise RowStoreError(
                f"{self._path}: row {int(ids[done])} could not be written; rows before it in this "
                "push are new, it may be damaged: check the disk and push the rows again"
            )

    def close(self) -> None:
        """Ends the workers and closes the file; a second call does nothing."""
        self._pool.shutdown(wait=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _read_part(self, ids: Ids, places: Ids, out: Bytes) -> None:
        buffer = self._ring.get()
        try:
            begun = 0
            while begun < ids.size:
                done, fault = _read_rows(
                    self._descriptor, ids[begun:], places[begun:], self._row_bytes, buffer, out
                )
                begun += done
                if fault:
                    # A row that is being written looks damaged: read it again behind the writer.
                    with self._write_lock:
                        done, fault = _read_rows(
                            self._descriptor,
                            ids[begun : begun + 1],
                            places[begun : begun + 1],
                            self._row_bytes,
                            buffer,
                            out,
                        )
                    if fault:
                        raise self._fault(int(ids[begun]), fault)
                    begun += 1
        finally:
            self._ring.put(buffer)

    def _fault(self, row: int, fault: int) -> RowStoreError:
        if fault == 2:
            return RowStoreError(
                f"{self._path}: row {row} is damaged (its checksum does not match); restore the "
                "file"
            )
        offset = HEADER_BYTES + row * (self._row_bytes + CHECKSUM_BYTES)
        try:
            found = len(os.pread(self._descriptor, self._row_bytes + CHECKSUM_BYTES, offset))
        except OSError as error:
            return RowStoreError(f"{self._path}: row {row} cannot be read ({error.strerror})")
        return RowStoreError(
            f"{self._path}: row {row} ends after {found} bytes; the file was cut: restore it"
        )


def _first_error(waiting: Sequence[Future[None]]) -> None:
    """Waits for all, so that nobody writes to the caller's buffer later; then raises the first."""
    errors = [future.exception() for future in waiting]
    for error in errors:
        if error is not None:
            raise error


def _read_header(path: Path) -> tuple[int, int]:
    try:
        with path.open("rb") as file:
            line = file.read(HEADER_BYTES).rstrip()
        size = path.stat().st_size
    except OSError as error:
        raise RowStoreError(f"{path}: cannot be opened ({error.strerror})") from error
    digest, _, body = line.partition(b" ")
    if digest != b"%016x" % xxhash.xxh3_64_intdigest(body):
        raise RowStoreError(f"{path}: this is not a table of rows, or its header is damaged")
    header = orjson.loads(body)
    if header.get("magic") != MAGIC:
        raise RowStoreError(
            f"{path}: written as {header.get('magic')!r}, this version reads {MAGIC!r}; write it "
            "anew"
        )
    rows, row_bytes = int(header["rows"]), int(header["row_bytes"])
    expected = HEADER_BYTES + rows * (row_bytes + CHECKSUM_BYTES)
    if size != expected:
        raise RowStoreError(
            f"{path}: has {size} bytes, but {rows} rows of {row_bytes} bytes make {expected}; the "
            "file was cut or is still being written"
        )
    return rows, row_bytes
