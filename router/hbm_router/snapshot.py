"""What the nodes last said, frozen: swapped as a whole, never changed, safe to read anywhere.

Residency is exact (a pool holds hundreds to thousands of users): one sorted array over all nodes
of 40-bit digest keys, so that finding who holds a user is one binary search whatever the number
of nodes. A user is expected on one or two nodes; the rare collision of two users' 40 bits costs one
wrong prediction. Memory: 14 bytes per (user, node).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.digest import NodeState


class Residency(NamedTuple):
    """Whom a node holds."""

    keys: npt.NDArray[np.int64]  # [n] digest keys, ascending
    tokens: npt.NDArray[np.uint32]  # [n] cached history tokens
    shard_rows: npt.NDArray[np.uint32]  # [s] resident rows of each EMB shard
    blob_bytes: int
    boot_epoch: int
    sequence: int
    crc: int


class NodeView(NamedTuple):
    """A node's last accepted words, and when (router's monotonic clock) they were first heard."""

    state: NodeState
    heard_s: float
    residency: Residency | None
    residency_heard_s: float


_NO_KEYS = np.empty(0, dtype=np.int64)


class Snapshot:
    """Views of the nodes in `names`, in that order; `None` for a node that said nothing yet."""

    __slots__ = ("_keys", "_owners", "_tokens", "names", "views")

    def __init__(
        self,
        names: Sequence[str],
        views: Mapping[str, NodeView],
        previous: Snapshot | None = None,
    ) -> None:
        """`previous` lends its index when no node's residency has changed since."""
        self.names = tuple(names)
        self.views = tuple(views.get(name) for name in self.names)
        # array.array: its items come out as plain integers, which numpy's do not.
        self._keys: array[int]
        self._tokens: array[int]
        self._owners: array[int]
        if previous is not None and self._same_residency(previous):
            self._keys, self._tokens, self._owners = (
                previous._keys,
                previous._tokens,
                previous._owners,
            )
            return
        held = [
            (index, view.residency)
            for index, view in enumerate(self.views)
            if view is not None and view.residency is not None
        ]
        keys = np.concatenate([_NO_KEYS, *(residency.keys for _, residency in held)])
        tokens = np.concatenate(
            [np.empty(0, np.uint32), *(residency.tokens for _, residency in held)]
        )
        owners = np.concatenate(
            [
                np.empty(0, np.int16),
                *(np.full(len(residency.keys), index, np.int16) for index, residency in held),
            ]
        )
        order = np.argsort(keys, kind="stable")
        self._keys = array("q", keys[order].tobytes())
        self._tokens = array("I", tokens[order].tobytes())
        self._owners = array("h", owners[order].tobytes())

    def _same_residency(self, other: Snapshot) -> bool:
        return self.names == other.names and all(
            (a and a.residency) is (b and b.residency)
            for a, b in zip(self.views, other.views, strict=True)
        )

    @property
    def entries(self) -> int:
        """(user, node) pairs held."""
        return len(self._keys)

    def holders(self, key: int) -> list[tuple[int, int]]:
        """`(index in names, cached tokens)` of each node that says it holds a digest key."""
        keys = self._keys
        at = bisect_left(keys, key)
        found: list[tuple[int, int]] = []
        while at < len(keys) and keys[at] == key:
            found.append((self._owners[at], self._tokens[at]))
            at += 1
        return found
