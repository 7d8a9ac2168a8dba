"""The time of each line of a log: one unit for the whole file, and no line far off all others.

A single absurd time would otherwise stretch the replay so far that all other requests fall into
one moment.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from hbm_load.quoting import Rejected, shortened

TimeUnit = Literal["auto", "s", "ms", "us", "ns"]

_UNIT_S: Final = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_LEAST: Final = (("ns", 1e17), ("us", 1e14), ("ms", 1e11))
_LATEST_UNIX_S: Final = 2.0**42
_FAR_RANGES: Final = 10.0
_FAR_RANGES_IN_SHORT_LOGS: Final = 1000.0
_SHORT_S: Final = 30 * 86_400.0
_FAR_AT_LEAST_S: Final = 3600.0


class WrittenTime(NamedTuple):
    """A time as it stands in a line."""

    value: float
    """Seconds of a date; of a number, in the file's unit."""
    is_number: bool
    text: str
    """For messages."""


def written_time(value: Any) -> WrittenTime:
    """Reads one cell. Raises `Rejected` for what can be no time whatever its unit."""
    shown = shortened(value)
    if isinstance(value, str):
        text = value.strip()
        try:
            value = float(text)
        except ValueError:
            try:
                value = datetime.fromisoformat(text)
            except ValueError:
                raise Rejected(f"time is {shown}, neither a number nor an ISO 8601 date") from None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        zoned = value if value.tzinfo else value.replace(tzinfo=UTC)
        seconds = (zoned - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()
        written = WrittenTime(seconds, False, shown)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        written = WrittenTime(float(value), True, shown)
    else:
        raise Rejected(f"time is {shown}, neither a number nor a date")
    if not math.isfinite(written.value):
        raise Rejected(f"time is {written.value}")
    if written.value < 0.0:
        raise Rejected(f"time is {shown}; it must be a Unix time from 0 on")
    return written


def unix_seconds(times: Sequence[WrittenTime], unit: TimeUnit) -> list[float | Rejected]:
    """Unix seconds of every line, or why the line is left out.

    With `auto` the unit is that of most numbers by their size (Unix times after 1973); numbers
    whose size says another one are left out. Dates need no unit.
    """
    chosen = unit
    if unit == "auto":
        sizes = Counter(_unit_by_size(time.value) for time in times if time.is_number)
        chosen = sizes.most_common(1)[0][0] if sizes else "s"
    placed: list[float | Rejected] = []
    for time in times:
        own = _unit_by_size(time.value) if unit == "auto" and time.is_number else chosen
        seconds = time.value * _UNIT_S[chosen] if time.is_number else time.value
        if own != chosen:
            placed.append(
                Rejected(
                    f"time is {time.text}, which would be in {own}; the file's times are in "
                    f"{chosen}"
                )
            )
        elif seconds > _LATEST_UNIX_S:
            placed.append(Rejected(f"time is {time.text}; it is later than any Unix time"))
        else:
            placed.append(seconds)
    return _without_outliers(times, placed)


def _unit_by_size(value: float) -> TimeUnit:
    for name, least in _LEAST:
        if value >= least:
            return name  # type: ignore[return-value]
    return "s"


def _without_outliers(
    times: Sequence[WrittenTime], placed: list[float | Rejected]
) -> list[float | Rejected]:
    """A time is an outlier when it lies further than ten interquartile ranges from the middle half
    of all times; within a month of it, a thousand (a busy hour may be followed by quiet weeks)."""
    seconds = np.array([value for value in placed if isinstance(value, float)])
    if len(seconds) == 0:
        return placed
    low, high = (float(value) for value in np.percentile(seconds, (25, 75)))
    spread_s = high - low
    short_s = min(_SHORT_S, _FAR_RANGES_IN_SHORT_LOGS * spread_s)
    far_s = max(_FAR_AT_LEAST_S, short_s, _FAR_RANGES * spread_s)
    return [
        Rejected(f"time is {time.text}, more than {far_s:.0f} s away from the other times")
        if isinstance(value, float) and not low - far_s <= value <= high + far_s
        else value
        for time, value in zip(times, placed, strict=True)
    ]
