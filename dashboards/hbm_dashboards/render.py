"""From code to JSON, the same at every run."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from hbm_dashboards import fleet, partition, router

DASHBOARDS: Final = {
    "fleet": fleet.dashboard,
    "partition": partition.dashboard,
    "router": router.dashboard,
}


def as_json(dashboard: Dashboard) -> str:
    """The dashboard as Grafana reads it; panels are numbered in their order."""
    model = dashboard.build()
    for number, panel in enumerate(model.panels or [], start=1):
        panel.id_val = number
    return JSONEncoder(indent=1, sort_keys=True, ensure_ascii=False).encode(model) + "\n"


def write(folder: Path) -> list[Path]:
    """Write each dashboard to `folder/NAME.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, dashboard in DASHBOARDS.items():
        path = folder / f"{name}.json"
        path.write_text(as_json(dashboard()))
        written.append(path)
    return written
