"""Tables in memory and in files: what is read is what was written, or a clear error."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hbm_pool.errors import RowStoreError
from hbm_pool.host.file_store import CHECKSUM_BYTES, HEADER_BYTES, FileRowStore, create_file
from hbm_pool.host.row_store import RamRowStore, RowStore, seeded_rows
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS, WIDTH = 3000, 10
ROW_BYTES = WIDTH * 4


def table() -> npt.NDArray[np.float32]:
    return seeded_rows(7, 0, ROWS, WIDTH)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    where = tmp_path / "item.rows"
    create_file(where, ROWS, ROW_BYTES, lambda start, stop: seeded_rows(7, start, stop, WIDTH))
    return where


@pytest.fixture(params=["ram", "file"])
def store(request: pytest.FixtureRequest, path: Path) -> Iterator[RowStore]:
    made: RowStore = RamRowStore(table()) if request.param == "ram" else FileRowStore(path)
    yield made
    made.close()


def read(store: RowStore, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
    wanted = np.asarray(ids, np.int64)
    out = np.empty((wanted.size, store.row_bytes), np.uint8)
    store.read(wanted, out)
    return out.view(np.float32)


def test_seeded_rows_depend_on_seed_and_row_alone() -> None:
    whole = seeded_rows(5, 0, 100, 8)
    assert (seeded_rows(5, 40, 60, 8) == whole[40:60]).all()
    assert not (seeded_rows(6, 0, 100, 8) == whole).any()
    assert whole.min() >= -1.0
    assert whole.max() < 1.0
    assert abs(float(seeded_rows(1, 0, 10_000, 8).mean())) < 0.02


def test_reads_any_order_and_repetition(store: RowStore) -> None:
    assert (store.rows, store.row_bytes) == (ROWS, ROW_BYTES)
    rng = np.random.default_rng(0)
    for size in (0, 1, 5, 700):
        ids = rng.integers(0, ROWS, size)
        assert (read(store, ids) == table()[ids]).all()
    assert (read(store, np.arange(ROWS)) == table()).all()


@given(ids=st.lists(st.integers(0, ROWS - 1), max_size=300, unique=True), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_written_rows_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], seed: int
) -> None:
    where = tmp_path_factory.mktemp("rows") / "t"
    create_file(where, ROWS, ROW_BYTES, lambda start, stop: table()[start:stop])
    values = np.random.default_rng(seed).random((len(ids), WIDTH), dtype=np.float32)
    expected = table()
    expected[ids] = values
    stored = FileRowStore(where, workers=2)
    for store in (stored, RamRowStore(table())):
        store.write(np.asarray(ids, np.int64), values.view(np.uint8).reshape(len(ids), ROW_BYTES))
        assert (read(store, np.arange(ROWS)) == expected).all()
        store.close()


def test_rows_outside_and_wrong_buffers_are_refused(store: RowStore) -> None:
    with pytest.raises(RowStoreError, match=r"row 3000 is outside 0\.\.2999"):
        read(store, [1, ROWS])
    with pytest.raises(RowStoreError, match="row -1 is outside"):
        read(store, [-1])
    with pytest.raises(RowStoreError, match=r"need a buffer of \(2, 40\)"):
        store.read(np.array([1, 2]), np.empty((2, 39), np.uint8))


def test_ram_store_refuses_what_is_no_table() -> None:
    with pytest.raises(RowStoreError, match="rows, width"):
        RamRowStore(np.zeros(4, np.float32))
    with pytest.raises(RowStoreError, match="contiguous"):
        RamRowStore(np.zeros((4, 8), np.float32)[:, ::2])


def test_file_of_another_size_is_refused(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(RowStoreError, match=r"has \d+ bytes, but 3000 rows of 40 bytes make"):
        FileRowStore(path)


def test_foreign_or_damaged_header_is_refused(path: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"x" * 10_000)
    with pytest.raises(RowStoreError, match="not a table of rows"):
        FileRowStore(foreign)
    with path.open("r+b") as file:
        file.seek(30)
        file.write(b"9")
    with pytest.raises(RowStoreError, match="not a table of rows, or its header is damaged"):
        FileRowStore(path)
    with pytest.raises(RowStoreError, match="cannot be opened"):
        FileRowStore(tmp_path / "absent")


@pytest.mark.parametrize("offset", [0, ROW_BYTES - 1, ROW_BYTES, ROW_BYTES + CHECKSUM_BYTES - 1])
def test_damaged_row_is_an_error_that_names_it(path: Path, offset: int) -> None:
    place = HEADER_BYTES + 17 * (ROW_BYTES + CHECKSUM_BYTES) + offset
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    store = FileRowStore(path)
    with pytest.raises(RowStoreError, match="row 17 is damaged"):
        read(store, [3, 17, 40])
    assert (read(store, [3, 40]) == table()[[3, 40]]).all()
    store.close()


def test_rows_in_each_others_place_are_errors(path: Path) -> None:
    stride = ROW_BYTES + CHECKSUM_BYTES
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES + 5 * stride)
        fifth = file.read(stride)
        file.seek(HEADER_BYTES + 6 * stride)
        file.write(fifth)
    store = FileRowStore(path)
    with pytest.raises(RowStoreError, match="row 6 is damaged"):
        read(store, [6])
    store.close()


def test_file_cut_while_open_is_an_error(path: Path) -> None:
    store = FileRowStore(path)
    os.truncate(path, HEADER_BYTES + 10 * (ROW_BYTES + CHECKSUM_BYTES) + 3)
    with pytest.raises(RowStoreError, match="row 10 ends after 3 bytes"):
        read(store, [2, 10])
    assert (read(store, [2]) == table()[[2]]).all()
    store.close()


def test_creation_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    where = tmp_path / "t"
    with pytest.raises(RowStoreError, match=r"rows 0\.\.9 were drawn as"):
        create_file(where, 10, 16, lambda start, stop: np.zeros((stop - start, 3), np.float32))
    with pytest.raises(RowStoreError, match="is empty"):
        create_file(where, 0, 16, lambda start, stop: np.zeros((0, 4), np.float32))
    with pytest.raises(RowStoreError, match="cannot write a table"):
        create_file(tmp_path / "no" / "t", 1, 4, lambda a, b: np.zeros((b - a, 1), np.float32))
    assert list(tmp_path.iterdir()) == []


def test_ring_bounds_memory_and_serves_many_readers(path: Path) -> None:
    """One buffer of one row for everybody: slow, but right."""
    buffers = [np.empty(ROW_BYTES + CHECKSUM_BYTES, np.uint8)]
    store = FileRowStore(path, workers=3, buffers=buffers)
    assert store.staging_bytes == ROW_BYTES + CHECKSUM_BYTES
    rng = np.random.default_rng(1)
    wanted = [rng.integers(0, ROWS, 300) for _ in range(12)]
    with ThreadPoolExecutor(6) as readers:
        found = list(readers.map(lambda ids: read(store, ids), wanted))
    for ids, rows in zip(wanted, found, strict=True):
        assert (rows == table()[ids]).all()
    store.close()
    store.close()


def test_buffers_too_small_for_a_row_are_refused(path: Path) -> None:
    with pytest.raises(RowStoreError, match="must hold a row of 48 bytes"):
        FileRowStore(path, buffers=[np.empty(47, np.uint8)])


def test_row_read_while_it_is_written_is_old_or_new(path: Path) -> None:
    store = FileRowStore(path, workers=1)
    ids = np.arange(100, dtype=np.int64)
    stop = threading.Event()
    versions = [np.full((100, WIDTH), float(v), np.float32) for v in range(2)]
    store.write(ids, versions[0].view(np.uint8).reshape(100, ROW_BYTES))

    def write() -> None:
        turn = 0
        while not stop.is_set():
            turn ^= 1
            store.write(ids, versions[turn].view(np.uint8).reshape(100, ROW_BYTES))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            rows = read(store, ids)
            assert (rows == rows[:, :1]).all()
            assert set(np.unique(rows)) <= {0.0, 1.0}
    finally:
        stop.set()
        writer.join()
    store.close()


_LIMIT_BYTES = 96 << 20
_READER = """
import resource, sys
import numpy as np
from pathlib import Path
from hbm_pool.host.file_store import FileRowStore
from hbm_pool.host.row_store import seeded_rows

path, limit = Path(sys.argv[1]), int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
store = FileRowStore(path)
assert path.stat().st_size > 96 << 20
rng = np.random.default_rng(0)
seen = 0
for _ in range(60):
    ids = np.sort(rng.choice(store.rows, 2000, replace=False)).astype(np.int64)
    out = np.empty((ids.size, store.row_bytes), np.uint8)
    store.read(ids, out)
    rows = out.view(np.float32)
    for i in range(0, ids.size, 500):
        assert (rows[i] == seeded_rows(3, int(ids[i]), int(ids[i]) + 1, 256)[0]).all()
    seen += ids.size
store.close()
print(seen)
"""


def _memory_group(name: str) -> tuple[Path, str] | None:
    """A new memory cgroup (v1 or v2) with the limit set, or None where none can be made."""
    for root, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / name
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(_LIMIT_BYTES))
            return group, limit
        except OSError:
            group.rmdir()
    return None


def test_file_larger_than_the_memory_limit(tmp_path: Path) -> None:
    """Reads a 160 MiB table in a process that may have 96 MiB, page cache included where the
    kernel has cgroups for us; elsewhere its data alone are limited."""
    where = tmp_path / "large.rows"
    rows = (160 << 20) // 1024
    create_file(where, rows, 1024, lambda start, stop: seeded_rows(3, start, stop, 256))
    # The pages of the file are charged to whoever reads them first: not to us.
    descriptor = os.open(where, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    group = _memory_group(f"hbm-row-store-{os.getpid()}")
    arguments = [sys.executable, "-c", _READER, str(where)]
    try:
        if group is None:
            data_limit = 512 << 20  # the interpreter and the compiler's own data come on top
            done = subprocess.run(
                [*arguments, str(data_limit)], capture_output=True, text=True, timeout=120
            )
        else:
            enter = 'echo $$ > "$0/cgroup.procs"; exec "$@"'
            done = subprocess.run(
                ["sh", "-c", enter, str(group[0]), *arguments, "0"],
                capture_output=True,
                text=True,
                timeout=120,
            )
    finally:
        if group is not None:
            group[0].rmdir()
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 60 * 2000
