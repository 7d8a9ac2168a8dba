"""The two files between a model server and its sidecar, and who may write what.

One file per side under the run directory, `server.cb` and `sidecar.cb`: opened read-write by its
owner, read-only by the peer. A region has one writer thread; a view belongs to one thread.

| region | writer -> reader | class here |
|---|---|---|
| info, telemetry, requests ring, residency ring + snapshot | server -> sidecar | `Server…` |
| command, decision ring | decide -> server, admin | `Sidecar…` |
| intent, snapshot request | admin -> decide, server | `Sidecar…` |
| curves | twin -> decide | `Sidecar…` |

A view whose file is left behind by its owner keeps the last good values: `refresh()` finds a new
file, ages tell a dead peer.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from hbm_pool.contracts import decision_log, request_ring, residency
from hbm_pool.contracts.mapped_file import (
    ControlBlockError,
    ControlBlockMismatch,
    ControlBlockMissing,
    FileLayout,
    MappedFile,
)
from hbm_pool.contracts.record_slots import SlotReader, SlotWriter, slots_bytes
from hbm_pool.contracts.records import (
    COMMAND,
    CURVES,
    DECISION,
    INTENT,
    MAX_CLASSES,
    TELEMETRY,
    RequestSample,
    ResidencyEvent,
    ResidencySnapshot,
    ServerInfo,
)

__all__ = [
    "ControlBlockError",
    "ControlBlockMismatch",
    "ControlBlockMissing",
    "ServerBlock",
    "ServerView",
    "SidecarBlock",
    "SidecarView",
    "StampedWriter",
    "age_s",
]

INFO_BYTES: Final = 1 << 16
_INFO_HEAD: Final = struct.Struct("<II")  # CRC, bytes of JSON
_WORD: Final = np.dtype([("count", "<u8")])

SERVER_LAYOUT: Final = FileLayout(
    "server.cb",
    1,
    {
        "info": INFO_BYTES,
        "telemetry": slots_bytes(TELEMETRY),
        "requests": request_ring.REGION_BYTES,
        "residency": residency.EVENTS_BYTES,
        "snapshot": residency.SNAPSHOT_BYTES,
    },
    f"{TELEMETRY.descr}",
)
SIDECAR_LAYOUT: Final = FileLayout(
    "sidecar.cb",
    2,
    {
        "command": slots_bytes(COMMAND),
        "decisions": decision_log.LOG_BYTES,
        "intent": slots_bytes(INTENT),
        "curves": slots_bytes(CURVES),
        "snapshot_request": slots_bytes(_WORD),
    },
    f"{COMMAND.descr} {DECISION.descr} {INTENT.descr} {CURVES.descr}",
)

_INFO: Final = TypeAdapter(ServerInfo)


def age_s(record: npt.NDArray[Any]) -> float:
    """Seconds since a record (any dtype with `monotonic_ns`) was written.

    Infinite for one that was never written or that claims to come from the future: it was written
    before the machine started anew.
    """
    stamp = int(record["monotonic_ns"])
    elapsed = time.monotonic_ns() - stamp
    return elapsed / 1e9 if stamp > 0 and elapsed >= 0 else math.inf


class ServerBlock:
    """The model server's own file. Writes after `close()` are dropped."""

    def __init__(self, file: MappedFile) -> None:
        self.boot_epoch = file.boot_epoch
        self._telemetry = SlotWriter(file.region("telemetry"), TELEMETRY)
        self._stamp = self._telemetry.word("monotonic_ns")
        self._epoch = self._telemetry.word("boot_epoch")
        self._residency_sequence = self._telemetry.word("residency_sequence")
        self._requests_lost = self._telemetry.word("requests_lost")
        self._requests = request_ring.RequestRingWriter(file.region("requests"))
        self._residency = residency.EventRingWriter(file.region("residency"))
        self._snapshot = residency.SnapshotWriter(file.region("snapshot"))
        self._closed = False
        self.telemetry: npt.NDArray[Any] = self._telemetry.record
        """Writable staging record, dtype TELEMETRY, shape `()`: fill it, then publish."""

    @classmethod
    def create(cls, directory: Path, info: ServerInfo) -> ServerBlock:
        """Makes `directory/server.cb` under a new boot epoch.

        `ControlBlockError` when there is no room for the file or for what `info` says: serve
        without a sidecar then.
        """
        raw = encode_info(info)

        def fill(file: MappedFile) -> None:
            file.region("info")[: len(raw)] = raw

        return cls(MappedFile.create(Path(directory), SERVER_LAYOUT, fill))

    def publish_telemetry(self) -> None:
        """Publishes the staging record, stamped with the clock, the epoch and the ring cursors."""
        if self._closed:
            return
        self._epoch[0] = self.boot_epoch
        self._residency_sequence[0] = self._residency.sequence
        self._requests_lost[0] = self._requests.lost
        self._stamp[0] = time.monotonic_ns()
        self._telemetry.write()

    def push_request(self, sample: RequestSample) -> bool:
        """Appends a request sample; False when it is too large (it is counted as lost)."""
        return not self._closed and self._requests.push(sample)

    def lose_requests(self, count: int) -> None:
        """Counts samples as lost that the server dropped before it could push them."""
        if count and not self._closed:
            self._requests.lose(count)

    def push_user_cached(self, user: int, tokens: int) -> int:
        """Says that the user has `tokens` (> 0) tokens resident now; the event's sequence."""
        return self._residency.sequence if self._closed else self._residency.push(user, tokens)

    def push_user_evicted(self, user: int) -> int:
        """Says that nothing of the user is resident any more; the event's sequence."""
        return self._residency.sequence if self._closed else self._residency.push(user, 0)

    def write_snapshot(self, snapshot: ResidencySnapshot, step: int = 4096) -> Iterator[None]:
        """Writes a snapshot `step` elements per iteration; it counts once that is exhausted."""
        return iter(()) if self._closed else self._snapshot.write(snapshot, step)

    def close(self) -> None:
        """Stops writing. The file stays: readers keep the last values and see them age."""
        self._closed = True


class _View(ABC):
    """What both views share: a mapping that is followed when its file is replaced."""

    _layout: FileLayout

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self._attach(file, first=True)

    @abstractmethod
    def _attach(self, file: MappedFile, *, first: bool) -> None:
        """Makes the readers of the regions of `file`; changes nothing when it raises."""

    @property
    def boot_epoch(self) -> int:
        """Of the file that is mapped."""
        return self._file.boot_epoch

    def refresh(self) -> bool:
        """Maps the file anew when it was replaced; True when it was.

        `ControlBlockMismatch` when the new one cannot be understood; the old mapping stays.
        """
        if not self._file.replaced():
            return False
        try:
            file = MappedFile.open(self._file.path.parent, self._layout)
        except ControlBlockMissing:
            return False
        self._attach(file, first=False)
        self._file = file
        return True


class ServerView(_View):
    """Read-only view of the server's file."""

    _layout = SERVER_LAYOUT
    info: ServerInfo
    _lost_with_file: int = 0
    _requests: request_ring.RequestRingReader

    @classmethod
    def open(cls, directory: Path) -> ServerView:
        """Maps `directory/server.cb`. `ControlBlockMissing`, `ControlBlockMismatch`."""
        return cls(MappedFile.open(Path(directory), cls._layout))

    def _attach(self, file: MappedFile, *, first: bool) -> None:
        info = decode_info(bytes(file.region("info")), file.path)
        requests = request_ring.RequestRingReader(file.region("requests"), from_start=not first)
        if not first:
            self._lost_with_file += self._requests.unread()
        self.info = info
        self._requests = requests
        self._telemetry = SlotReader(file.region("telemetry"), TELEMETRY)
        self._residency = residency.EventRingReader(file.region("residency"))
        self._snapshot = residency.SnapshotReader(file.region("snapshot"))
        self._newest_telemetry = np.zeros((), dtype=TELEMETRY)
        self._age = SlotReader(file.region("telemetry"), TELEMETRY)

    def read_telemetry(self, into: npt.NDArray[Any]) -> bool:
        """Reads the newest telemetry; False, `into` untouched, when there is none."""
        return self._telemetry.read(into)

    def telemetry_age_s(self) -> float:
        """Seconds since the server last published; infinite before the first time."""
        self._age.read(self._newest_telemetry)
        return age_s(self._newest_telemetry)

    def read_requests(self, limit: int) -> tuple[list[RequestSample], int]:
        """At most `limit` samples in order, and how many were lost since the last call.

        After `refresh()` the lost ones include what was not read from the file before.
        """
        samples, lost = self._requests.read(limit)
        lost += self._lost_with_file
        self._lost_with_file = 0
        return samples, lost

    def read_residency(self) -> tuple[list[ResidencyEvent], bool]:
        """Events in order, and whether some were lost behind them: then a snapshot is needed."""
        return self._residency.read()

    def read_snapshot(self) -> ResidencySnapshot | None:
        """The newest snapshot, once; None when there is no newer one.

        `read_residency` goes on right behind it, so events that were read before may come again:
        replace what is known by the snapshot, then apply them.
        """
        snapshot = self._snapshot.read(self.boot_epoch)
        if snapshot is not None:
            self._residency.expected = snapshot.sequence + 1
        return snapshot


class SidecarBlock:
    """The sidecar's own file: created by the supervisor, opened by its children."""

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self.boot_epoch = file.boot_epoch
        self._command = StampedWriter(file.region("command"), COMMAND)
        self._decisions = decision_log.DecisionLogWriter(file.region("decisions"))
        self._intent = StampedWriter(file.region("intent"), INTENT)
        self._curves = StampedWriter(file.region("curves"), CURVES)
        self._snapshot_request = SlotWriter(file.region("snapshot_request"), _WORD)
        self.command: npt.NDArray[Any] = self._command.record
        """Staging record of `write_command`: filled in place, it is written without a copy."""
        self.decision: npt.NDArray[Any] = self._decisions.record
        """Staging record of `push_decision`."""

    @classmethod
    def create(cls, directory: Path) -> SidecarBlock:
        """Makes `directory/sidecar.cb`, or keeps it when it is valid and of the same layout."""
        try:
            return cls.open(directory)
        except ControlBlockError:
            return cls(MappedFile.create(Path(directory), SIDECAR_LAYOUT))

    @classmethod
    def open(cls, directory: Path) -> SidecarBlock:
        """Opens the file for writing. Each process writes its own regions only."""
        return cls(MappedFile.open(Path(directory), SIDECAR_LAYOUT, writable=True))

    def replaced(self) -> bool:
        """Whether another file lies in its place: then nobody reads this one, open it anew."""
        return self._file.replaced()

    def write_command(self, record: npt.NDArray[Any]) -> None:
        """Publishes a COMMAND, stamped with the monotonic clock. decide only."""
        self._command.publish(record)

    def push_decision(self, record: npt.NDArray[Any]) -> None:
        """Appends a DECISION, stamped with the monotonic clock. decide only."""
        self._decisions.push(record)

    def write_curves(self, record: npt.NDArray[Any]) -> None:
        """Publishes CURVES, stamped with the monotonic clock. twin only."""
        self._curves.publish(record)

    def write_intent(self, record: npt.NDArray[Any]) -> None:
        """Publishes an INTENT, stamped with the monotonic clock. admin only."""
        self._intent.publish(record)

    def request_snapshot(self) -> None:
        """Asks the server for a residency snapshot. admin only."""
        self._snapshot_request.record["count"] += np.uint64(1)
        self._snapshot_request.write()


class SidecarView(_View):
    """Read-only view of the sidecar's file."""

    _layout = SIDECAR_LAYOUT

    @classmethod
    def open(cls, directory: Path) -> SidecarView:
        """Maps `directory/sidecar.cb`. `ControlBlockMissing`, `ControlBlockMismatch`."""
        return cls(MappedFile.open(Path(directory), cls._layout))

    def _attach(self, file: MappedFile, *, first: bool) -> None:
        self._command = SlotReader(file.region("command"), COMMAND)
        self._intent = SlotReader(file.region("intent"), INTENT)
        self._curves = SlotReader(file.region("curves"), CURVES)
        self._decisions = decision_log.DecisionLogReader(file.region("decisions"))
        self._snapshot_request = SlotReader(file.region("snapshot_request"), _WORD)
        self._word = np.zeros((), dtype=_WORD)

    def read_command(self, into: npt.NDArray[Any]) -> bool:
        """Reads the newest COMMAND; False, `into` untouched, when there is none.

        The caller compares `boot_epoch`: a command for another boot is not for it.
        """
        return self._command.read(into)

    def read_intent(self, into: npt.NDArray[Any]) -> bool:
        """Reads the newest INTENT; False, `into` untouched, when there is none."""
        return self._intent.read(into)

    def read_curves(self, into: npt.NDArray[Any]) -> bool:
        """Reads the newest CURVES; False, `into` untouched, when there are none."""
        return self._curves.read(into)

    def read_decisions(self, limit: int) -> npt.NDArray[Any]:
        """At most `limit` newest decisions, `[n] DECISION`, oldest first."""
        return self._decisions.read(limit)

    def snapshot_requests(self) -> int:
        """How often a snapshot was asked for, since the file was made."""
        self._snapshot_request.read(self._word)
        return int(self._word["count"])


class StampedWriter(SlotWriter):
    """A record whose `monotonic_ns` says when it was written."""

    def __init__(self, region: memoryview, dtype: np.dtype[Any]) -> None:
        super().__init__(region, dtype)
        self._stamp = self.word("monotonic_ns")

    def publish(self, record: npt.NDArray[Any]) -> None:
        """Stamps and writes a record; its own staging record without a copy."""
        self.load(record)
        self._stamp[0] = time.monotonic_ns()
        self.write()


def encode_info(info: ServerInfo) -> bytes:
    """Contents of the info region. `ControlBlockError` when no reader would accept them."""
    fault = _info_fault(info)
    if fault is not None:
        raise ControlBlockError(f"the description of the server cannot be published: {fault}")
    text = json.dumps(dataclasses.asdict(info), separators=(",", ":")).encode()
    if len(text) > INFO_BYTES - _INFO_HEAD.size:
        raise ControlBlockError(
            f"the description of the server takes {len(text)} bytes, the control block has room "
            f"for {INFO_BYTES - _INFO_HEAD.size}; use fewer or shorter table names"
        )
    return _INFO_HEAD.pack(crc32(text), len(text)) + text


def decode_info(raw: bytes, path: Path) -> ServerInfo:
    """What `encode_info` wrote. `ControlBlockMismatch` for any other bytes."""
    crc, length = _INFO_HEAD.unpack_from(raw)
    text = raw[_INFO_HEAD.size : _INFO_HEAD.size + length]
    if len(text) != length or crc32(text) != crc:
        raise ControlBlockMismatch(
            f"{path}: the description of the server is damaged; restart the server"
        )
    try:
        info = _INFO.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        fault: str | None = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    else:
        fault = _info_fault(info)
    if fault is not None:
        raise ControlBlockMismatch(
            f"{path}: the description of the server does not fit this release ({fault}); run the "
            "same release on both sides"
        )
    return info


def _info_fault(info: ServerInfo) -> str | None:
    """What a reader could not live with, in words."""
    counts = (
        "extents",
        "extent_bytes",
        "page_tokens",
        "pages_per_extent",
        "max_sequence_tokens",
        "drop_block_tokens",
    )
    for name in counts:
        if getattr(info, name) < 1:
            return f"{name} is {getattr(info, name)}; it must be at least 1"
    if info.extents > residency.MAX_USERS:
        return (
            f"the pool has {info.extents} extents, but at most {residency.MAX_USERS} resident "
            "users can be named; use larger extents"
        )
    if not 0.0 < info.sample_rate <= 1.0:
        return f"sample_rate is {info.sample_rate}; it must be in (0, 1]"
    if not 0.0 <= info.alpha_min <= info.alpha_max <= 1.0:
        return f"alpha_min {info.alpha_min} and alpha_max {info.alpha_max} are no bounds in [0, 1]"
    if not info.slo_ms > 0.0:
        return f"slo_ms is {info.slo_ms}; it must be positive"
    if len(info.classes) > MAX_CLASSES:
        return f"there are {len(info.classes)} row-width classes; {MAX_CLASSES} at most"
    for index, row_class in enumerate(info.classes):
        if row_class.row_bytes < 1 or row_class.rows_per_extent < 1:
            return f"class {index} has {row_class.row_bytes} bytes per row, " + (
                f"{row_class.rows_per_extent} rows per extent; both must be at least 1"
            )
        if not all(0 <= table < len(info.tables) for table in row_class.tables):
            return f"class {index} names tables {row_class.tables} of {len(info.tables)}"
    for table in info.tables:
        if table.rows < 1 or not 0 <= table.class_index < len(info.classes):
            return f"table {table.name} has {table.rows} rows in class {table.class_index}"
    return None
