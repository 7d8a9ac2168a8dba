"""The kinds of panels, and those panels that several dashboards show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple, TypeVar

from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders.dashboard import ThresholdsConfig
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
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    Threshold,
    ThresholdsMode,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from hbm_dashboards.queries import (
    BYTES_PER_SECOND,
    PER_SECOND,
    RATIO,
    Query,
    rates,
    ratio,
)

SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")

HIGH: Final = 8
LOW: Final = 5
THIRD: Final = 8
HALF: Final = 12
FULL: Final = 24


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


PanelT = TypeVar("PanelT", timeseries.Panel, stat.Panel, table.Panel)


def _dressed(
    panel: PanelT, title: str, description: str, *, span: int, height: int, levels: Levels | None
) -> PanelT:
    """What every kind of panel has."""
    panel.title(title).description(description).datasource(SOURCE).span(span).height(height)
    panel.thresholds(levels.build() if levels else NO_LEVELS)
    return panel


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
        .targets(list(_targets(queries)))
        .unit(unit)
        .min(0)
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
    )
    if top is not None:
        panel.max(top)
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if levels:
        panel.thresholds_style(
            common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED)
        )
    return _dressed(panel, title, description, span=span, height=HIGH, levels=levels)


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
        .targets(list(_targets([Query(expression, title)])))
        .unit(unit)
        .graph_mode(BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    )
    if decimals is not None:
        panel.decimals(decimals)
    return _dressed(panel, title, description, span=span, height=LOW, levels=levels)


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
    panel = table.Panel().transformations(
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
    return _dressed(panel, title, description, span=FULL, height=HIGH + 2, levels=None)


def requests(selector: str, whose: str) -> stat.Panel:
    """Scored requests of model servers."""
    return figure("Requests", whose, PER_SECOND, rates("hbm_serving_ranked_total", selector))


def within_slo(selector: str) -> stat.Panel:
    """Of model servers."""
    return figure(
        "Within SLO",
        "Share of scored requests within their deadline, or within the server's SLO.",
        RATIO,
        ratio("hbm_serving_slo_met_total", "hbm_serving_ranked_total", selector),
        levels=Levels(0.99, 0.95, worse_above=False),
        decimals=2,
    )


def copies(selector: str, description: str, *, span: int = HALF) -> timeseries.Panel:
    """Bytes that cross to the device."""
    return graph(
        "Copies to the device",
        description,
        BYTES_PER_SECOND,
        Query(rates("hbm_pool_foreground_bytes_total", selector), "foreground"),
        Query(rates("hbm_pool_refill_bytes_total", selector), "refill"),
        span=span,
    )
