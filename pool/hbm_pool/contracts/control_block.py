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
import time
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
    "age_s",
]

INFO_BYTES: Final = 1 << 16
_INFO_HEAD: Final = 8  # crc u32, length u32
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
        self._requests = request_ring.RequestRingWriter(file.region("requests"))
        self._residency = residency.EventRingWriter(file.region("residency"))
        self._snapshot = residency.SnapshotWriter(file.region("snapshot"))
        self._closed = False
        self.telemetry: npt.NDArray[Any] = self._telemetry.record
        """Writable staging record, dtype TELEMETRY, shape `()`: fill it, then publish."""

    @classmethod
    def create(cls, directory: Path, info: ServerInfo) -> ServerBlock:
        """Makes `directory/server.cb` under a new boot epoch.

        `ControlBlockError` when there is no room or the pool is beyond the limits of the layout:
        serve without a sidecar then.
        """
        if info.extents > residency.MAX_USERS:
            raise ControlBlockError(
                f"the pool has {info.extents} extents, the control block names at most "
                f"{residency.MAX_USERS} resident users; use larger extents"
            )
        raw = json.dumps(dataclasses.asdict(info), separators=(",", ":")).encode()
        if len(raw) > INFO_BYTES - _INFO_HEAD:
            raise ControlBlockError(
                f"the description of the server takes {len(raw)} bytes, the control block has room "
                f"for {INFO_BYTES - _INFO_HEAD}; use fewer or shorter table names"
            )

        def fill(file: MappedFile) -> None:
            head = crc32(raw).to_bytes(4, "little") + len(raw).to_bytes(4, "little")
            file.region("info")[: _INFO_HEAD + len(raw)] = head + raw

        return cls(MappedFile.create(Path(directory), SERVER_LAYOUT, fill))

    def publish_telemetry(self) -> None:
        """Publishes the staging record, stamped with the clock, the epoch and the ring cursors."""
        if self._closed:
            return
        record = self.telemetry
        record["monotonic_ns"] = time.monotonic_ns()
        record["boot_epoch"] = self.boot_epoch
        record["residency_sequence"] = self._residency.sequence
        record["requests_lost"] = self._requests.too_large
        self._telemetry.write()

    def push_request(self, sample: RequestSample) -> bool:
        """Appends a request sample; False when it is too large (it is counted as lost)."""
        return not self._closed and self._requests.push(sample)

    def push_user_cached(self, user: int, tokens: int) -> int:
        """Says that the user has `tokens` (> 0) tokens resident now; the event's sequence."""
        return self._residency.sequence if self._closed else self._residency.push(user, tokens)

    def push_user_evicted(self, user: int) -> int:
        """Says that nothing of the user is resident any more; the event's sequence."""
        return self._residency.sequence if self._closed else self._residency.push(user, 0)

    def write_snapshot(self, snapshot: ResidencySnapshot, step: int = 4096) -> Iterator[None]:
        """Writes a snapshot `step` elements per iteration; it counts once that is exhausted."""
        return self._snapshot.write(snapshot, step)

    def close(self) -> None:
        """Stops writing. The file stays: readers keep the last values and see them age."""
        self._closed = True


class _View:
    """What both views share: a mapping that is followed when its file is replaced."""

    _layout: FileLayout

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self._attach(file, first=True)

    def _attach(self, file: MappedFile, *, first: bool) -> None:
        raise AssertionError("each view attaches its own readers")

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
        info = _read_info(file)
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
        self.boot_epoch = file.boot_epoch
        self._command = SlotWriter(file.region("command"), COMMAND)
        self._decisions = decision_log.DecisionLogWriter(file.region("decisions"))
        self._intent = SlotWriter(file.region("intent"), INTENT)
        self._curves = SlotWriter(file.region("curves"), CURVES)
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

    def write_command(self, record: npt.NDArray[Any]) -> None:
        """Publishes a COMMAND, stamped with the monotonic clock. decide only."""
        _stamp(self._command, record)

    def push_decision(self, record: npt.NDArray[Any]) -> None:
        """Appends a DECISION, stamped with the monotonic clock. decide only."""
        self._decisions.push(record)

    def write_curves(self, record: npt.NDArray[Any]) -> None:
        """Publishes CURVES, stamped with the monotonic clock. twin only."""
        _stamp(self._curves, record)

    def write_intent(self, record: npt.NDArray[Any]) -> None:
        """Publishes an INTENT, stamped with the monotonic clock. admin only."""
        _stamp(self._intent, record)

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


def _stamp(writer: SlotWriter, record: npt.NDArray[Any]) -> None:
    if record is not writer.record:
        writer.load(record)
    writer.record["monotonic_ns"] = time.monotonic_ns()
    writer.write()


def _read_info(file: MappedFile) -> ServerInfo:
    raw = bytes(file.region("info"))
    length = int.from_bytes(raw[4:8], "little")
    text = raw[_INFO_HEAD : _INFO_HEAD + length]
    if len(text) != length or crc32(text) != int.from_bytes(raw[:4], "little"):
        raise ControlBlockMismatch(
            f"{file.path}: the description of the server is damaged; restart the server"
        )
    try:
        return _INFO.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ControlBlockMismatch(
            f"{file.path}: the description of the server does not fit this release "
            f"({where}: {first['msg']}); run the same release on both sides"
        ) from error
