"""What the dashboards have in common: variables, links, marks, rows of panels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from grafana_foundation_sdk.builders import stat, table, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    AnnotationQuery,
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    Row,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    VariableRefresh,
    VariableSort,
)

from hbm_dashboards.panels import SOURCE

TAG: Final = "hbm-partition"


def section(
    board: Dashboard, title: str, *panels: timeseries.Panel | stat.Panel | table.Panel
) -> None:
    """A row of the dashboard with its panels, in reading order."""
    board.with_row(Row(title))
    for panel in panels:
        board.with_panel(panel)


def mark(name: str, expression: str, colour: str) -> AnnotationQuery:
    """Vertical lines wherever the expression has a value."""
    return (
        AnnotationQuery()
        .name(name)
        .datasource(SOURCE)
        .enable(True)
        .icon_color(colour)
        .expr(expression)
    )


def moves_and_bursts(selector: str) -> list[AnnotationQuery]:
    """When moves of α started, and when burst gates were open."""
    moves = f"increase(hbm_sidecar_moves_total{{{selector}}}[$__interval])"
    bursts = (
        "increase(hbm_sidecar_decision_reasons_total"
        f'{{{selector}, reason="GATE_OPEN"}}[$__interval])'
    )
    return [
        mark("Moves", f"sum by (namespace, pod) ({moves}) > 0", "blue"),
        mark("Bursts", f"sum by (namespace, pod) ({bursts}) > 0", "orange"),
    ]


def choice(name: str, label: str, query: str, *, multiple: bool) -> QueryVariable:
    """A variable whose values are those of a label."""
    variable = (
        QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(multiple)
        .include_all(multiple)
    )
    if multiple:
        variable.all_value(".*")
    return variable


def board(title: str, uid: str, description: str, variables: Iterable[QueryVariable]) -> Dashboard:
    """An empty dashboard with data source, variables and links to the others."""
    dashboard = (
        Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .link(
            DashboardLink("HBM Partition")
            .type(DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(False)
            .include_vars(True)
            .keep_time(True)
        )
    )
    for variable in variables:
        dashboard.with_variable(variable)
    return dashboard
