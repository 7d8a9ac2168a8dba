"""What the dashboards have in common: variables, links, kinds of panels, series of a pod."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    AnnotationQuery,
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    ThresholdsConfig,
)
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    GraphTresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

TAG: Final = "hbm-partition"
SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")

RATIO: Final = "percentunit"
SECONDS: Final = "s"
PER_SECOND: Final = "reqps"
EVENTS: Final = "cps"
BYTES: Final = "bytes"
BYTES_PER_SECOND: Final = "Bps"
COUNT: Final = "short"

HIGH: Final = 8
LOW: Final = 5
THIRD: Final = 8
HALF: Final = 12
FULL: Final = 24


class Query(NamedTuple):
    """A PromQL expression and what its series are called."""

    expression: str
    legend: str


class Levels(NamedTuple):
    """Where a value turns from good to doubtful to bad. `worse_above`: high values are bad."""

    doubtful: float
    bad: float
    worse_above: bool = True

    def build(self) -> ThresholdsConfig:
        first, last = ("green", "red") if self.worse_above else ("red", "green")
        low, high = sorted((self.doubtful, self.bad))
        return (
            ThresholdsConfig()
            .mode(ThresholdsMode.ABSOLUTE)
            .steps([Threshold(None, first), Threshold(low, "orange"), Threshold(high, last)])
        )


NO_LEVELS: Final = ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps([Threshold(None, "blue")])


def quantile(share: float, histogram: str, selector: str, by: str = "") -> str:
    """Quantile of a histogram's increase over the rate interval."""
    labels = f"le, {by}" if by else "le"
    rate = f"rate({histogram}_bucket{{{selector}}}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by ({labels}) ({rate}))"


def ratio(part: str, whole: str, selector: str, by: str = "") -> str:
    """Share of one counter's increase in another's; 0 while there is none."""
    over = f" by ({by})" if by else ""
    upper = f"sum{over} (rate({part}{{{selector}}}[$__rate_interval]))"
    lower = f"sum{over} (rate({whole}{{{selector}}}[$__rate_interval]))"
    return f"{upper} / clamp_min({lower}, 1e-9)"


def rates(counter: str, selector: str, by: str = "") -> str:
    """Increase of a counter per second, summed."""
    over = f" by ({by})" if by else ""
    return f"sum{over} (rate({counter}{{{selector}}}[$__rate_interval]))"


def rates_or_none(counter: str, selector: str, by: str) -> str:
    """As `rates`; while nothing of it has ever happened one series called none, at 0."""
    return f'{rates(counter, selector, by)} or label_replace(vector(0), "{by}", "none", "", "")'


def _targets(queries: Iterable[Query]) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery()
        .expr(query.expression)
        .legend_format(query.legend)
        .range()
        .datasource(SOURCE)
        .ref_id(chr(ord("A") + index))
        for index, query in enumerate(queries)
    ]


def graph(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    levels: Levels | None = None,
    stacked: bool = False,
    top: float | None = None,
    span: int = HALF,
) -> timeseries.Panel:
    """Lines over time."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(list(_targets(queries)))
        .unit(unit)
        .min(0)
        .span(span)
        .height(HIGH)
        .line_width(1)
        .fill_opacity(40 if stacked else 5)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(
            common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING)
        )
        .thresholds(levels.build() if levels else NO_LEVELS)
    )
    if top is not None:
        panel.max(top)
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if levels:
        panel.thresholds_style(
            common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED)
        )
    return panel


def figure(
    title: str,
    description: str,
    unit: str,
    expression: str,
    *,
    levels: Levels | None = None,
    span: int = 4,
    decimals: int | None = None,
) -> stat.Panel:
    """One number, with its course behind it."""
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(list(_targets([Query(expression, title)])))
        .unit(unit)
        .span(span)
        .height(LOW)
        .graph_mode(BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .thresholds(levels.build() if levels else NO_LEVELS)
    )
    if decimals is not None:
        panel.decimals(decimals)
    return panel


class Column(NamedTuple):
    """A column of a table of pods: an instant query by namespace and pod."""

    name: str
    expression: str
    unit: str


def pod_table(
    title: str, description: str, columns: Iterable[Column], link: tuple[str, str]
) -> table.Panel:
    """One row per pod, its name a link (title, address)."""
    chosen = list(columns)
    panel = (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(FULL)
        .height(HIGH + 2)
        .thresholds(NO_LEVELS)
        .transformations(
            [
                DataTransformerConfig(id_val="merge", options={}),
                DataTransformerConfig(
                    id_val="organize",
                    options={
                        "excludeByName": {"Time": True},
                        "indexByName": {"namespace": 0, "pod": 1},
                        "renameByName": {
                            f"Value #{chr(ord('A') + index)}": column.name
                            for index, column in enumerate(chosen)
                        },
                    },
                ),
            ]
        )
    )
    for index, column in enumerate(chosen):
        panel.with_target(
            prometheus.Dataquery()
            .expr(column.expression)
            .instant()
            .format(PromQueryFormat.TABLE)
            .datasource(SOURCE)
            .ref_id(chr(ord("A") + index))
        )
        panel.override_by_name(
            column.name,
            [
                DynamicConfigValue(id_val="unit", value=column.unit),
                DynamicConfigValue(id_val="decimals", value=3 if column.unit != RATIO else 1),
            ],
        )
    panel.override_by_name(
        "pod",
        [DynamicConfigValue(id_val="links", value=[{"title": link[0], "url": link[1]}])],
    )
    return panel


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
