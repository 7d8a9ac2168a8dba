"""A user's own access log (time, user, items; CSV or Parquet) as a trace.

A line that cannot be used is left out, counted, and the first few are quoted with their number.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hbm_load.errors import LogError
from hbm_load.histories import StoredHistories
from hbm_load.log_times import TimeUnit, WrittenTime, unix_seconds, written_time
from hbm_load.quoting import Rejected, shortened
from hbm_load.trace import Trace, earlier_sum, equal_parts

_QUOTED = 10
_MAX_LINE_BYTES = 4 << 20
_MAX_ITEMS_PER_LINE = 100_000


class LogColumns(NamedTuple):
    """Names of the columns of a log, and how its time is written."""

    time: str = "time"
    """Number (`time_unit`) or ISO 8601 text; text without a zone is UTC."""
    user: str = "user"
    items: str = "items"
    """One item, or several: separated by spaces, `|`, `;` or `,`, or a JSON (Parquet: any) list."""
    time_unit: TimeUnit = "auto"
    """`auto` tells s, ms, us and ns apart by the size of most times (Unix times after 1973)."""
    header: tuple[str, ...] = ()
    """Names of all columns of a text file whose first line does not name them. (): it does."""


DEFAULT_COLUMNS = LogColumns()


class LogReport(NamedTuple):
    """What became of the lines."""

    lines: int
    rejected: int
    quoted: tuple[str, ...]
    """`line 17: …` for the first rejected ones."""
    first_visits: int
    """Accepted lines that only start a user's history: there is nothing to rank for them yet."""
    folded_items: int
    """Distinct items beyond the catalogue; they share rows with others."""


class LogTrace(NamedTuple):
    trace: Trace
    report: LogReport


class _Line(NamedTuple):
    number: int
    time: WrittenTime
    user: str
    items: tuple[str, ...]


class _Visit(NamedTuple):
    time_s: float
    user: str
    items: tuple[str, ...]


def read_log(
    path: Path,
    columns: LogColumns = DEFAULT_COLUMNS,
    *,
    catalogue: int | None = None,
    candidates: int = 64,
    parts: int = 3,
    seed: int = 0,
) -> LogTrace:
    """Reads a log; the file name ends with .csv, .csv.gz, .tsv or .parquet, or with .json, .jsonl
    or .json.gz for one JSON object per line.

    A line is one visit: its items are ranked among `candidates` in all, the others being drawn
    from the log by their frequency, and then join the user's history. Items are numbered by first
    appearance, modulo `catalogue`. The trace is cut into `parts` of equal length, its regimes.

    Raises `LogError` when the file cannot be read, a column is missing, or more than half of the
    lines are rejected.
    """
    if candidates < 1 or parts < 1:
        raise LogError(f"candidates {candidates} and parts {parts} must be at least 1")
    usable: list[_Line] = []
    rejected: list[tuple[int, str]] = []
    lines = 0
    rows = _parquet_rows if path.suffix == ".parquet" else _text_rows
    if {".json", ".jsonl"} & set(path.suffixes):
        rows = _json_rows
    try:
        for number, row in rows(path, columns):
            lines += 1
            try:
                if isinstance(row, Rejected):
                    raise row
                time, user, items = row
                usable.append(_Line(number, written_time(time), _user(user), _items(items)))
            except Rejected as reason:
                rejected.append((number, str(reason)))
    except (OSError, EOFError, zlib.error) as error:
        raise LogError(f"{path}: cannot be read ({error}); is it a complete file?") from error
    visits: list[_Visit] = []
    times = unix_seconds([line.time for line in usable], columns.time_unit)
    for line, time_s in zip(usable, times, strict=True):
        if isinstance(time_s, Rejected):
            rejected.append((line.number, str(time_s)))
        else:
            visits.append(_Visit(time_s, line.user, line.items))
    rejected.sort()
    quoted = tuple(f"line {number}: {reason}" for number, reason in rejected[:_QUOTED])
    if not visits:
        first = f"; {quoted[0]}" if quoted else ""
        raise LogError(f"{path}: no usable line among {lines}{first}")
    if len(rejected) * 2 > lines:
        raise LogError(
            f"{path}: {len(rejected)} of {lines} lines cannot be used; {quoted[0]}. "
            "Correct the file or name its columns"
        )
    trace, first_visits, folded = _trace(path.stem, visits, catalogue, candidates, parts, seed)
    return LogTrace(trace, LogReport(lines, len(rejected), quoted, first_visits, folded))


def _trace(
    name: str, visits: list[_Visit], catalogue: int | None, candidates: int, parts: int, seed: int
) -> tuple[Trace, int, int]:
    visits.sort(key=lambda visit: visit.time_s)
    names: dict[str, int] = {}
    numbers: dict[str, int] = {}
    user = np.array([names.setdefault(visit.user, len(names)) for visit in visits], dtype=np.int64)
    flat = np.array(
        [numbers.setdefault(item, len(numbers)) for visit in visits for item in visit.items],
        dtype=np.int64,
    )
    size = len(numbers) if catalogue is None else catalogue
    flat %= size
    counts = np.array([len(visit.items) for visit in visits], dtype=np.int64)
    time_s = np.array([visit.time_s for visit in visits])
    seconds = np.floor(time_s).astype(np.int64)

    owner = np.repeat(user, counts)
    by_user = np.argsort(owner, kind="stable")
    histories = StoredHistories(
        names=tuple(names),
        offsets=np.searchsorted(owner[by_user], np.arange(len(names) + 1)).astype(np.int64),
        items=flat[by_user],
        timestamps=np.repeat(seconds, counts)[by_user],
    )
    length = earlier_sum(user, counts)
    asked = np.nonzero(length > 0)[0]
    if len(asked) == 0:
        raise LogError(
            f"{name}: no user appears twice, so no request has a history; the log is too short"
        )
    starts = np.concatenate([[0], np.cumsum(counts)])
    rows = _candidates(flat, starts, counts, asked, candidates, np.random.default_rng([seed, 4]))
    part, settled = equal_parts(len(asked), parts)
    trace = Trace(
        name=name,
        seed=seed,
        catalogue=size,
        labels=tuple(f"part-{number + 1}" for number in range(parts)),
        time_s=time_s[asked] - time_s[asked[0]],
        regime=part,
        settled=settled,
        user=user[asked],
        history_length=length[asked],
        query_time=seconds[asked],
        candidate_offsets=np.arange(len(asked) + 1, dtype=np.int64) * candidates,
        candidates=rows.reshape(-1),
        histories=histories,
    )
    return trace, len(visits) - len(asked), max(0, len(numbers) - size)


def _candidates(
    flat: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    asked: npt.NDArray[np.intp],
    candidates: int,
    random: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """The visit's own items first, then others by their frequency in the log, `[n, candidates]`."""
    rows = flat[random.integers(0, len(flat), (len(asked), candidates))]
    for row, visit in enumerate(asked):
        own = flat[starts[visit] : starts[visit] + min(int(counts[visit]), candidates)]
        rows[row, : len(own)] = own
    return rows


def _text_rows(
    path: Path, columns: LogColumns
) -> Iterator[tuple[int, tuple[Any, Any, Any] | Rejected]]:
    """(line number, raw values or why not) of each line after the header."""
    opened = gzip.open if path.suffix == ".gz" else open
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    with opened(path, "rb") as stream:
        lines = enumerate(_bounded_lines(stream), start=1)
        header: list[str] | Rejected = list(columns.header)
        if not columns.header:
            _, first = next(lines, (1, b""))
            header = _split_line(first.removeprefix(b"\xef\xbb\xbf"), delimiter)
        if isinstance(header, Rejected):
            raise LogError(f"{path}: line 1: {header}; it must name the columns")
        header = [field.strip() for field in header]
        wanted = (columns.time, columns.user, columns.items)
        missing = [name for name in wanted if name not in header]
        if missing:
            raise LogError(
                f"{path}: line 1 has no column {missing[0]!r} (it has: {', '.join(header)[:200]}); "
                "name the columns of time, user and items"
            )
        places = [header.index(name) for name in wanted]
        for number, line in lines:
            if not line.strip():
                continue
            fields = _split_line(line, delimiter)
            if isinstance(fields, list):
                if len(fields) != len(header):
                    yield number, Rejected(f"has {len(fields)} fields, the header {len(header)}")
                else:
                    yield number, (fields[places[0]], fields[places[1]], fields[places[2]])
            else:
                yield number, fields


def _json_rows(
    path: Path, columns: LogColumns
) -> Iterator[tuple[int, tuple[Any, Any, Any] | Rejected]]:
    """(line number, raw values or why not) of one JSON object per line."""
    opened = gzip.open if path.suffix == ".gz" else open
    wanted = (columns.time, columns.user, columns.items)
    with opened(path, "rb") as stream:
        for number, line in enumerate(_bounded_lines(stream), start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                yield number, Rejected("is not a JSON object")
                continue
            if not isinstance(values, dict):
                yield number, Rejected("is not a JSON object")
                continue
            missing = [name for name in wanted if name not in values]
            if missing:
                yield number, Rejected(f"has no key {missing[0]!r}")
                continue
            yield number, (values[wanted[0]], values[wanted[1]], values[wanted[2]])


def _bounded_lines(stream: io.BufferedIOBase | gzip.GzipFile | Any) -> Iterator[bytes]:
    """Lines of at most `_MAX_LINE_BYTES`; the rest of a longer one is skipped."""
    while line := stream.readline(_MAX_LINE_BYTES):
        yield line
        while len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = stream.readline(_MAX_LINE_BYTES)
            if not line:
                break


def _split_line(line: bytes, delimiter: str) -> list[str] | Rejected:
    """Fields of one line. A quoted field must end on its line, so that one bad quote costs one
    line and not the rest of the file."""
    if len(line) == _MAX_LINE_BYTES:
        return Rejected(f"is longer than {_MAX_LINE_BYTES} bytes")
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return Rejected(f"is not UTF-8 at byte {error.start}")
    if "\0" in text:
        return Rejected("holds a NUL byte")
    csv.field_size_limit(_MAX_LINE_BYTES)
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True), [])
    except (csv.Error, StopIteration) as error:
        return Rejected(f"is not CSV ({error})")


def _parquet_rows(
    path: Path, columns: LogColumns
) -> Iterator[tuple[int, tuple[Any, Any, Any] | Rejected]]:
    """(row number from 1, raw values)."""
    import pyarrow
    import pyarrow.parquet

    wanted = [columns.time, columns.user, columns.items]
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in wanted if name not in names]
            if missing:
                raise LogError(
                    f"{path}: has no column {missing[0]!r} (it has: {', '.join(names)[:200]}); "
                    "name the columns of time, user and items"
                )
            number = 0
            for batch in file.iter_batches(columns=wanted):
                values = [batch.column(name).to_pylist() for name in wanted]
                for row in zip(*values, strict=True):
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LogError(f"{path}: not a readable Parquet file ({reason})") from error


def _user(value: Any) -> str:
    if value is None or isinstance(value, float | list | dict | bool):
        raise Rejected(f"user is {shortened(value)}; it must be text or a whole number")
    try:
        text = value.decode("utf-8") if isinstance(value, bytes) else str(value)
        size = len(text.strip().encode("utf-8"))
    except UnicodeError:
        raise Rejected("user is not UTF-8 text") from None
    if not 1 <= size <= 256:
        raise Rejected(f"user has {size} bytes; 1 to 256 are possible")
    if not text.isprintable():
        raise Rejected(f"user is {shortened(text)}; it must be printable to go into a header")
    return text.strip()


def _items(value: Any) -> tuple[str, ...]:
    parts: list[Any]
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            try:
                parsed = json.loads(text)
            except (ValueError, RecursionError):
                raise Rejected(f"items is {shortened(text)}, not a JSON list") from None
            parts = parsed if isinstance(parsed, list) else [parsed]
        else:
            for mark in "|;,":
                text = text.replace(mark, " ")
            parts = list(text.split())
    elif isinstance(value, list):
        parts = value
    else:
        parts = [value]
    if not parts:
        raise Rejected("items is empty")
    if len(parts) > _MAX_ITEMS_PER_LINE:
        raise Rejected(f"items has {len(parts)} entries, more than {_MAX_ITEMS_PER_LINE}")
    for part in parts:
        if not isinstance(part, int | str) or isinstance(part, bool) or part == "":
            raise Rejected(f"items holds {shortened(part)}; each must be text or a whole number")
    return tuple(str(part) for part in parts)
