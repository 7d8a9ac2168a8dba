"""All finished cells as one table: Parquet and JSON, for whoever wants to compute on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_tables(cells: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """`results.parquet`: a row per cell and regime ("" is pooled). `results.json`: everything."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = [row for cell in cells for row in _rows(cell)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = arrow.table({name: [row.get(name) for row in rows] for name in names})
    partial = folder / "results.parquet.part"
    parquet.write_table(table, partial, compression="zstd")
    partial.replace(folder / "results.parquet")
    text = folder / "results.json.part"
    text.write_text(json.dumps(list(cells)), encoding="utf-8")
    text.replace(folder / "results.json")


def _rows(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    head = {**cell["scene"], "arm": cell["arm"]}
    whole = {
        name: value
        for name, value in cell.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    pooled = {**head, "regime": "", **cell["pooled"], **whole}
    return [pooled, *({**head, "regime": name, **each} for name, each in cell["regimes"].items())]
