"""Logs as the public data sets write them."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hbm_load.errors import LogError
from hbm_load.reader import read_log
from hbm_load.reader_formats import columns_of

TAOBAO = "1,2268318,2520377,pv,1511544070\n1,2333346,2520771,pv,1511561733\n1,7,9,buy,1511561800\n"
RATINGS_2018 = (
    "B000000001,A1YS9MDZP93857,5.0,1151884800\nB000000002,A1YS9MDZP93857,4.0,1151984800\n"
)
RATINGS_2014 = (
    "A1YS9MDZP93857,B000000001,5.0,1151884800\nA1YS9MDZP93857,B000000002,4.0,1151984800\n"
)
REVIEWS = (
    '{"reviewerID": "A1", "asin": "B000000001", "overall": 5.0, "unixReviewTime": 1151884800}\n'
    '{"reviewerID": "A1", "asin": "B000000002", "overall": 5.0, "unixReviewTime": 1151984800}\n'
)
RATINGS_2023 = (
    "user_id,parent_asin,rating,timestamp\nA1,B1,5.0,1588615855070\nA1,B2,5.0,1588615955070\n"
)
KUAIRAND = (
    "user_id,video_id,date,hourmin,time_ms,is_click\n"
    "0,34,20220408,200,1649354400000,1\n0,55,20220408,201,1649354460000,0\n"
)


@pytest.mark.parametrize(
    ("log_format", "name", "text", "requests", "span_s"),
    [
        ("taobao", "UserBehavior.csv", TAOBAO, 2, 67.0),
        ("amazon", "Books.csv", RATINGS_2018, 1, 0.0),
        ("amazon", "ratings_Books.csv", RATINGS_2014, 1, 0.0),
        ("amazon", "Books.json.gz", REVIEWS, 1, 0.0),
        ("amazon", "Books.jsonl", REVIEWS, 1, 0.0),
        ("amazon", "Video_Games.csv", RATINGS_2023, 1, 0.0),
        ("kuairand", "log_standard.csv", KUAIRAND, 1, 0.0),
    ],
)
def test_a_data_set_is_read_as_it_was_published(
    tmp_path: Path, log_format: str, name: str, text: str, requests: int, span_s: float
) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    found = read_log(path, columns_of(log_format, path), candidates=4)
    assert found.report.rejected == 0
    assert len(found.trace) == requests
    assert found.trace.duration_s == pytest.approx(span_s)
    # The first visit only starts the history; from then on it grows by one item a visit.
    assert found.trace.history_length.tolist() == list(range(1, requests + 1))


def test_lines_that_are_no_objects_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "Books.json"
    path.write_text(REVIEWS + "[1]\nnonsense\n" + REVIEWS.replace("A1", "A2"))
    found = read_log(path, columns_of("amazon", path), candidates=4)
    assert found.report.rejected == 2
    assert found.report.quoted[0].startswith("line 3: is not a JSON object")


def test_what_is_no_file_of_a_data_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n")
    with pytest.raises(LogError, match="line 1 has 2 fields"):
        columns_of("amazon", path)
    with pytest.raises(LogError, match="taobao, amazon, kuairand"):
        columns_of("netflix", path)
    with pytest.raises(LogError, match="cannot be read"):
        columns_of("amazon", tmp_path / "none.csv")
