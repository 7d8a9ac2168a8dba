"""One tensor, exact size, views that share its bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hbm_pool import Arena, ArenaMemoryError, KVSpec
from hbm_pool.device.arena import available_host_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

KV = KVSpec(layers=3, heads=2, head_dim=4, page_tokens=4)  # 768 bytes per page


def test_views_share_the_bytes_and_the_base_pointer_is_fixed() -> None:
    arena = Arena(num_extents=5, extent_bytes=2 * KV.page_bytes)
    base = arena.base_pointer
    assert arena.storage.numel() == arena.nbytes == 5 * 2 * KV.page_bytes
    rows = arena.rows(row_bytes=64, dtype="float32", width=16)
    layers = arena.pages(KV)
    assert [layer.data_ptr() - base for layer in layers] == [0, 256, 512]
    assert rows.data_ptr() == base
    # Page 7 is the second page of extent 3; all its layers are adjacent.
    for number, layer in enumerate(layers):
        layer[7] = float(number + 1)
    start = 7 * KV.page_bytes
    page = arena.storage[start : start + KV.page_bytes].view(torch.float32)
    assert page.tolist() == [1.0] * 64 + [2.0] * 64 + [3.0] * 64
    row = start // 64
    assert rows[row].tolist() == [1.0] * 16
    assert rows[row - 1].tolist() == [0.0] * 16
    assert arena.base_pointer == base


def test_page_axes_are_key_value_token_head_element() -> None:
    arena = Arena(num_extents=2, extent_bytes=KV.page_bytes)
    layers = arena.pages(KV)
    assert [tuple(layer.shape) for layer in layers] == [(2, 2, 4, 2, 4)] * 3
    layers[1][1, 1, 2, 1, 3] = 9.0
    at = KV.page_bytes // 4 + 64 + 32 + 2 * 8 + 4 + 3
    assert arena.storage.view(torch.float32)[at] == 9.0


@settings(max_examples=40, deadline=None)
@given(
    extents=st.integers(1, 6),
    rows_per_extent=st.sampled_from([1, 2, 3, 8]),
    padding=st.integers(0, 3),
    width=st.integers(1, 9),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8"]),
)
def test_row_views_tile_every_extent(
    extents: int, rows_per_extent: int, padding: int, width: int, dtype: str
) -> None:
    itemsize = getattr(torch, dtype).itemsize
    row_bytes = (width + padding) * itemsize
    arena = Arena(extents, rows_per_extent * row_bytes)
    rows = arena.rows(row_bytes, dtype, width)
    assert rows.shape == (extents * rows_per_extent, width)
    for index in range(len(rows)):
        rows[index] = index + 1
    raw = arena.storage.view(getattr(torch, dtype)).view(-1, width + padding)
    assert raw[:, :width].float().mean(dim=1).tolist() == [i + 1 for i in range(len(rows))]
    assert (raw[:, width:] == 0).all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda a: a.rows(48, "float32", 16), "do not tile"),
        (lambda a: a.rows(80, "float32", 4), "do not tile"),
        (lambda a: a.rows(6, "float32", 1), "not a multiple"),
        (lambda a: a.rows(64, "float31", 16), "'float31' is unknown"),
        (lambda a: a.pages(KVSpec(3, 2, 4, 5)), "do not tile"),
    ],
)
def test_refuses_views_that_do_not_fit(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(Arena(2, KV.page_bytes))


def test_says_what_is_needed_and_what_there_is() -> None:
    available = available_host_bytes()
    assert available is not None
    with pytest.raises(ArenaMemoryError) as caught:
        Arena(num_extents=available // (1 << 20) + 1024, extent_bytes=1 << 20)
    said = str(caught.value)
    assert "GiB of host memory" in said
    assert "lower pool_bytes to at most" in said
    assert isinstance(caught.value, MemoryError)


def test_refuses_a_device_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="'meta' is not supported"):
        Arena(1, 64, "meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            Arena(1, 64, "cuda")
    with pytest.raises(ValueError, match="is empty"):
        Arena(0, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_arena_is_its_own_and_exact() -> None:
    before = torch.cuda.memory_allocated()
    arena = Arena(64, 2 << 20, "cuda")
    assert torch.cuda.memory_allocated() - before == arena.nbytes
    base = arena.base_pointer
    # Other tensors come and go beside it, never inside.
    others = [torch.empty(3 << 20, dtype=torch.uint8, device="cuda") for _ in range(8)]
    assert all(not base <= t.data_ptr() < base + arena.nbytes for t in others)
    del others
    torch.cuda.empty_cache()
    arena.rows(1024, "float32", 256).fill_(1.0)
    assert arena.base_pointer == base
    with pytest.raises(ArenaMemoryError, match="are free"):
        Arena(1 << 20, 2 << 20, "cuda")


def test_memory_is_asked_for_in_huge_pages_where_there_are_any() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no transparent huge pages")
    arena = Arena(8, 2 << 20)
    advised = False
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if head:
            first, last = (int(part, 16) for part in head.groups())
            middle = arena.base_pointer + arena.nbytes // 2
            inside = first <= middle < last
        elif inside and line.startswith("VmFlags:"):
            advised = "hg" in line.split()
    assert advised
