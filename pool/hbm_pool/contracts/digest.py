"""What a pod tells the router: `NodeState` (a Redis hash) and the digest (a blob).

Keys, for namespace `ns` and node `name` (in Kubernetes the pod uid):

* `hbm:{ns}:nodes`     ZSET, member = name, score = heartbeat, Unix ms
* `hbm:{ns}:n:{name}`  HASH of `NodeState`, expires
* `hbm:{ns}:d:{name}`  digest blob, expires

Digest blob, little-endian: `HBMD`, version, flags, boot epoch, sequence, page tokens, numbers of
users and shards, bytes of the three parts, CRC-32 of all else; then as varints the gaps between
the ascending 40-bit keys (less one: keys are distinct), the cached tokens (in pages where all are
whole pages) and the resident rows per EMB shard.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from enum import StrEnum
from typing import Final, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt

from hbm_pool.contracts.identity import DIGEST_KEY_BITS, DIGEST_KEY_MASK
from hbm_pool.contracts.varint import decode_varints, encode_varints

DIGEST_VERSION: Final = 1
NODE_SCHEMA: Final = 1
"""`NodeState.schema` of this release: goes up when a field changes its meaning or disappears."""
MAX_DIGEST_USERS: Final = 1 << 17
MAX_DIGEST_SHARDS: Final = 1 << 14

_DIGEST_MAGIC: Final = b"HBMD"
_DIGEST: Final = struct.Struct("<4sHHQQIIIIII")
_DIGEST_HEAD_BYTES: Final = _DIGEST.size + 4
_IN_PAGES: Final = 1
_MAX_U32: Final = (1 << 32) - 1
_MAX_U63: Final = (1 << 63) - 1
_MAX_U64: Final = (1 << 64) - 1
MAX_DIGEST_BYTES: Final = _DIGEST_HEAD_BYTES + MAX_DIGEST_USERS * 11 + MAX_DIGEST_SHARDS * 5
"""A key gap takes at most 6 bytes, a number below 2^32 at most 5."""

_FLOAT: Final = re.compile(r"\d{1,20}(\.\d{1,20})?([eE][+-]?\d{1,3})?", re.ASCII)
_FLOATS: Final = frozenset(
    {
        "alpha",
        "queue_ms",
        "service_ms",
        "cost_fixed_ms",
        "cost_token_ms",
        "cost_token_context_ms",
        "cost_row_ms",
        "rows_per_token",
        "emb_miss_ratio",
    }
)


class NodeState(NamedTuple):
    """A pod's load and its own measured costs, as written at each heartbeat.

    Times are ms. `kv_miss_ms(L) = cost_token_ms * L + cost_token_context_ms * L * L / 2`.
    """

    schema: int
    name: str
    url: str
    boot_epoch: int
    sequence: int
    heartbeat_unix_ms: int
    alpha: float
    queue_depth: int
    queue_ms: float
    service_ms: float  # gather and compute per request, mean of the last window
    cost_fixed_ms: float
    cost_token_ms: float
    cost_token_context_ms: float
    cost_row_ms: float  # mean over classes, weighted by their misses
    rows_per_token: float  # lookups per computed token
    emb_miss_ratio: float
    page_tokens: int
    draining: bool
    digest_sequence: int
    digest_crc: int
    model: str
    model_version: int


class DigestReason(StrEnum):
    """Why a blob is no digest: the label of the counter of rejected ones."""

    TOO_LARGE = "too_large"
    TRUNCATED = "truncated"
    FOREIGN = "foreign"
    VERSION = "version"
    SIZES = "sizes"
    CRC = "crc"
    KEYS = "keys"
    TOKENS = "tokens"
    SHARDS = "shards"


class DigestError(Exception):
    """A digest that cannot be encoded or decoded."""

    def __init__(self, reason: DigestReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Digest(NamedTuple):
    """Whom a pod holds, and how much of each EMB shard.

    `keys` are strictly ascending 40-bit user keys (`identity.digest_key`).
    """

    boot_epoch: int
    sequence: int
    page_tokens: int
    keys: npt.NDArray[np.uint64]  # [n]
    tokens: npt.NDArray[np.uint32]  # [n] cached tokens
    shard_rows: npt.NDArray[np.uint32]  # [s] resident rows per shard


def encode_digest(
    users: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.uint32],
    shard_rows: npt.NDArray[np.uint32],
    *,
    boot_epoch: int,
    sequence: int,
    page_tokens: int,
) -> bytes:
    """Digest of the resident users, `[n] int64` with `[n] uint32` tokens, in any order.

    Two users whose 40-bit keys collide become one entry with the larger number of tokens: both
    are resident here, so either way the request goes to a node that holds something of its user.
    `DigestError` (too_large) beyond the caps, (sizes) for numbers that do not fit.
    """
    if len(users) != len(tokens):
        raise DigestError(
            DigestReason.SIZES, f"a digest has {len(users)} users and {len(tokens)} token counts"
        )
    if len(users) > MAX_DIGEST_USERS or len(shard_rows) > MAX_DIGEST_SHARDS:
        raise DigestError(
            DigestReason.TOO_LARGE,
            f"a digest of {len(users)} users and {len(shard_rows)} shards exceeds "
            f"{MAX_DIGEST_USERS} users or {MAX_DIGEST_SHARDS} shards",
        )
    for name, lowest, value, highest in (
        ("page_tokens", 1, page_tokens, _MAX_U32),
        ("boot_epoch", 0, boot_epoch, _MAX_U64),
        ("sequence", 0, sequence, _MAX_U64),
        ("smallest token count", 0, int(tokens.min(initial=0)), _MAX_U32),
        ("largest token count", 0, int(tokens.max(initial=0)), _MAX_U32),
        ("smallest shard", 0, int(shard_rows.min(initial=0)), _MAX_U32),
        ("largest shard", 0, int(shard_rows.max(initial=0)), _MAX_U32),
    ):
        if not lowest <= value <= highest:
            raise DigestError(
                DigestReason.SIZES, f"the {name} of a digest is out of range ({value})"
            )
    keys = users.astype(np.int64).view(np.uint64) & np.uint64(DIGEST_KEY_MASK)
    counts = tokens.astype(np.uint64)
    order = np.argsort(keys)
    keys, counts = keys[order], counts[order]
    if len(keys):
        first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        keys, counts = keys[first], np.maximum.reduceat(counts, first)
    gaps = keys.copy()
    gaps[1:] -= keys[:-1] + np.uint64(1)
    in_pages = not np.any(counts % np.uint64(page_tokens))
    if in_pages:
        counts //= np.uint64(page_tokens)
    parts = (
        encode_varints(gaps),
        encode_varints(counts),
        encode_varints(shard_rows.astype(np.uint64)),
    )
    body = b"".join(parts)
    head = _DIGEST.pack(
        _DIGEST_MAGIC,
        DIGEST_VERSION,
        _IN_PAGES if in_pages else 0,
        boot_epoch,
        sequence,
        page_tokens,
        len(keys),
        len(shard_rows),
        *map(len, parts),
    )
    return head + crc32(body, crc32(head)).to_bytes(4, "little") + body


def decode_digest(blob: bytes) -> Digest:
    """The digest in `blob`. Any other bytes raise `DigestError` and allocate no more than they do.

    Every number is bounded by the length of the blob, and that by the caps, before it is used.
    """
    if len(blob) > MAX_DIGEST_BYTES:
        raise DigestError(
            DigestReason.TOO_LARGE,
            f"a digest of {len(blob)} bytes is refused ({MAX_DIGEST_BYTES} at most)",
        )
    if not blob.startswith(_DIGEST_MAGIC):
        reason = DigestReason.FOREIGN if len(blob) >= 4 else DigestReason.TRUNCATED
        raise DigestError(reason, f"no digest: it starts with {blob[:4]!r}")
    if len(blob) < _DIGEST_HEAD_BYTES:
        raise DigestError(
            DigestReason.TRUNCATED, f"{len(blob)} bytes are less than the head of a digest"
        )
    (_, version, flags, boot_epoch, sequence, page_tokens, users, shards, *sizes) = (
        _DIGEST.unpack_from(blob)
    )
    if version != DIGEST_VERSION:
        raise DigestError(
            DigestReason.VERSION,
            f"digest version {version}, this program reads {DIGEST_VERSION}",
        )
    expected = _DIGEST_HEAD_BYTES + sum(sizes)
    if len(blob) < expected:
        raise DigestError(
            DigestReason.TRUNCATED, f"{len(blob)} of {expected} bytes of a digest arrived"
        )
    crc = int.from_bytes(blob[_DIGEST.size : _DIGEST_HEAD_BYTES], "little")
    body = memoryview(blob)[_DIGEST_HEAD_BYTES:]
    if crc32(body, crc32(blob[: _DIGEST.size])) != crc:
        raise DigestError(DigestReason.CRC, "the checksum of a digest does not fit its bytes")
    if (
        len(blob) != expected
        or users > min(MAX_DIGEST_USERS, sizes[0], sizes[1])
        or shards > min(MAX_DIGEST_SHARDS, sizes[2])
        or page_tokens == 0
        or flags & ~_IN_PAGES
    ):
        raise DigestError(
            DigestReason.SIZES,
            f"a digest claims {users} users, {shards} shards, pages of {page_tokens} tokens and "
            f"parts of {sizes} bytes in {len(blob)} bytes",
        )
    gaps = decode_varints(bytes(body[: sizes[0]]), users, DIGEST_KEY_BITS)
    if gaps is None:
        raise DigestError(DigestReason.KEYS, "the user keys of a digest are malformed")
    # At most 2^17 gaps below 2^40: the sum stays far below 2^64.
    keys = np.cumsum(gaps + np.uint64(1), dtype=np.uint64) - np.uint64(1)
    if users and int(keys[-1]) > DIGEST_KEY_MASK:
        raise DigestError(DigestReason.KEYS, "the user keys of a digest exceed 40 bits")
    counts = decode_varints(bytes(body[sizes[0] : sizes[0] + sizes[1]]), users, 32)
    if counts is not None and flags & _IN_PAGES:
        counts *= np.uint64(page_tokens)
    if counts is None or (users and int(counts.max()) > _MAX_U32):
        raise DigestError(DigestReason.TOKENS, "the token counts of a digest are malformed")
    shard_rows = decode_varints(bytes(body[sizes[0] + sizes[1] :]), shards, 32)
    if shard_rows is None:
        raise DigestError(DigestReason.SHARDS, "the shard rows of a digest are malformed")
    return Digest(
        boot_epoch=boot_epoch,
        sequence=sequence,
        page_tokens=page_tokens,
        keys=keys,
        tokens=counts.astype(np.uint32),
        shard_rows=shard_rows.astype(np.uint32),
    )


def digest_crc(blob: bytes) -> int:
    """The CRC-32 in the head of an encoded digest: what `NodeState.digest_crc` repeats."""
    return int.from_bytes(blob[_DIGEST.size : _DIGEST_HEAD_BYTES], "little")


class NodeStateError(Exception):
    """A node's hash that cannot be used; the message names the field."""


def nodes_key(namespace: str) -> str:
    """Key of the ZSET of live nodes."""
    return f"hbm:{namespace}:nodes"


def node_key(namespace: str, name: str) -> str:
    """Key of a node's HASH."""
    return f"hbm:{namespace}:n:{name}"


def digest_key_name(namespace: str, name: str) -> str:
    """Key of a node's digest blob."""
    return f"hbm:{namespace}:d:{name}"


def node_to_hash(state: NodeState) -> dict[str, str | bytes]:
    """Fields of the Redis hash. `NodeStateError` when the state would not be read back."""
    fields: dict[str, str | bytes] = {}
    for name in NodeState._fields:
        value = getattr(state, name)
        if isinstance(value, bool):
            fields[name] = "1" if value else "0"
        elif isinstance(value, str):
            fields[name] = value
        else:
            fields[name] = repr(float(value) if name in _FLOATS else int(value))
    node_from_hash({key.encode(): str(value).encode() for key, value in fields.items()})
    return fields


def node_from_hash(fields: Mapping[bytes, bytes]) -> NodeState:
    """The state in a Redis hash; fields that this release does not know are ignored.

    `NodeStateError` when a field is missing, is no number, or lies outside its range.
    """
    schema = _integer(fields, "schema", 0, _MAX_U32)
    if schema != NODE_SCHEMA:
        raise NodeStateError(
            f"node state has schema {schema}, this program reads {NODE_SCHEMA}: run the same "
            "release of sidecar and router"
        )
    url = _text(fields, "url", 2048)
    if not url.startswith(("http://", "https://")):
        raise NodeStateError(f"node field url is {url!r}; it must start with http:// or https://")
    return NodeState(
        schema=schema,
        name=_text(fields, "name", 253),
        url=url,
        boot_epoch=_integer(fields, "boot_epoch", 0, _MAX_U64),
        sequence=_integer(fields, "sequence", 0, _MAX_U64),
        heartbeat_unix_ms=_integer(fields, "heartbeat_unix_ms", 0, _MAX_U63),
        alpha=_number(fields, "alpha", 1.0),
        queue_depth=_integer(fields, "queue_depth", 0, _MAX_U32),
        queue_ms=_number(fields, "queue_ms"),
        service_ms=_number(fields, "service_ms"),
        cost_fixed_ms=_number(fields, "cost_fixed_ms"),
        cost_token_ms=_number(fields, "cost_token_ms"),
        cost_token_context_ms=_number(fields, "cost_token_context_ms"),
        cost_row_ms=_number(fields, "cost_row_ms"),
        rows_per_token=_number(fields, "rows_per_token"),
        emb_miss_ratio=_number(fields, "emb_miss_ratio", 1.0),
        page_tokens=_integer(fields, "page_tokens", 1, _MAX_U32),
        draining=bool(_integer(fields, "draining", 0, 1)),
        digest_sequence=_integer(fields, "digest_sequence", 0, _MAX_U64),
        digest_crc=_integer(fields, "digest_crc", 0, _MAX_U32),
        model=_text(fields, "model", 256, shortest=0),
        model_version=_integer(fields, "model_version", 0, _MAX_U64),
    )


def _raw(fields: Mapping[bytes, bytes], name: str, longest: int, shortest: int = 1) -> str:
    raw = fields.get(name.encode())
    if raw is None:
        raise NodeStateError(f"node field {name} is missing")
    if not shortest <= len(raw) <= longest:
        raise NodeStateError(
            f"node field {name} has {len(raw)} bytes; allowed are {shortest} to {longest}"
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise NodeStateError(f"node field {name} is no UTF-8 text: {raw[:64]!r}") from error


def _text(fields: Mapping[bytes, bytes], name: str, longest: int, shortest: int = 1) -> str:
    text = _raw(fields, name, longest, shortest)
    if not text.isprintable():
        raise NodeStateError(f"node field {name} has unprintable characters: {text!r}")
    return text


def _integer(fields: Mapping[bytes, bytes], name: str, lowest: int, highest: int) -> int:
    text = _raw(fields, name, 20)
    if not (text.isascii() and text.isdigit()) or not lowest <= int(text) <= highest:
        raise NodeStateError(
            f"node field {name} is {text!r}; it must be an integer in [{lowest}, {highest}]"
        )
    return int(text)


def _number(fields: Mapping[bytes, bytes], name: str, highest: float = 1e12) -> float:
    text = _raw(fields, name, 32)
    if _FLOAT.fullmatch(text) is None or not float(text) <= highest:
        raise NodeStateError(
            f"node field {name} is {text!r}; it must be a number in [0, {highest:g}]"
        )
    return float(text)
