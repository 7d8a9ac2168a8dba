"""The digest and the node's hash: what one release writes, and what a reader survives."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hbm_pool.contracts import digest as codec
from hbm_pool.contracts.digest import (
    Digest,
    DigestError,
    DigestReason,
    NodeState,
    NodeStateError,
    decode_digest,
    encode_digest,
    node_from_hash,
    node_to_hash,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

USERS = st.lists(
    st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32 - 1)), max_size=40
)
U64 = st.integers(0, 2**64 - 1)

STATE = NodeState(
    schema=1,
    name="0a1b-uid",
    url="http://10.0.0.7:8000",
    boot_epoch=1_700_000_000_000_000_000,
    sequence=12,
    heartbeat_unix_ms=1_700_000_000_000,
    alpha=0.35,
    queue_depth=3,
    queue_ms=1.25,
    service_ms=7.5,
    cost_fixed_ms=0.3,
    cost_token_ms=0.0026,
    cost_token_context_ms=1.5e-9,
    cost_row_ms=0.0016,
    rows_per_token=2.0,
    emb_miss_ratio=0.125,
    page_tokens=64,
    draining=False,
    digest_sequence=11,
    digest_crc=0xDEADBEEF,
    model="hstu",
    model_version=4,
)


def _encode(
    users: list[tuple[int, int]],
    shards: Sequence[int] = (),
    **head: int,
) -> bytes:
    return encode_digest(
        np.array([user for user, _ in users], dtype=np.int64),
        np.array([tokens for _, tokens in users], dtype=np.uint32),
        np.array(shards, dtype=np.uint32),
        **{"boot_epoch": 1, "sequence": 2, "page_tokens": 64, **head},
    )


def _raw(state: NodeState, **changes: bytes | None) -> dict[bytes, bytes]:
    fields = {name.encode(): str(value).encode() for name, value in node_to_hash(state).items()}
    for name, value in changes.items():
        if value is None:
            del fields[name.encode()]
        else:
            fields[name.encode()] = value
    return fields


def test_the_bytes_of_a_digest_are_known() -> None:
    blob = _encode([(-1, 64), (5, 128), (300, 0)], [7, 300], boot_epoch=9, sequence=3)
    body = bytes.fromhex("05a602d2fdffffff1f" + "020001" + "07ac02")
    head = struct.pack("<4sHHQQIIIIII", b"HBMD", 1, 1, 9, 3, 64, 3, 2, 9, 3, 3)
    assert blob == head + struct.pack("<I", crc32(head + body)) + body
    assert codec.digest_crc(blob) == crc32(head + body)


@given(USERS, st.lists(st.integers(0, 2**32 - 1), max_size=20), U64, U64, st.integers(1, 2**32 - 1))
def test_a_digest_comes_back(
    users: list[tuple[int, int]], shards: list[int], boot_epoch: int, sequence: int, page: int
) -> None:
    blob = _encode(users, shards, boot_epoch=boot_epoch, sequence=sequence, page_tokens=page)
    found = decode_digest(blob)
    most: dict[int, int] = {}
    for user, tokens in users:
        key = user % 2**40
        most[key] = max(tokens, most.get(key, 0))
    assert found[:3] == (boot_epoch, sequence, page)
    assert found.keys.tolist() == sorted(most)
    assert found.tokens.tolist() == [most[key] for key in sorted(most)]
    assert found.shard_rows.tolist() == shards
    assert (found.keys.dtype, found.tokens.dtype, found.shard_rows.dtype) == (
        np.uint64,
        np.uint32,
        np.uint32,
    )


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 1000)), max_size=20))
def test_whole_pages_take_less_room_and_come_back(users: list[tuple[int, int]]) -> None:
    in_pages = [(user, 64 * pages) for user, pages in users]
    most: dict[int, int] = {}
    for user, tokens in in_pages:
        most[user % 2**40] = max(tokens, most.get(user % 2**40, 0))
    assert decode_digest(_encode(in_pages)).tokens.tolist() == [most[key] for key in sorted(most)]
    assert len(_encode(in_pages)) <= len(_encode([*in_pages, (0, 1)]))


def test_of_colliding_keys_the_one_with_more_tokens_stays() -> None:
    found = decode_digest(_encode([(5, 64), (5 + 2**40, 640), (5 - 2**50, 128)]))
    assert (found.keys.tolist(), found.tokens.tolist()) == ([5], [640])


def test_a_full_digest_passes_and_a_fuller_one_does_not() -> None:
    random = np.random.default_rng(1)
    users = random.permutation(codec.MAX_DIGEST_USERS).astype(np.int64) * 7_777_777
    tokens = np.full(len(users), 2**32 - 1, dtype=np.uint32)
    shards = np.full(codec.MAX_DIGEST_SHARDS, 2**32 - 1, dtype=np.uint32)
    head = {"boot_epoch": 1, "sequence": 1, "page_tokens": 64}
    found = decode_digest(encode_digest(users, tokens, shards, **head))
    assert len(found.keys) == codec.MAX_DIGEST_USERS
    assert len(found.shard_rows) == codec.MAX_DIGEST_SHARDS
    for more_users, more_shards in ((1, 0), (0, 1)):
        with pytest.raises(DigestError, match="exceeds") as caught:
            encode_digest(
                np.append(users, users[:more_users]),
                np.append(tokens, tokens[:more_users]),
                np.append(shards, shards[:more_shards]),
                **head,
            )
        assert caught.value.reason is DigestReason.TOO_LARGE


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"page_tokens": 0}, "page_tokens"),
        ({"boot_epoch": -1}, "boot_epoch"),
        ({"sequence": 2**64}, "sequence"),
        ({"tokens": np.array([-1])}, "smallest token"),
        ({"tokens": np.array([2**32])}, "largest token"),
        ({"shard_rows": np.array([2**32])}, "largest shard"),
        ({"tokens": np.array([1, 2])}, "1 users and 2 token counts"),
    ],
)
def test_numbers_that_fit_no_digest_are_named(changes: dict[str, Any], named: str) -> None:
    arguments = {
        "users": np.array([1]),
        "tokens": np.array([64]),
        "shard_rows": np.array([1]),
        "boot_epoch": 1,
        "sequence": 1,
        "page_tokens": 64,
    }
    with pytest.raises(DigestError, match=named) as caught:
        encode_digest(**{**arguments, **changes})
    assert caught.value.reason is DigestReason.SIZES


@given(st.binary(max_size=300))
@example(b"")
@example(b"HBMD")
@example(b"HBMD" + bytes(52))
def test_foreign_bytes_are_refused(blob: bytes) -> None:
    with pytest.raises(DigestError) as caught:
        decode_digest(blob)
    assert caught.value.reason in DigestReason


@given(USERS, st.data())
def test_every_flipped_bit_and_every_cut_is_noticed(
    users: list[tuple[int, int]], data: st.DataObject
) -> None:
    blob = bytearray(_encode(users, [1, 2, 3]))
    cut = data.draw(st.integers(0, len(blob) - 1))
    with pytest.raises(DigestError) as caught:
        decode_digest(bytes(blob[:cut]))
    assert caught.value.reason is DigestReason.TRUNCATED
    bit = data.draw(st.integers(0, 8 * len(blob) - 1))
    blob[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DigestError):
        decode_digest(bytes(blob))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda blob: b"ELF\x7f" + blob[4:], DigestReason.FOREIGN),
        (lambda blob: blob[:4] + b"\x02\x00" + blob[6:], DigestReason.VERSION),
        (lambda blob: blob + b"\0", DigestReason.CRC),
        (lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]), DigestReason.CRC),
        (lambda blob: blob + bytes(codec.MAX_DIGEST_BYTES), DigestReason.TOO_LARGE),
    ],
)
def test_the_reason_is_named(change: Any, reason: DigestReason) -> None:
    with pytest.raises(DigestError) as caught:
        decode_digest(change(_encode([(1, 64), (2, 65)], [3])))
    assert caught.value.reason is reason


U32 = st.integers(0, 2**32 - 1)


@given(
    st.integers(0, 3), U64, U32 | st.just(64), U32 | st.integers(0, 9), U32 | st.integers(0, 9),
    st.binary(max_size=60), st.binary(max_size=20), st.binary(max_size=20),
)  # fmt: skip
@example(0, 1, 64, 1, 0, b"\xff\xff\xff\xff\xff\x20", b"\0", b"")
@example(1, 1, 2**32 - 1, 1, 0, b"\1", b"\xff\xff\xff\xff\x0f", b"")
@example(0, 1, 64, 2**32 - 1, 2**32 - 1, b"", b"", b"")
@settings(max_examples=300)
def test_a_valid_checksum_over_nonsense_is_survived(
    flags: int,
    epoch: int,
    page: int,
    users: int,
    shards: int,
    keys: bytes,
    tokens: bytes,
    rows: bytes,
) -> None:
    body = keys + tokens + rows
    sizes = (len(keys), len(tokens), len(rows))
    head = struct.pack("<4sHHQQIIIIII", b"HBMD", 1, flags, epoch, 2, page, users, shards, *sizes)
    try:
        found = decode_digest(head + struct.pack("<I", crc32(head + body)) + body)
    except DigestError:
        return
    assert isinstance(found, Digest)
    assert len(found.keys) == len(found.tokens) == users
    assert len(found.shard_rows) == shards
    assert found.page_tokens == page > 0
    assert np.all(found.keys[1:] > found.keys[:-1])
    assert not users or found.keys[-1] < 2**40


def test_claims_of_a_head_allocate_nothing() -> None:
    huge = struct.pack(
        "<4sHHQQIIIIII", b"HBMD", 1, 0, 1, 1, 64, 2**32 - 1, 2**32 - 1, *[2**32 - 1] * 3
    )
    blobs = [huge + struct.pack("<I", crc32(huge)), huge + bytes(100)]
    body = bytes(1000)
    head = struct.pack("<4sHHQQIIIIII", b"HBMD", 1, 0, 1, 1, 64, 2**32 - 1, 0, 1000, 0, 0)
    blobs.append(head + struct.pack("<I", crc32(head + body)) + body)
    tracemalloc.start()
    for blob in blobs:
        with pytest.raises(DigestError):
            decode_digest(blob)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_keys_carry_namespace_and_node() -> None:
    assert codec.nodes_key("rank") == "hbm:rank:nodes"
    assert codec.node_key("rank", "a") == "hbm:rank:n:a"
    assert codec.digest_key_name("rank", "a") == "hbm:rank:d:a"


def test_the_fields_of_a_node_are_known() -> None:
    fields = node_to_hash(STATE)
    assert set(fields) == set(NodeState._fields)
    assert fields["alpha"] == "0.35"
    assert fields["cost_token_context_ms"] == "1.5e-09"
    assert (fields["draining"], fields["digest_crc"]) == ("0", "3735928559")


FINITE = st.floats(0, 1e12)
STATES = st.builds(
    NodeState,
    schema=st.just(1),
    name=st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=40),
    url=st.sampled_from(["http://a:1", "https://node.example/x"]),
    boot_epoch=U64,
    sequence=U64,
    heartbeat_unix_ms=st.integers(0, 2**63 - 1),
    alpha=st.floats(0, 1),
    queue_depth=U32,
    queue_ms=FINITE,
    service_ms=FINITE,
    cost_fixed_ms=FINITE,
    cost_token_ms=FINITE,
    cost_token_context_ms=FINITE,
    cost_row_ms=FINITE,
    rows_per_token=FINITE,
    emb_miss_ratio=st.floats(0, 1),
    page_tokens=st.integers(1, 2**32 - 1),
    draining=st.booleans(),
    digest_sequence=U64,
    digest_crc=U32,
    model=st.text(st.characters(categories=["L", "N"]), max_size=40),
    model_version=U64,
)


@given(STATES)
def test_a_node_state_comes_back(state: NodeState) -> None:
    fields = {name.encode(): str(value).encode() for name, value in node_to_hash(state).items()}
    assert node_from_hash({**fields, b"of_a_later_release": b"\xff"}) == state


@pytest.mark.parametrize("name", NodeState._fields)
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(NodeStateError, match=f"{name} is missing"):
        node_from_hash(_raw(STATE, **{name: None}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schema", b"2"),
        ("name", b""),
        ("name", b"\xff\xfe"),
        ("name", b"x" * 254),
        ("name", b"a\nb"),
        ("url", b"file:///etc/passwd"),
        ("url", b"http://" + b"x" * 3000),
        ("boot_epoch", b"-1"),
        ("boot_epoch", b"18446744073709551616"),
        ("sequence", b"1_000"),
        ("sequence", b" 1"),
        ("sequence", "١".encode()),
        ("sequence", b"9" * 5000),
        ("alpha", b"1.01"),
        ("alpha", b"-0.1"),
        ("alpha", b"nan"),
        ("queue_ms", b"inf"),
        ("queue_ms", b"1e999"),
        ("queue_ms", b"1e13"),
        ("queue_ms", b"0x10"),
        ("queue_ms", b"1_0"),
        ("page_tokens", b"0"),
        ("draining", b"2"),
        ("draining", b"True"),
        ("digest_crc", b"4294967296"),
    ],
)
def test_a_field_out_of_range_is_named(name: str, value: bytes) -> None:
    with pytest.raises(NodeStateError, match=name if name != "schema" else "schema 2"):
        node_from_hash(_raw(STATE, **{name: value}))


@given(st.sampled_from(NodeState._fields), st.binary(max_size=40))
def test_any_bytes_in_a_field_are_survived(name: str, value: bytes) -> None:
    try:
        state = node_from_hash(_raw(STATE, **{name: value}))
    except NodeStateError:
        return
    assert node_from_hash(_raw(state)) == state


@given(st.dictionaries(st.binary(max_size=8), st.binary(max_size=8), max_size=5))
def test_a_foreign_hash_is_refused(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(NodeStateError):
        node_from_hash(fields)


@pytest.mark.parametrize(
    "changes",
    [{"service_ms": math.nan}, {"alpha": 2.0}, {"queue_depth": -1}, {"name": ""}, {"schema": 7}],
)
def test_a_state_that_would_not_be_read_is_not_written(changes: dict[str, Any]) -> None:
    with pytest.raises(NodeStateError):
        node_to_hash(STATE._replace(**changes))
