"""How public data sets write their logs: which columns hold time, user and item.

* Taobao UserBehavior: `UserBehavior.csv` without a header: user, item, category, behaviour, Unix s.
* Amazon Reviews: 2014/2018 ratings (`.csv` without a header: user and item first, then rating and
  Unix s; 2018 has the item first) and reviews (`.json.gz`, one object per line: reviewerID, asin,
  unixReviewTime); 2023 (`.csv` with a header: user_id, parent_asin, rating, timestamp in ms; or
  `.jsonl`).
* KuaiRand: `log_*.csv` with a header: user_id, video_id, …, time_ms.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Final

from hbm_load.errors import LogError
from hbm_load.reader import LogColumns

FORMATS: Final = ("taobao", "amazon", "kuairand")
_TAOBAO: Final = LogColumns(
    "timestamp", "user", "item", "s", ("user", "item", "category", "behavior", "timestamp")
)
_KUAIRAND: Final = LogColumns("time_ms", "user_id", "video_id", "ms")
_AMAZON_REVIEWS: Final = LogColumns("unixReviewTime", "reviewerID", "asin", "s")
_AMAZON_2023: Final = LogColumns("timestamp", "user_id", "parent_asin", "ms")
_AMAZON_USER_FIRST: Final = LogColumns(
    "timestamp", "user", "item", "s", ("user", "item", "rating", "timestamp")
)
_AMAZON_ITEM_FIRST: Final = _AMAZON_USER_FIRST._replace(
    header=("item", "user", "rating", "timestamp")
)
_ASIN_CHARACTERS: Final = 10
"""An item's name (ASIN) always has so many; a reviewer's is longer."""


def columns_of(log_format: str, path: Path) -> LogColumns:
    """Columns of a file of one of `FORMATS`. Raises LogError for what it does not know."""
    if log_format == "taobao":
        return _TAOBAO
    if log_format == "kuairand":
        return _KUAIRAND
    if log_format == "amazon":
        return _amazon(path)
    raise LogError(f"format {log_format!r} is not known; use one of: {', '.join(FORMATS)}")


def _amazon(path: Path) -> LogColumns:
    first = _first_line(path)
    if first.lstrip().startswith("{"):
        try:
            names = json.loads(first)
        except ValueError as error:
            raise LogError(f"{path}: line 1 is not a JSON object") from error
        return _AMAZON_REVIEWS if "reviewerID" in names else _AMAZON_2023
    fields = first.strip().split(",")
    if "user_id" in fields:
        return _AMAZON_2023
    if len(fields) != 4:
        raise LogError(
            f"{path}: line 1 has {len(fields)} fields; ratings of Amazon Reviews have 4 "
            "(user, item, rating, time), or a header with user_id"
        )
    item_first = len(fields[0]) == _ASIN_CHARACTERS and len(fields[1]) > _ASIN_CHARACTERS
    return _AMAZON_ITEM_FIRST if item_first else _AMAZON_USER_FIRST


def _first_line(path: Path) -> str:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as stream:
            line: bytes = stream.readline(1 << 20)
    except (OSError, EOFError) as error:
        raise LogError(f"{path}: cannot be read ({error})") from error
    return line.decode("utf-8", "replace")
