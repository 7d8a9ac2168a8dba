"""The embedding cache: hot rows of all tables in extents of the arena.

A gather ends in buffers of the batch; nothing computes on slots, so a slot may be reused as soon
as the copies that read it are done. Locks: one, held while an index changes and while rows are
copied inside host memory or copies are queued on a device; never while a store is read, the link
is waited for or the device is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from hbm_pool.contracts.identity import mix64_array, row_keys
from hbm_pool.device.arena import Arena
from hbm_pool.device.class_extents import ClassExtents, Emptied
from hbm_pool.device.row_counters import (
    EmbeddingCounters,
    GatherStats,
    count_cache,
    count_gather,
)
from hbm_pool.device.row_index import Extents, Found, Inserted, Keys
from hbm_pool.device.row_requests import (
    RowRequest,
    check_stores,
    index_for,
    pushed_rows,
    row_request,
)
from hbm_pool.device.width_class import EmbClass, Fetch, IndexKind, Table, as_bytes
from hbm_pool.errors import RowStoreError
from hbm_pool.host.config import PoolShape
from hbm_pool.host.fences import EpochClock, Lane
from hbm_pool.host.link import LinkModel
from hbm_pool.host.push_log import PushLog
from hbm_pool.host.row_store import RowStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HIT_SAMPLE: Final = 8
"""One gather in so many notes all it asked for, with this weight, for the refiller's counts."""
SLICE_SLOTS: Final = 256
"""Slots a planned move looks at between two looks at the clock."""


class EmbeddingCache:
    """Rows of `shape.tables`, whole tables in `stores`, in extents lent by the pool.

    `clock` tells the pool when copies that read extents are done. `index` is where keys and
    replacement live: by default on the GPU when the arena does and the index takes at most
    `DEVICE_INDEX_SHARE` of it, else on the host. Any thread may call any method.

    Raises ValueError when stores and tables do not fit together.
    """

    def __init__(
        self,
        shape: PoolShape,
        arena: Arena,
        stores: Mapping[str, RowStore],
        *,
        clock: EpochClock | None = None,
        link: LinkModel | None = None,
        index: Literal["auto", "host", "device"] = "auto",
        clock_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_stores(shape, stores)
        self.device = arena.device
        self.link = link or LinkModel()
        self.index_kind: IndexKind = index_for(shape, arena) if index == "auto" else index
        self.classes = tuple(
            EmbClass(number, kind, shape, arena, stores, self.index_kind)
            for number, kind in enumerate(shape.classes)
        )
        self._extents = ClassExtents(self.classes)
        self._tables = {table.name: (kind, table) for kind in self.classes for table in kind.tables}
        self._clock = clock or EpochClock()
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._push_lock = threading.Lock()
        self._pushes = PushLog()
        self._last_stream: torch.cuda.Stream | None = None
        self._gathers = 0
        self._refill_rows = 0
        self.row_epoch = 0

    # -- rows ------------------------------------------------------------------------------------

    def gather(
        self, ids: Mapping[str, torch.Tensor], out: Mapping[str, torch.Tensor]
    ) -> GatherStats:
        """Rows of one batch: `out[table][i]` becomes row `ids[table][i]`.

        `ids` are `[n] int64`, repeated ones allowed; `out` are contiguous `[n, width]` of the
        table's dtype on the arena's device, owned by the batch. On CUDA `out` is complete on the
        current stream. Raises ValueError for tables, shapes or ids that do not exist (nothing has
        happened then), RowStoreError when missed rows cannot be read (the cache is as before).
        """
        requests = [self._request(name, wanted, out) for name, wanted in ids.items()]
        epoch = self._clock.begin(Lane.EMB)
        self.link.begin_fetch()
        try:
            with self._lock:
                self._order_streams()
                found = [r.kind.index.lookup(r.ids, r.table.first_key, r.out) for r in requests]
                if not [one for one in found if not one.complete]:
                    return self._count(requests, found, [], [])
                ticket = self._pushes.begin_read()
            try:
                return self._complete(requests, found, ticket)
            finally:
                with self._lock:
                    self._pushes.end_read(ticket)
        finally:
            self.link.end_fetch()
            self._clock.end(Lane.EMB, epoch)

    def prefetch(self, ids: Mapping[str, torch.Tensor]) -> int:
        """Brings rows in that a later gather will ask for; returns how many were fetched.

        Counts no access. Raises as `gather` does.
        """
        requests = [self._request(name, wanted, None) for name, wanted in ids.items()]
        with self._span(), self._reading() as ticket:
            fetches = []
            for request in requests:
                wanted = np.unique(request.ids.cpu().numpy()) + request.table.first_key
                missing = wanted[~request.kind.index.contains(wanted)]
                if missing.size:
                    fetches.append(Fetch(request.kind, missing))
            if fetches:
                with self.link.fetching():
                    self._fetch(fetches)
                    self._settle(fetches, ticket, None)
        return sum(fetch.keys.size for fetch in fetches)

    def push_rows(self, table: str, ids: torch.Tensor | Keys, values: torch.Tensor) -> int:
        """New values of rows, `[n]` ids and `[n, width]` values; returns the new row epoch.

        When it returns, the store holds them and no gather that starts returns older ones; one
        that runs beside it returns each row whole, old or new. Of an id given twice the last value
        counts. Raises ValueError for rows that do not exist, RowStoreError when the store cannot
        be written: those rows then leave the cache, and what the store holds of them is unknown.
        """
        kind, held = self._table(table)
        keys, rows = pushed_rows(kind, held, ids, values)
        if keys.size == 0:
            return self.row_epoch
        with self._push_lock, self._span():
            with self._lock:
                push = self._pushes.begin_push(kind.number, keys, as_bytes(rows))
            try:
                held.store.write(keys - held.first_key, as_bytes(rows))
            except Exception as error:
                with self._lock:
                    self._order_streams()
                    kind.index.discard(keys)
                    self._pushes.end_push(push, failed=True)
                if isinstance(error, RowStoreError):
                    raise
                raise RowStoreError(
                    f"table {table!r}: {keys.size} rows could not be written ({error})"
                ) from error
            self.link.push(int(kind.index.contains(keys).sum()) * kind.row_bytes)
            with self._lock:
                self._order_streams()
                kind.index.update(keys, kind.on_device(rows))
                self._pushes.end_push(push)
                self.row_epoch += 1
                return self.row_epoch

    # -- extents ---------------------------------------------------------------------------------

    @property
    def num_extents(self) -> int:
        """Extents held, those being emptied included."""
        return self._extents.total

    def class_extents(self) -> tuple[int, ...]:
        """Extents per width class, those being emptied included."""
        return tuple(kind.num_extents for kind in self.classes)

    def grow(self, extents: npt.NDArray[np.integer]) -> None:
        """Takes over extents, whatever their bytes are, and divides them among the classes."""
        with self._lock:
            self._extents.grow(np.ascontiguousarray(extents, np.int32))

    def plan_shrink(self, n: int) -> int:
        """Marks `n` more extents to be emptied by `shrink_step`; their rows still hit until then.
        Returns how many were found."""
        with self._lock:
            return self._extents.plan_shrink(n)

    def cancel_shrink(self) -> int:
        """Keeps the marked extents that are not empty yet; returns how many were promised."""
        with self._lock:
            return self._extents.cancel_shrink()

    def shrink_step(self, budget_us: float) -> Extents:
        """Relocates referenced rows for about `budget_us`; returns the extents it emptied.

        Copies that read them may still be on their way: a fence of the EMB lane taken afterwards
        is what their next user waits for.
        """
        return self._drain(budget_us, rebalancing=False).released

    def rebalance(self, budget_us: float) -> int:
        """Moves extents between width classes towards equal marginal miss cost, for about
        `budget_us`; does nothing beside a planned shrink. Returns how many changed class."""
        with self._lock:
            if not self._extents.plan_rebalance():
                return 0
        return self._drain(budget_us, rebalancing=True).handed_over

    def drop(self, n: int) -> Extents:
        """Gives up `n` extents with all their rows, O(extents); fewer when it has fewer.

        Extents being emptied go first.
        """
        with self._lock:
            return self._extents.drop(n)

    def reset(self) -> None:
        """Forgets all rows and keeps all extents."""
        with self._lock:
            self._extents.reset()

    # -- refill ----------------------------------------------------------------------------------

    def free_slots(self) -> int:
        """Slots of newly won extents that hold nothing yet."""
        with self._lock:
            return sum(kind.index.free_slots() for kind in self.classes)

    def refill_candidates(self, limit: int) -> list[tuple[int, Keys]]:
        """Per class with unused slots: rows that are not in the cache, the hottest of them first,
        at most `limit` and no more than there are slots. Each call looks at a part of the
        catalogue: none found does not mean that there are none."""
        found = []
        for kind in self.classes:
            with self._lock:
                room = min(limit, kind.index.free_slots())
            if room == 0:
                kind.counts.restart()
                continue
            keys = kind.absent(room)
            if keys.size:
                found.append((kind.number, keys))
        return found

    def refill(self, number: int, keys: Keys) -> int | None:
        """Copies rows of one class into unused slots; evicts nothing. Returns rows kept.

        None, and nothing has changed, when somebody else needs the link. Raises RowStoreError when
        they cannot be read; the cache is as before then.
        """
        kind = self.classes[number]
        with self._span(), self._reading() as ticket:
            fetch = Fetch(kind, keys)
            fetch.read()
            arrived: list[torch.Tensor] = []

            def copy() -> None:
                arrived.append(fetch.rows())
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()

            if self.link.refill(fetch.nbytes, copy) is None:
                return None
            with self._lock:
                self._order_streams()
                stale = self._pushes.pending > 0
                again = fetch.patch(self._pushes, ticket)
                rows = fetch.rows() if stale else arrived[0]
                if again.size:
                    keep = np.setdiff1d(np.arange(keys.size), again)
                    keys = keys[keep]
                    rows = rows[torch.from_numpy(keep).to(self.device)]
                kept = kind.index.fill(keys, rows)
                self._refill_rows += kept
                return kept

    # -- state -----------------------------------------------------------------------------------

    def set_row_prices(self, prices: Sequence[float]) -> None:
        """Cost of a missed row per class, in any common unit (a server's own ms per row)."""
        if len(prices) != len(self.classes) or not all(price > 0.0 for price in prices):
            raise ValueError(
                f"row prices are {list(prices)}; give {len(self.classes)} positive numbers"
            )
        with self._lock:
            for kind, price in zip(self.classes, prices, strict=True):
                kind.price = float(price)

    def counters(self) -> EmbeddingCounters:
        """All counters at once."""
        with self._lock:
            return count_cache(self.classes, self._refill_rows, self.row_epoch)

    def extents(self) -> Extents:
        """All extents held, ascending."""
        with self._lock:
            return np.sort(np.concatenate([kind.index.extents() for kind in self.classes]))

    def resident_ids(self, table: str) -> npt.NDArray[np.int64]:
        """Ids of the rows of one table that are in the cache, ascending. Scans the slots."""
        kind, held = self._table(table)
        with self._lock:
            keys, _ = kind.index.resident()
        own = keys[(keys >= held.first_key) & (keys < held.first_key + held.rows)]
        return np.sort(own - held.first_key)

    def shard_rows(self, num_shards: int) -> npt.NDArray[np.uint32]:
        """Resident rows per shard, `[num_shards] uint32`; the shard of a row is
        `mix64(row_key(table, row)) % num_shards`. Scans the slots."""
        total = np.zeros(num_shards, np.int64)
        for kind in self.classes:
            for table in kind.tables:
                keys = row_keys(table.number, self.resident_ids(table.name))
                shards = (mix64_array(keys) % np.uint64(num_shards)).astype(np.int64)
                total += np.bincount(shards, minlength=num_shards)
        return total.astype(np.uint32)

    def check_integrity(self) -> list[str]:
        """Violations of index and extents; empty when all is sound. Scans the slots."""
        found = []
        with self._lock:
            for kind in self.classes:
                found += [f"class {kind.number}: {text}" for text in kind.index.check_integrity()]
            found += self._extents.violations()
        return found

    def check_rows(self) -> list[str]:
        """Compares every resident row with its store; for tests and `hbm` diagnostics."""
        found = []
        with self._lock:
            self._order_streams()
            for kind in self.classes:
                keys, slots = kind.index.resident()
                if keys.size == 0:
                    continue
                expected = np.empty((keys.size, kind.row_bytes), np.uint8)
                kind.read(keys, expected)
                places = torch.from_numpy(slots).to(self.device)
                actual = as_bytes(kind.arena_rows.index_select(0, places).cpu())
                wrong = np.flatnonzero((actual != expected).any(axis=1))
                found += [
                    f"class {kind.number}: row {int(keys[i])} in slot {int(slots[i])} differs "
                    "from its store"
                    for i in wrong[:8]
                ]
        return found

    # -- inside ----------------------------------------------------------------------------------

    def _complete(
        self, requests: Sequence[RowRequest], found: Sequence[Found], ticket: int
    ) -> GatherStats:
        missed = [one.missed() for one in found]
        fetches = [
            Fetch(request.kind, keys)
            for request, keys in zip(requests, missed, strict=True)
            if keys.size
        ]
        waiting = [one for one, keys in zip(found, missed, strict=True) if keys.size]
        link_s, inserted = 0.0, list[Inserted]()
        if fetches:
            link_s = self._fetch(fetches)
            inserted = self._settle(fetches, ticket, waiting)
        with self._lock:
            stats = self._count(requests, found, missed, inserted)
        return stats._replace(link_ms=link_s * 1e3)

    def _fetch(self, fetches: Sequence[Fetch]) -> float:
        for fetch in fetches:
            fetch.read()
        return self.link.foreground(sum(fetch.nbytes for fetch in fetches))

    def _settle(
        self, fetches: Sequence[Fetch], ticket: int, waiting: Sequence[Found] | None
    ) -> list[Inserted]:
        """Hands fetched rows to the batch and to the cache, newest values of all of them."""
        while True:
            with self._lock:
                again = [fetch.patch(self._pushes, ticket) for fetch in fetches]
                if not any(places.size for places in again):
                    self._order_streams()
                    inserted = []
                    for number, fetch in enumerate(fetches):
                        rows = fetch.rows()
                        if waiting is not None:
                            waiting[number].spread(rows)
                            fetch.kind.counts.note(fetch.keys)
                        inserted.append(fetch.kind.index.insert(fetch.keys, rows))
                    return inserted
                self._pushes.renew_read(ticket)
            for fetch, places in zip(fetches, again, strict=True):
                if places.size:
                    fetch.read_again(places)

    def _count(
        self,
        requests: Sequence[RowRequest],
        found: Sequence[Found],
        missed: Sequence[Keys],
        inserted: Sequence[Inserted],
    ) -> GatherStats:
        """Counts a gather; the lock is held."""
        stats = count_gather(len(self.classes), requests, found, missed, inserted)
        if missed:
            for one in found:
                one.learn()
        for kind, n, m in zip(self.classes, stats.class_accesses, stats.class_misses, strict=True):
            kind.count(n, m)
        self._gathers += 1
        if self._gathers % HIT_SAMPLE == 0:
            for request in requests:
                if request.ids.device.type == "cpu":
                    keys = request.ids.numpy() + request.table.first_key
                    request.kind.counts.note(keys, HIT_SAMPLE)
        return stats

    def _drain(self, budget_us: float, *, rebalancing: bool) -> Emptied:
        """Empties extents, slice by slice; others may take the lock in between."""
        end_s = self._clock_s() + budget_us * 1e-6
        released = []
        handed_over = 0
        with self._span():
            while True:
                begun_s = self._clock_s()
                with self._lock:
                    self._order_streams()
                    part = self._extents.drain_slice(SLICE_SLOTS, rebalancing=rebalancing)
                if part is None:
                    break
                released.append(part.released)
                handed_over += part.handed_over
                now_s = self._clock_s()
                if now_s + (now_s - begun_s) > end_s:
                    break
        return Emptied(np.concatenate([np.empty(0, np.int32), *released]), handed_over)

    @contextmanager
    def _reading(self) -> Iterator[int]:
        """Registers a reader of stores, so that it takes over what is pushed meanwhile."""
        with self._lock:
            ticket = self._pushes.begin_read()
        try:
            yield ticket
        finally:
            with self._lock:
                self._pushes.end_read(ticket)

    @contextmanager
    def _span(self) -> Iterator[None]:
        """What may read extents, as the pool's fences see it."""
        epoch = self._clock.begin(Lane.EMB)
        try:
            yield
        finally:
            self._clock.end(Lane.EMB, epoch)

    def _order_streams(self) -> None:
        """Makes what the caller queues next on the arena come after all this cache has queued."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if self._last_stream is not None and self._last_stream != stream:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream

    def _table(self, name: str) -> tuple[EmbClass, Table]:
        try:
            return self._tables[name]
        except KeyError:
            known = ", ".join(map(repr, self._tables))
            raise ValueError(f"table {name!r} does not exist; there are {known}") from None

    def _request(
        self, name: str, ids: torch.Tensor, out: Mapping[str, torch.Tensor] | None
    ) -> RowRequest:
        kind, table = self._table(name)
        return row_request(kind, table, ids.contiguous(), out)
