"""What a server says of itself once: read back, or refused, whatever the bytes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from hbm_pool.contracts.control_block import (
    ControlBlockError,
    ControlBlockMismatch,
    ServerBlock,
    decode_info,
    encode_info,
)
from hbm_pool.contracts.records import (
    RowClass,
    ServerInfo,
    TableMap,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PATH = Path("server.cb")
FOR_ANY_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def _described(text: bytes) -> bytes:
    return crc32(text).to_bytes(4, "little") + len(text).to_bytes(4, "little") + text


def test_a_description_comes_back_whatever_its_slo(info: ServerInfo) -> None:
    for each in (info, dataclasses.replace(info, slo_ms=math.inf)):
        assert decode_info(encode_info(each) + bytes(100), PATH) == each


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"extents": 0}, "extents is 0"),
        ({"extents": 1 << 20}, "use larger extents"),
        ({"page_tokens": -1}, "page_tokens is -1"),
        ({"sample_rate": 0.0}, "sample_rate is 0.0"),
        ({"sample_rate": math.nan}, "sample_rate is nan"),
        ({"alpha_min": 0.9, "alpha_max": 0.1}, "alpha_min 0.9 and alpha_max 0.1"),
        ({"alpha_max": 1.5}, "alpha_max 1.5"),
        ({"slo_ms": 0.0}, "slo_ms is 0.0"),
        ({"tables": (TableMap("t", 0, 0, False),)}, "class 1 names tables"),
        ({"tables": (TableMap("t", 5, 2, False),) * 2}, "table t has 5 rows in class 2"),
        ({"classes": (RowClass(1, 1, 1, ()),) * 5}, "5 row-width classes"),
        ({"classes": (RowClass(0, 1, 1, ()),)}, "class 0 has 0 bytes"),
        ({"versions": {"x": "y" * 70_000}}, "has room for 65528"),
    ],
)
def test_a_description_no_reader_would_accept_is_not_published(
    run_dir: Path, info: ServerInfo, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ControlBlockError, match=named):
        ServerBlock.create(run_dir, dataclasses.replace(info, **changes))
    assert os.listdir(run_dir) == []


@FOR_ANY_FIXTURE
@given(at=st.integers(0, 600), noise=st.binary(min_size=1, max_size=20))
def test_a_damaged_description_is_refused(info: ServerInfo, at: int, noise: bytes) -> None:
    raw = bytearray(encode_info(info))
    at %= len(raw)
    before = bytes(raw)
    raw[at : at + len(noise)] = noise
    if bytes(raw[: len(before)]) != before:
        with pytest.raises(ControlBlockMismatch, match="description"):
            decode_info(bytes(raw), PATH)


@given(st.binary(min_size=8, max_size=200))
def test_foreign_bytes_are_no_description(raw: bytes) -> None:
    for each in (raw, _described(raw)):
        with pytest.raises(ControlBlockMismatch, match="description"):
            decode_info(each, PATH)


@FOR_ANY_FIXTURE
@given(name=st.sampled_from([field.name for field in dataclasses.fields(ServerInfo)]), value=JSON)
def test_a_description_with_any_value_in_a_field_is_read_or_refused(
    info: ServerInfo, name: str, value: Any
) -> None:
    text = json.dumps({**dataclasses.asdict(info), name: value, "later": 1}).encode()
    try:
        found = decode_info(_described(text), PATH)
    except ControlBlockMismatch:
        return
    assert encode_info(found)


# Sidecar to server.
