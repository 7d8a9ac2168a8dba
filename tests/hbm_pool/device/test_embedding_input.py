"""What the embedding cache is given: stores, requests, pushes; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hbm_pool.device.embedding import EmbeddingCache
from hbm_pool.device.staging import staging_ring
from hbm_pool.errors import RowStoreError
from hbm_pool.host.config import TableSpec
from hbm_pool.host.file_store import FileRowStore, create_file
from hbm_pool.host.row_store import seeded_rows

from tests.hbm_pool.device.emb_world import EmbWorld


@pytest.mark.parametrize(
    ("ids", "out", "message"),
    [
        ({"nothing": torch.zeros(1, dtype=torch.int64)}, {}, "table 'nothing' does not exist"),
        ({"item": torch.zeros(1, dtype=torch.int32)}, {}, r"must be \[n\] int64"),
        ({"item": torch.zeros(1, 1, dtype=torch.int64)}, {}, r"must be \[n\] int64"),
        ({"item": torch.tensor([0])}, {}, "no buffer for the rows of table 'item'"),
        ({"item": torch.tensor([1500])}, {"item": (1, 16)}, "has no row 1500"),
        ({"item": torch.tensor([4, -1])}, {"item": (2, 16)}, "has no row -1"),
        ({"item": torch.tensor([0])}, {"item": (1, 15)}, r"must be contiguous, \[1, 16\]"),
        ({"item": torch.tensor([0])}, {"item": (2, 16)}, r"must be contiguous, \[1, 16\]"),
    ],
)
def test_bad_requests_change_nothing(
    ids: dict[str, torch.Tensor], out: dict[str, tuple[int, ...]], message: str
) -> None:
    world = EmbWorld(18)
    world.grow(10)
    good = {"shop": torch.arange(10)}
    buffers = {name: torch.empty(shape) for name, shape in out.items()}
    with pytest.raises(ValueError, match=message):
        world.cache.gather({**good, **ids}, {**world.buffers(good), **buffers})
    assert world.cache.counters().accesses == 0
    assert world.cache.resident_ids("shop").size == 0


def test_buffer_of_another_dtype_or_layout_is_refused() -> None:
    world = EmbWorld(19)
    ids = {"item": torch.arange(4)}
    for buffer in (torch.empty(4, 16, dtype=torch.float64), torch.empty(16, 4).T):
        with pytest.raises(ValueError, match="must be contiguous"):
            world.cache.gather(ids, {"item": buffer})


def test_bad_pushes_are_refused() -> None:
    world = EmbWorld(20)
    push = world.cache.push_rows
    with pytest.raises(ValueError, match="has no row 1500"):
        push("item", np.array([1500]), torch.zeros(1, 16))
    with pytest.raises(ValueError, match=r"must be \[1, 16\] torch.float32"):
        push("item", np.array([1]), torch.zeros(1, 15))
    with pytest.raises(ValueError, match=r"must be \[1, 16\] torch.float32"):
        push("item", np.array([1]), torch.zeros(1, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"must be \[n\] int64"):
        push("item", np.array([1.5]), torch.zeros(1, 16))
    assert world.cache.row_epoch == 0


def test_stores_must_fit_the_tables() -> None:
    world = EmbWorld(21)
    stores = dict(world.stores)
    del stores["tiny"]
    with pytest.raises(ValueError, match="one store per table"):
        EmbeddingCache(world.shape, world.arena, stores)
    with pytest.raises(ValueError, match="table 'tiny' has 300 rows of 5 bytes, its store 1500"):
        EmbeddingCache(world.shape, world.arena, {**stores, "tiny": world.stores["item"]})


def test_rows_come_from_a_file_through_a_bounded_ring(tmp_path: Path) -> None:
    tables = (TableSpec("item", 5000, 16),)
    path = tmp_path / "item.rows"
    create_file(path, 5000, 64, lambda start, stop: seeded_rows(3, start, stop, 16))
    world = EmbWorld(25, tables=tables)
    store = FileRowStore(path, buffers=staging_ring("cpu", buffers=2, buffer_bytes=512))
    cache = EmbeddingCache(world.shape, world.arena, {"item": store})
    cache.grow(np.arange(30, dtype=np.int32))
    whole = torch.from_numpy(seeded_rows(3, 0, 5000, 16))
    for _ in range(20):
        ids = torch.from_numpy(world.rng.integers(0, 5000, 300))
        out = torch.empty(300, 16)
        cache.gather({"item": ids}, {"item": out})
        assert torch.equal(out, whole[ids])
    cache.push_rows("item", torch.arange(100), torch.ones(100, 16))
    out = torch.empty(100, 16)
    cache.reset()
    cache.gather({"item": torch.arange(100)}, {"item": out})
    assert (out == 1.0).all()
    assert cache.check_rows() == []
    store.close()
    with pytest.raises(RowStoreError, match="could not be read"):
        cache.gather({"item": torch.arange(1000, 1200)}, {"item": torch.empty(200, 16)})
    with pytest.raises(ValueError, match="0 staging buffers"):
        staging_ring("cpu", buffers=0)


def test_prices_must_fit_the_classes() -> None:
    world = EmbWorld(22)
    with pytest.raises(ValueError, match="give 3 positive numbers"):
        world.cache.set_row_prices([1.0, 2.0])
    with pytest.raises(ValueError, match="cannot give up -1"):
        world.cache.drop(-1)
