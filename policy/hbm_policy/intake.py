"""From control block records to a `Reading`, in a few µs.

A record is unpacked in one call over its raw bytes: reading field by field through numpy costs a
microsecond each three fields. The caller owns the records and refreshes them in place.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.records import (
    CURVES,
    INTENT,
    MAX_CLASSES,
    MAX_CURVE_POINTS,
    TELEMETRY,
    ServerInfo,
)

from hbm_policy.reading import Curve, Reading, Traffic

_CODES: Final = {"<i8": "q", "<u8": "Q", "<f8": "d"}


class Fields:
    """Unpacks chosen fields of a record dtype, in the order of the names."""

    def __init__(self, dtype: np.dtype[Any], names: Sequence[str]) -> None:
        """Raises ValueError for a field whose type has no packed code."""
        fields: Mapping[str, Any] = dtype.fields or {}
        offsets = [(fields[name][1], fields[name][0], name) for name in names]
        if offsets != sorted(offsets, key=lambda each: each[0]):
            raise ValueError(f"fields {list(names)} are not in the order of the record")
        layout, end = "<", 0
        for offset, kind, name in offsets:
            base, shape = kind.subdtype or (kind, ())
            code = _CODES.get(base.str)
            if code is None:
                raise ValueError(f"field {name} of type {base} cannot be unpacked")
            count = int(np.prod(shape, dtype=int))
            layout += f"{offset - end}x{count}{code}" if offset > end else f"{count}{code}"
            end = offset + kind.itemsize
        self.unpack_from = struct.Struct(layout).unpack_from


_TELEMETRY: Final = Fields(
    TELEMETRY,
    (
        "monotonic_ns",
        "boot_epoch",
        "alpha",
        "alpha_target",
        "command_generation",
        "moving",
        "requests",
        "draining",
        "emb_accesses",
        "class_extents",
        "refill_backlog_rows",
        "link_busy",
    ),
)
_TRAFFIC: Final = Fields(TELEMETRY, Traffic._fields)
_INTENT: Final = Fields(
    INTENT,
    (
        "mode",
        "alpha_min",
        "alpha_max",
        "alpha_fixed",
        "slo_ms",
        "refill_bytes_per_s",
        "alpha_initial",
    ),
)
_CURVES: Final = Fields(
    CURVES,
    ("monotonic_ns", "boot_epoch", "points", "requests", "requests_lost", "warm"),
)
_unpack_telemetry: Final = _TELEMETRY.unpack_from
_unpack_traffic: Final = _TRAFFIC.unpack_from
_unpack_intent: Final = _INTENT.unpack_from
_unpack_curves: Final = _CURVES.unpack_from
_ALPHA_AT: Final = int(CURVES.fields["alpha"][1]) if CURVES.fields else 0
_COST_AT: Final = int(CURVES.fields["cost_ms"][1]) if CURVES.fields else 0
_KV_HIT_AT: Final = int(CURVES.fields["kv_hit_ratio"][1]) if CURVES.fields else 0
_EMB_MISS_AT: Final = int(CURVES.fields["emb_miss_ratio"][1]) if CURVES.fields else 0
_HEAD_BYTES: Final = _ALPHA_AT
"""Everything before the columns."""
_POINTS: Final = [
    struct.Struct(f"<{points}d").unpack_from for points in range(MAX_CURVE_POINTS + 1)
]
_NOTHING_SEEN: Final = (0, 0, 0.0, 0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0)
_NOTHING_ASKED: Final = (None, 0.0, 1.0, 0.0, 0.0, 0.0, math.nan)
_NO_COUNTS: Final = (0,) * len(Traffic._fields)


_new: Final = tuple.__new__
"""Makes a NamedTuple from its fields in order, in half the time of its own constructor."""


def _raw(record: npt.NDArray[Any]) -> memoryview:
    """Bytes of one contiguous record, which follow it when it is refreshed in place."""
    return record.reshape(1).view(np.uint8).data


class Intake:
    """Reads one server's records. A new boot of the server needs a new one (its info changes)."""

    def __init__(self, info: ServerInfo) -> None:
        self._extents = info.extents
        self._bounds = (info.alpha_min, info.alpha_max)
        self._pool_bytes = info.extents * info.extent_bytes
        self._slo_ms = info.slo_ms
        rows = [each.rows_per_extent for each in info.classes]
        self._rows_per_extent = (*rows, *([0] * (MAX_CLASSES - len(rows))))
        self._telemetry: npt.NDArray[Any] | None = None
        self._intent: npt.NDArray[Any] | None = None
        self._curves: npt.NDArray[Any] | None = None
        self._raw_telemetry = self._raw_intent = self._raw_curves = memoryview(b"")
        self._known_head = b""
        self._known_curve = _curve(memoryview(bytes(CURVES.itemsize)), ())

    def reading(
        self,
        now_ns: int,
        boot_epoch: int,
        telemetry: npt.NDArray[Any] | None,
        intent: npt.NDArray[Any] | None,
        curves: npt.NDArray[Any] | None,
    ) -> Reading:
        """One reading of records of dtypes TELEMETRY, INTENT and CURVES.

        `boot_epoch` is that of the mapped file (0: none). None: that record was never read.
        """
        if telemetry is None:
            seen: tuple[Any, ...] = _NOTHING_SEEN
            counted: tuple[Any, ...] = _NO_COUNTS
        else:
            # The bytes are taken once per array: that costs more than reading all of them.
            if telemetry is not self._telemetry:
                self._raw_telemetry, self._telemetry = _raw(telemetry), telemetry
            seen = _unpack_telemetry(self._raw_telemetry)
            counted = _unpack_traffic(self._raw_telemetry)
        if intent is None:
            wish: tuple[Any, ...] = _NOTHING_ASKED
        else:
            if intent is not self._intent:
                self._raw_intent, self._intent = _raw(intent), intent
            wish = _unpack_intent(self._raw_intent)
        curve: Curve | None = None
        if curves is not None:
            if curves is not self._curves:
                self._raw_curves, self._curves = _raw(curves), curves
            curve = self._curve(self._raw_curves)
        (
            monotonic_ns,
            epoch,
            alpha,
            alpha_target,
            generation,
            moving,
            requests,
            draining,
            accesses,
            extents_0,
            extents_1,
            extents_2,
            extents_3,
            backlog,
            link_busy,
        ) = seen
        rows_0, rows_1, rows_2, rows_3 = self._rows_per_extent
        low, high = self._bounds
        mode, alpha_min, alpha_max, alpha_fixed, slo_ms, refill, alpha_initial = wish
        return _new(
            Reading,
            (
                now_ns,
                boot_epoch,
                monotonic_ns,
                epoch,
                alpha,
                alpha_target,
                generation,
                moving != 0,
                draining != 0,
                requests,
                accesses,
                extents_0 * rows_0 + extents_1 * rows_1 + extents_2 * rows_2 + extents_3 * rows_3,
                backlog,
                link_busy,
                self._extents,
                low,
                high,
                mode,
                alpha_min,
                alpha_max,
                alpha_fixed,
                refill,
                curve,
                alpha_initial,
                self._pool_bytes,
                slo_ms or self._slo_ms,
                _new(Traffic, counted),
            ),
        )

    def _curve(self, raw: memoryview) -> Curve:
        """The curve of before where its stamp, epoch and counts are: most ticks see it again."""
        head = raw[:_HEAD_BYTES].tobytes()
        if head != self._known_head:
            self._known_curve = _curve(raw, self._known_curve.alpha)
            self._known_head = head
        return self._known_curve


def read_curve(record: npt.NDArray[Any]) -> Curve:
    """The part of a record of dtype CURVES that a decision needs."""
    return _curve(_raw(record), ())


def _curve(raw: memoryview, known_alpha: tuple[float, ...]) -> Curve:
    """Impossible numbers of points or costs give an empty curve, which the anchor refuses.

    Candidates that are those of the curve before are the same tuple: they are compared here, once.
    """
    monotonic_ns, boot_epoch, points, requests, lost, warm = _unpack_curves(raw)
    packed = _POINTS[points if 0 <= points <= MAX_CURVE_POINTS else 0]
    alpha = packed(raw, _ALPHA_AT)
    cost_ms = packed(raw, _COST_AT)
    if alpha == known_alpha:
        alpha = known_alpha
    # A NaN anywhere makes the sum one, and every comparison with it false.
    if not cost_ms or not 0.0 < min(cost_ms) <= sum(cost_ms) < math.inf:
        alpha = cost_ms = ()
        packed = _POINTS[0]
    kv_hit, emb_miss = packed(raw, _KV_HIT_AT), packed(raw, _EMB_MISS_AT)
    return _new(
        Curve, (monotonic_ns, boot_epoch, requests, lost, warm, alpha, cost_ms, kv_hit, emb_miss)
    )
