from __future__ import annotations

import gzip
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hbm_load.errors import LogError
from hbm_load.reader import LogColumns, read_log
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

GOOD = """time,user,items
1700000000,ann,7 8
1700000001,bob,9
1700000005,ann,8|5
1700000009,bob,7;9
"""

bounded = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_visits_become_requests_with_the_history_before_them(tmp_path: Path) -> None:
    trace, report = read_log(write(tmp_path / "log.csv", GOOD), candidates=3, parts=2)
    assert report == (4, 0, (), 2, 0)
    assert len(trace) == 2
    ann, bob = trace.request(0), trace.request(1)
    assert (ann.user_id, bob.user_id) == ("ann", "bob")
    # Items are numbered as they appear: 7 -> 0, 8 -> 1, 9 -> 2, 5 -> 3.
    assert ann.items.tolist() == [0, 1]
    assert ann.timestamps.tolist() == [1_700_000_000] * 2
    assert ann.candidates[:2].tolist() == [1, 3]
    assert ann.query_time == 1_700_000_005
    assert bob.items.tolist() == [2]
    assert trace.time_s.tolist() == [0.0, 4.0]
    assert trace.labels == ("part-1", "part-2")
    assert trace.regime.tolist() == [0, 1]


def test_lines_may_come_in_any_order(tmp_path: Path) -> None:
    head, *lines = GOOD.splitlines()
    shuffled = "\n".join([head, *reversed(lines)]) + "\n"
    ordered, _ = read_log(write(tmp_path / "a.csv", GOOD), candidates=3)
    trace, _ = read_log(write(tmp_path / "b.csv", shuffled), candidates=3)
    assert [trace.user_id(i) for i in range(2)] == [ordered.user_id(i) for i in range(2)]


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("1700000000", 1_700_000_000),
        ("1700000000.5", 1_700_000_000),
        ("1700000000000", 1_700_000_000),
        ("1700000000000000", 1_700_000_000),
        ("1700000000000000000", 1_700_000_000),
        ("2023-11-14T22:13:20", 1_700_000_000),
        ("2023-11-14T23:13:20+01:00", 1_700_000_000),
        ("2023-11-14 22:13:20Z", 1_700_000_000),
    ],
)
def test_times_of_every_kind(tmp_path: Path, written: str, seconds: int) -> None:
    text = f"time,user,items\n{written},a,1\n{written},a,2\n"
    trace, _ = read_log(write(tmp_path / "log.csv", text))
    assert trace.request(0).query_time == seconds


def test_columns_can_have_other_names_and_order(tmp_path: Path) -> None:
    text = "who,what,extra,when\nu,1,x,5000\nu,2,x,6000\n"
    columns = LogColumns(time="when", user="who", items="what", time_unit="ms")
    trace, _ = read_log(write(tmp_path / "log.csv", text), columns)
    assert trace.request(0).query_time == 6


def test_compressed_and_tab_separated_logs(tmp_path: Path) -> None:
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(GOOD.encode()))
    zipped, _ = read_log(path)
    tabbed, _ = read_log(write(tmp_path / "log.tsv", GOOD.replace(",", "\t")))
    np.testing.assert_array_equal(zipped.candidates, tabbed.candidates)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("soon,ann,1", "line 6: time is 'soon', neither a number nor an ISO 8601 date"),
        ("-5,ann,1", "line 6: time is '-5'; it must be a Unix time from 0 on"),
        ("nan,ann,1", "line 6: time is nan"),
        ("1700000000,,1", "line 6: user has 0 bytes; 1 to 256 are possible"),
        ("1700000000," + "x" * 257 + ",1", "line 6: user has 257 bytes"),
        ("1700000000,a\x01b,1", "line 6: user is 'a\\x01b'; it must be printable"),
        ("1700000000,ann,", "line 6: items is empty"),
        ('1700000000,ann,"[1, {}]"', "line 6: items holds {}"),
        ('1700000000,ann,"[1, "', "line 6: items is '[1,', not a JSON list"),
        ("1700000000,ann", "line 6: has 2 fields, the header 3"),
        ('1700000000,"ann,1', "line 6: is not CSV"),
        ("1700000000,ann,1\0", "line 6: holds a NUL byte"),
    ],
)
def test_a_bad_line_is_counted_quoted_and_costs_no_other(
    tmp_path: Path, line: str, said: str
) -> None:
    text = GOOD + line + "\n1700000010,ann,5\n"
    trace, report = read_log(write(tmp_path / "log.csv", text), candidates=3)
    assert (report.lines, report.rejected) == (6, 1)
    assert report.quoted[0].startswith(said)
    assert len(trace) == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "1700000000000000,ann,6",
            "line 6: time is '1700000000000000', which would be in us; the file's times are in s",
        ),
        ("99999999999,ann,6", "line 6: time is '99999999999', more than 8000 s away from the"),
        ("0,ann,6", "line 6: time is '0', more than 5000 s away from the other times"),
        ("9999-12-31,ann,6", "line 6: time is '9999-12-31', more than 8000 s away from the"),
        ("1e300,ann,6", "line 6: time is '1e300', which would be in ns; the file's times are in s"),
    ],
)
def test_one_absurd_time_does_not_stretch_the_replay(tmp_path: Path, line: str, said: str) -> None:
    trace, report = read_log(write(tmp_path / "log.csv", GOOD + line + "\n"), candidates=3)
    assert report.rejected == 1
    assert report.quoted[0].startswith(said)
    assert trace.duration_s == 4.0


def test_all_numbers_of_a_file_have_one_unit(tmp_path: Path) -> None:
    """Milliseconds from early 1973 on are as large as seconds of the far future."""
    times = [99_999_999_000 + 500 * i for i in range(2)] + [
        100_000_000_000 + 500 * i for i in range(6)
    ]
    lines = [f"{time},ann,{i}" for i, time in enumerate(times)]
    text = "\n".join(["time,user,items", *lines]) + "\n"
    columns = LogColumns(time_unit="ms")
    trace, report = read_log(write(tmp_path / "log.csv", text), columns)
    assert (report.rejected, trace.duration_s) == (0, 3.5 - 0.5)
    guessed, report = read_log(write(tmp_path / "log.csv", text))
    assert report.rejected == 2
    assert guessed.duration_s == 2.0


def test_a_quiet_tail_of_days_after_a_busy_hour_is_kept(tmp_path: Path) -> None:
    busy = [1_700_000_000 + 12 * i for i in range(300)]
    quiet = [1_700_000_000 + 86_400 * day for day in (1, 2, 3)]
    lines = [f"{time},u{i % 5},{i % 11}" for i, time in enumerate([*busy, *quiet])]
    text = "\n".join(["time,user,items", *lines]) + "\n"
    _, report = read_log(write(tmp_path / "log.csv", text))
    assert report.rejected == 0


def test_bytes_that_are_not_text_are_one_bad_line(tmp_path: Path) -> None:
    raw = GOOD.encode() + b"1700000000,\xff\xfe,1\n"
    _, report = read_log(write(tmp_path / "log.csv", raw))
    assert report.quoted == ("line 6: is not UTF-8 at byte 11",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1 has no column 'time'"),
        ("a,b,c\n1,2,3\n", "has no column 'time' (it has: a, b, c)"),
        ("time,user,items\n", "no usable line among 0"),
        ("time,user,items\nx,a,1\ny,a,1\n1,a,1\n", "2 of 3 lines cannot be used; line 2: time"),
        ("time,user,items\n1,a,1\n2,b,1\n", "no user appears twice"),
    ],
)
def test_a_hopeless_file_is_an_error_that_says_why(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(LogError) as error:
        read_log(write(tmp_path / "log.csv", text))
    assert said in str(error.value)


def test_a_missing_or_truncated_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"nowhere\.csv: cannot be read"):
        read_log(tmp_path / "nowhere.csv")
    cut = gzip.compress(GOOD.encode())[:-10]
    with pytest.raises(LogError, match="is it a complete file"):
        read_log(write(tmp_path / "cut.csv.gz", cut))


def test_parquet_with_lists_and_dates(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    moment = datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    table = pyarrow.table(
        {
            "time": [moment, moment, None, moment],
            "user": [1, 2, 1, 1],
            "items": [[5, 6], [6], [6], [7]],
        }
    )
    pyarrow.parquet.write_table(table, path)
    trace, report = read_log(path)
    assert report.quoted == ("line 3: time is None, neither a number nor a date",)
    assert trace.request(0).user_id == "1"
    assert trace.request(0).items.tolist() == [0, 1]
    assert trace.request(0).query_time == 1_700_000_000


def test_parquet_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"when": [1], "user": ["a"], "items": [1]}), path)
    with pytest.raises(LogError, match=r"no column 'time' \(it has: when, user, items\)"):
        read_log(path)


def test_items_beyond_the_catalogue_share_rows_and_are_counted(tmp_path: Path) -> None:
    trace, report = read_log(write(tmp_path / "log.csv", GOOD), catalogue=3, candidates=2)
    assert report.folded_items == 1
    assert trace.candidates.max() < 3


def test_a_log_of_days_is_replayed_in_seconds(tmp_path: Path) -> None:
    lines = [f"{1_700_000_000 + 3600 * i},u{i % 5},{i % 11}" for i in range(500)]
    trace, _ = read_log(write(tmp_path / "log.csv", "time,user,items\n" + "\n".join(lines)))
    fast = trace.compressed(20.0, 10.0)
    assert len(fast) == 200
    assert fast.duration_s == pytest.approx(20.0, rel=0.02)
    assert fast.request(17).user_id == trace.request(17).user_id
    # What is cut off takes no part with it: those that are named have requests.
    assert np.bincount(fast.regime, minlength=len(fast.labels)).min() >= 66
    assert 90 <= fast.settled.sum() <= 110


@bounded
@given(raw=st.binary(max_size=400))
def test_any_bytes_are_a_trace_or_a_log_error(tmp_path: Path, raw: bytes) -> None:
    for name in ("fuzz.csv", "fuzz.parquet", "fuzz.csv.gz"):
        with pytest.raises(LogError):
            read_log(write(tmp_path / name, raw))


@bounded
@given(
    cells=st.lists(
        st.tuples(
            st.one_of(st.text(max_size=12), st.integers(0, 10**19).map(str)),
            st.text(max_size=12),
            st.text(max_size=20),
        ),
        max_size=20,
    )
)
def test_any_cells_beside_good_lines_leave_the_good_ones(
    tmp_path: Path, cells: list[tuple[str, str, str]]
) -> None:
    """However broken other lines are, the users of the good lines get their requests."""
    good = [f"{1_700_000_000 + i},good{i % 3},{i}" for i in range(30)]
    bad = [",".join(row).replace("\n", " ").replace("\r", " ") for row in cells]
    text = "\n".join(["time,user,items", *good, *bad]) + "\n"
    path = write(tmp_path / "mixed.csv", text.encode("utf-8", "surrogatepass"))
    trace, report = read_log(path)
    users = [trace.user_id(index) for index in range(len(trace))]
    assert sum(user.startswith("good") for user in users) == 27
    assert report.lines - report.rejected == len(trace) + report.first_visits


@bounded
@given(data=st.data())
def test_a_parquet_file_with_flipped_bytes_never_crashes(tmp_path: Path, data) -> None:
    table = pyarrow.table(
        {"time": [1.0 * i for i in range(40)], "user": ["a", "b"] * 20, "items": [[1, 2]] * 40}
    )
    path = tmp_path / "log.parquet"
    pyarrow.parquet.write_table(table, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    write(path, bytes(raw))
    try:
        trace, _ = read_log(path)
    except LogError:
        return
    for index in range(len(trace)):
        assert trace.request(index).candidates.max() < trace.catalogue
