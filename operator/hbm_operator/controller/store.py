"""What was seen of the cluster, newest version of each object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

from hbm_operator.models.policy import HBMPolicy
from hbm_operator.observed import Partition, Pod

T = TypeVar("T")


def _nothing(before: object, after: object) -> None: ...


class Identity(NamedTuple):
    """Which object, and which version of it."""

    namespace: str
    name: str
    uid: str
    version: int


class Table(Generic[T]):
    """Objects of one kind by namespace and name. Older news of an object is ignored, so that it
    does not matter in which order events, lists and the answers to own writes arrive."""

    def __init__(self, identify: Callable[[T], Identity]) -> None:
        self._identify = identify
        self._rows: dict[str, dict[str, T]] = {}
        self.on_change: Callable[[T | None, T | None], None] = _nothing
        """Told of each change, wherever it came from: (before, after)."""

    def get(self, namespace: str, name: str) -> T | None:
        return self._rows.get(namespace, {}).get(name)

    def within(self, namespace: str) -> Mapping[str, T]:
        """All of a namespace, by name."""
        return self._rows.get(namespace, {})

    def namespaces(self) -> list[str]:
        """Namespaces that hold any."""
        return list(self._rows)

    def __iter__(self) -> Iterator[T]:
        for rows in list(self._rows.values()):
            yield from list(rows.values())

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._rows.values())

    def put(self, item: T) -> bool:
        """Take it over; False where a version at least as new is there."""
        new = self._identify(item)
        known = self.get(new.namespace, new.name)
        if known is not None and self._identify(known).version >= new.version:
            return False
        self._rows.setdefault(new.namespace, {})[new.name] = item
        self.on_change(known, item)
        return True

    def remove(self, item: T) -> bool:
        """It was deleted; False where another object has its name by now."""
        gone = self._identify(item)
        known = self.get(gone.namespace, gone.name)
        if known is None or self._identify(known).uid != gone.uid:
            return False
        self._drop(gone)
        return True

    def _drop(self, gone: Identity) -> None:
        rows = self._rows[gone.namespace]
        item = rows.pop(gone.name)
        if not rows:
            del self._rows[gone.namespace]
        self.on_change(item, None)

    def replace(self, items: Iterable[T], version: int, within: str | None = None) -> None:
        """Bring it in line with a whole list (of one namespace).

        Args:
            items: the list.
            version: of the list; what is newer than it stays.
            within: the namespace that was listed; None: all were.
        """
        listed = set()
        for item in items:
            identity = self._identify(item)
            listed.add(identity.uid)
            self.put(item)
        for item in list(self):
            identity = self._identify(item)
            foreign = within is not None and identity.namespace != within
            if foreign or identity.uid in listed or identity.version > version:
                continue
            self._drop(identity)


def _of_policy(policy: HBMPolicy) -> Identity:
    metadata = policy.metadata
    return Identity(
        metadata.namespace, metadata.name, metadata.uid, int(metadata.resource_version or 0)
    )


def _of_row(row: Pod | Partition) -> Identity:
    return Identity(row.namespace, row.name, row.uid, row.version)


class Namespace(NamedTuple):
    """A namespace."""

    name: str
    opted_in: bool
    terminating: bool


class Store:
    """Everything that reconciles look at."""

    def __init__(self) -> None:
        self.pods: Table[Pod] = Table(_of_row)
        """Injected pods."""
        self.uninjected: Table[Pod] = Table(_of_row)
        """Pods that ask for the sidecar and run without it."""
        self.partitions: Table[Partition] = Table(_of_row)
        self.policies: Table[HBMPolicy] = Table(_of_policy)
        self.namespaces: dict[str, Namespace] = {}

    def terminating(self, namespace: str) -> bool:
        """Nothing new can be made in it."""
        known = self.namespaces.get(namespace)
        return known is not None and known.terminating
