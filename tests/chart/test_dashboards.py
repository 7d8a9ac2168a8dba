"""The dashboards: as their sources say, about metrics that exist, and each panel explained."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hbm_dashboards.render import DASHBOARDS, as_json

from tests.chart.metric_names import asked_for, documented
from tests.chart.rendered import CHART

FOLDER = CHART / "files" / "dashboards"
MAX_BYTES = 200_000


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return content


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            yield panel
        yield from panel.get("panels", [])


@pytest.fixture(params=DASHBOARDS)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load(request.param)


def test_the_files_are_what_the_sources_say() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == DASHBOARDS.keys()
    for name, source in DASHBOARDS.items():
        path = FOLDER / f"{name}.json"
        assert path.read_text() == as_json(source()), (
            "run `PYTHONPATH=dashboards python -m hbm_dashboards "
            "charts/hbm-partition/files/dashboards`"
        )
        assert len(path.read_bytes()) < MAX_BYTES


def test_every_query_is_about_metrics_that_exist(dashboard: dict[str, Any]) -> None:
    queries = [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]
    queries += [mark["expr"] for mark in dashboard["annotations"]["list"]]
    queries += [
        variable["query"]["query"]
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    ]
    assert queries
    for query in queries:
        names = asked_for(query)
        assert names, query
        assert names <= documented().keys(), query


def test_every_panel_is_explained_and_has_a_unit_and_levels(dashboard: dict[str, Any]) -> None:
    for panel in panels(dashboard):
        assert panel["title"], panel
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"], panel["title"]
        overrides = panel["fieldConfig"]["overrides"]
        assert panel["fieldConfig"]["defaults"].get("unit") or any(
            each["id"] == "unit" for override in overrides for each in override["properties"]
        ), panel["title"]


def test_all_read_the_chosen_data_source(dashboard: dict[str, Any]) -> None:
    assert dashboard["templating"]["list"][0]["type"] == "datasource"
    for panel in panels(dashboard):
        for place in (panel, *panel["targets"]):
            assert place["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_each_has_a_namespace_links_to_the_others_and_marks(dashboard: dict[str, Any]) -> None:
    assert "namespace" in [each["name"] for each in dashboard["templating"]["list"]]
    (link,) = dashboard["links"]
    assert (link["type"], link["includeVars"], link["keepTime"]) == ("dashboards", True, True)
    assert link["tags"] == dashboard["tags"]
    assert {mark["name"] for mark in dashboard["annotations"]["list"]} == {"Moves", "Bursts"}


def test_a_pod_of_the_fleet_leads_to_its_partition() -> None:
    (table,) = [panel for panel in panels(load("fleet")) if panel["type"] == "table"]
    (links,) = [
        each["value"]
        for override in table["fieldConfig"]["overrides"]
        for each in override["properties"]
        if each["id"] == "links"
    ]
    target = load("partition")
    variables = [each["name"] for each in target["templating"]["list"]]
    assert links[0]["url"].startswith(f"/d/{target['uid']}?")
    for name in ("datasource", "namespace", "pod"):
        assert name in variables
        assert f"var-{name}=" in links[0]["url"]


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


def test_prometheus_can_read_every_query(tmp_path: Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not here: apt-get install prometheus")
    chosen = {"$__rate_interval": "1m", "$__interval": "1m", "$namespace": "n"}
    chosen |= {"$pod": "p", "$route": "r"}
    rules = []
    for name in DASHBOARDS:
        content = load(name)
        queries = [target["expr"] for panel in panels(content) for target in panel["targets"]]
        for query in [*queries, *(mark["expr"] for mark in content["annotations"]["list"])]:
            for variable, value in chosen.items():
                query = query.replace(variable, value)
            assert "$" not in query, query
            rules.append({"record": f"checked:{len(rules)}", "expr": query})
    path = tmp_path / "queries.yaml"
    path.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    done = subprocess.run(
        [program, "check", "rules", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout
