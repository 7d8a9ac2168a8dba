"""The dashboards: as their sources say, about metrics that exist, and each panel explained."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hbm_dashboards.data import Series, asked, filled, panels
from hbm_dashboards.picture import draw, shown
from hbm_dashboards.render import DASHBOARDS, as_json
from matplotlib.image import imread

from tests.chart.metric_names import asked_for, documented
from tests.chart.rendered import CHART

FOLDER = CHART / "files" / "dashboards"
MAX_BYTES = 200_000


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return content


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


def test_every_panel_can_be_asked_and_drawn(dashboard: dict[str, Any], tmp_path: Path) -> None:
    chosen = {"namespace": "models", "pod": "rank-0", "route": "rank"}
    labels = {"namespace": "models", "pod": "rank-0", "reason": "none"}
    line = Series.of({"metric": labels, "values": [[0, "0.2"], [60, "NaN"], [120, "0.4"]]})
    assert line.points == [(0.0, 0.2), (120.0, 0.4)]
    answers = [[(one, [line]) for one in asked(panel, chosen)] for panel in panels(dashboard)]
    assert all("$" not in one.expression for panel in answers for one, _ in panel)
    draw(dashboard, answers, tmp_path / "filled.png")
    draw(dashboard, [[(one, []) for one, _ in panel] for panel in answers], tmp_path / "empty.png")
    drawn, blank = (imread(tmp_path / f"{name}.png") for name in ("filled", "empty"))
    assert drawn.shape == blank.shape
    assert (drawn != blank).any(axis=-1).mean() > 0.005


def test_a_variable_without_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\$pod"):
        filled('up{pod="$pod"}', {"namespace": "models"})


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.123456, "percentunit", "12.3 %"),
        (0.00042, "s", "420 µs"),
        (0.25, "s", "250 ms"),
        (864_000, "s", "10 d"),
        (2_500_000, "Bps", "2.5 MB/s"),
        (16.04, "reqps", "16 /s"),
        (3, "short", "3"),
    ],
)
def test_values_are_shown_as_people_read_them(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text
