"""Dashboard of the fleet: is everything as it should be, and which pods are not?"""

from __future__ import annotations

from typing import Final

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from hbm_dashboards import partition
from hbm_dashboards.layout import (
    BYTES_PER_SECOND,
    COUNT,
    EVENTS,
    PER_SECOND,
    RATIO,
    SECONDS,
    THIRD,
    Column,
    Levels,
    Query,
    board,
    choice,
    figure,
    graph,
    moves_and_bursts,
    pod_table,
    quantile,
    rates,
    rates_or_none,
    ratio,
)

UID: Final = "hbm-fleet"
_PODS: Final = 'namespace=~"$namespace"'
_BY_POD: Final = "namespace, pod"


def dashboard() -> Dashboard:
    result = board(
        "HBM Partition / Fleet",
        UID,
        "All injected pods of some namespaces, and the operator that looks after them.",
        [
            choice(
                "namespace",
                "Namespace",
                "label_values(hbm_sidecar_alpha, namespace)",
                multiple=True,
            )
        ],
    ).annotations(list(moves_and_bursts(_PODS)))
    _glance(result)
    _pods(result)
    _operator(result)
    return result


def _glance(board: Dashboard) -> None:
    board.with_row(Row("Now"))
    board.with_panel(
        figure(
            "Pods with a live server",
            "Share of injected pods whose sidecar hears the model server.",
            RATIO,
            f"avg(hbm_sidecar_server_up{{{_PODS}}})",
            levels=Levels(1, 0.9, worse_above=False),
        )
    )
    board.with_panel(
        figure(
            "Requests",
            "Requests scored per second, all pods.",
            PER_SECOND,
            rates("hbm_serving_ranked_total", _PODS),
        )
    )
    board.with_panel(
        figure(
            "P99",
            "99th percentile of scored requests over all pods, as the servers see it.",
            SECONDS,
            quantile(0.99, "hbm_serving_request_seconds", _PODS),
        )
    )
    board.with_panel(
        figure(
            "Within SLO",
            "Share of scored requests within their deadline, or within the server's SLO.",
            RATIO,
            ratio("hbm_serving_slo_met_total", "hbm_serving_ranked_total", _PODS),
            levels=Levels(0.99, 0.95, worse_above=False),
            decimals=2,
        )
    )
    board.with_panel(
        figure(
            "KV hit ratio",
            "Share of KV lookups that reused at least one page.",
            RATIO,
            ratio("hbm_pool_kv_hits_total", "hbm_pool_kv_lookups_total", _PODS),
            decimals=1,
        )
    )
    board.with_panel(
        figure(
            "Row hit ratio",
            "Share of row lookups that hit.",
            RATIO,
            ratio("hbm_pool_emb_hits_total", "hbm_pool_emb_accesses_total", _PODS),
            decimals=1,
        )
    )


def _pods(board: Dashboard) -> None:
    board.with_row(Row("Pods"))
    board.with_panel(
        pod_table(
            "Partitions",
            "One line per injected pod; its name leads to its own dashboard.",
            [
                Column("α", f"sum by ({_BY_POD}) (hbm_pool_alpha{{{_PODS}}})", RATIO),
                Column(
                    "Target", f"sum by ({_BY_POD}) (hbm_sidecar_alpha_target{{{_PODS}}})", RATIO
                ),
                Column(
                    "Best by the twin",
                    f"sum by ({_BY_POD}) (hbm_sidecar_alpha_anchor{{{_PODS}}})",
                    RATIO,
                ),
                Column(
                    "KV hits",
                    ratio("hbm_pool_kv_hits_total", "hbm_pool_kv_lookups_total", _PODS, _BY_POD),
                    RATIO,
                ),
                Column(
                    "Row hits",
                    ratio("hbm_pool_emb_hits_total", "hbm_pool_emb_accesses_total", _PODS, _BY_POD),
                    RATIO,
                ),
                Column(
                    "P99", quantile(0.99, "hbm_serving_request_seconds", _PODS, _BY_POD), SECONDS
                ),
                Column("Requests", rates("hbm_serving_ranked_total", _PODS, _BY_POD), PER_SECOND),
            ],
            (
                "Open the partition",
                f"/d/{partition.UID}?var-datasource=${{datasource}}"
                "&var-namespace=${__data.fields.namespace}&var-pod=${__data.fields.pod}",
            ),
        )
    )
    board.with_panel(
        graph(
            "α",
            "Applied α of each pod.",
            RATIO,
            Query(f"sum by ({_BY_POD}) (hbm_pool_alpha{{{_PODS}}})", "{{namespace}}/{{pod}}"),
            top=1,
            span=THIRD,
        )
    )
    board.with_panel(
        graph(
            "Distance to the best α",
            "How far the applied α of each pod is from the twin's best. Large for long: bounds, "
            "mode, or moves that are too slow.",
            RATIO,
            Query(
                f"abs(sum by ({_BY_POD}) (hbm_pool_alpha{{{_PODS}}}) - "
                f"sum by ({_BY_POD}) (hbm_sidecar_alpha_anchor{{{_PODS}}}))",
                "{{namespace}}/{{pod}}",
            ),
            levels=Levels(0.1, 0.25),
            span=THIRD,
        )
    )
    board.with_panel(
        graph(
            "P99 by pod",
            "Scored requests of each pod, from the request line to the answer.",
            SECONDS,
            Query(
                quantile(0.99, "hbm_serving_request_seconds", _PODS, _BY_POD),
                "{{namespace}}/{{pod}}",
            ),
            span=THIRD,
        )
    )
    board.with_panel(
        graph(
            "Moves",
            "Moves of α that sidecars started, per second and namespace.",
            EVENTS,
            Query(rates("hbm_sidecar_moves_total", _PODS, "namespace"), "{{namespace}}"),
            span=THIRD,
        )
    )
    board.with_panel(
        graph(
            "Copies to the device",
            "Rows that requests waited for (foreground) and rows copied in the background after "
            "moves (refill).",
            BYTES_PER_SECOND,
            Query(rates("hbm_pool_foreground_bytes_total", _PODS), "foreground"),
            Query(rates("hbm_pool_refill_bytes_total", _PODS), "refill"),
            span=THIRD,
        )
    )
    board.with_panel(
        graph(
            "Trouble in pods",
            "Pods without a live server, without a stored heartbeat in Redis, or in mode hold.",
            COUNT,
            Query(f"count(hbm_sidecar_server_up{{{_PODS}}} == 0) or vector(0)", "server silent"),
            Query(f"count(hbm_sidecar_redis_up{{{_PODS}}} == 0) or vector(0)", "Redis unreachable"),
            Query(f'count(hbm_sidecar_mode{{{_PODS}, mode="hold"}} == 1) or vector(0)', "on hold"),
            levels=Levels(1, 5),
            span=THIRD,
        )
    )


def _operator(board: Dashboard) -> None:
    board.with_row(Row("Operator"))
