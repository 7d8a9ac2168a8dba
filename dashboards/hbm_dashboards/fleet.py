"""Dashboard of the fleet: is everything as it should be, and which pods are not?"""

from __future__ import annotations

from typing import Final

from grafana_foundation_sdk.builders.dashboard import Dashboard

from hbm_dashboards import partition
from hbm_dashboards.layout import (
    board,
    choice,
    moves_and_bursts,
    section,
)
from hbm_dashboards.panels import (
    THIRD,
    Column,
    Levels,
    copies,
    figure,
    graph,
    pod_table,
    requests,
    within_slo,
)
from hbm_dashboards.queries import (
    COUNT,
    EVENTS,
    PER_SECOND,
    RATIO,
    SECONDS,
    Query,
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
    section(
        board,
        "Now",
        figure(
            "Pods with a live server",
            "Share of injected pods whose sidecar hears the model server.",
            RATIO,
            f"avg(hbm_sidecar_server_up{{{_PODS}}})",
            levels=Levels(1, 0.9, worse_above=False),
        ),
        requests(_PODS, "Requests scored per second, all pods."),
        figure(
            "P99",
            "99th percentile of scored requests over all pods, as the servers see it.",
            SECONDS,
            quantile(0.99, "hbm_serving_request_seconds", _PODS),
        ),
        within_slo(_PODS),
        figure(
            "KV hit ratio",
            "Share of KV lookups that reused at least one page.",
            RATIO,
            ratio("hbm_pool_kv_hits_total", "hbm_pool_kv_lookups_total", _PODS),
            decimals=1,
        ),
        figure(
            "Row hit ratio",
            "Share of row lookups that hit.",
            RATIO,
            ratio("hbm_pool_emb_hits_total", "hbm_pool_emb_accesses_total", _PODS),
            decimals=1,
        ),
    )


def _pods(board: Dashboard) -> None:
    section(
        board,
        "Pods",
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
        ),
        graph(
            "α",
            "Applied α of each pod.",
            RATIO,
            Query(f"sum by ({_BY_POD}) (hbm_pool_alpha{{{_PODS}}})", "{{namespace}}/{{pod}}"),
            top=1,
            span=THIRD,
        ),
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
        ),
        graph(
            "P99 by pod",
            "Scored requests of each pod, from the request line to the answer.",
            SECONDS,
            Query(
                quantile(0.99, "hbm_serving_request_seconds", _PODS, _BY_POD),
                "{{namespace}}/{{pod}}",
            ),
            span=THIRD,
        ),
        graph(
            "Moves",
            "Moves of α that sidecars started, per second and namespace.",
            EVENTS,
            Query(rates("hbm_sidecar_moves_total", _PODS, "namespace"), "{{namespace}}"),
            span=THIRD,
        ),
        copies(
            _PODS,
            "Rows that requests waited for (foreground) and rows copied in the background after "
            "moves (refill).",
            span=THIRD,
        ),
        graph(
            "Trouble in pods",
            "Pods without a live server, without a stored heartbeat in Redis, or in mode hold.",
            COUNT,
            Query(f"count(hbm_sidecar_server_up{{{_PODS}}} == 0) or vector(0)", "server silent"),
            Query(f"count(hbm_sidecar_redis_up{{{_PODS}}} == 0) or vector(0)", "Redis unreachable"),
            Query(f'count(hbm_sidecar_mode{{{_PODS}, mode="hold"}} == 1) or vector(0)', "on hold"),
            levels=Levels(1, 5),
            span=THIRD,
        ),
    )


def _operator(board: Dashboard) -> None:
    section(
        board,
        "Operator",
        graph(
            "Partitions",
            "How many partitions have each condition in each status. Ready and Applied should be "
            "True, Degraded False.",
            COUNT,
            Query(
                "sum by (condition, status) (hbm_operator_partitions)", "{{condition}}={{status}}"
            ),
            span=THIRD,
        ),
        graph(
            "What is wrong",
            "Degraded partitions by reason, and pods that ask for the sidecar and run without it.",
            COUNT,
            Query(
                "sum by (reason) (hbm_operator_partitions_degraded) or "
                'label_replace(vector(0), "reason", "none", "", "")',
                "degraded {{reason}}",
            ),
            Query(
                "sum by (reason) (hbm_operator_not_injected_pods) or "
                'label_replace(vector(0), "reason", "none", "", "")',
                "not injected {{reason}}",
            ),
            levels=Levels(1, 10),
            span=THIRD,
        ),
        graph(
            "Admissions",
            "Pods by what the webhook did with them, per second.",
            EVENTS,
            Query(
                rates_or_none("hbm_webhook_injections_total", _PODS, "result"),
                "{{result}}",
            ),
            stacked=True,
            span=THIRD,
        ),
        graph(
            "Reconciles",
            "Looks of the controller at one object by result, and objects that wait for one.",
            EVENTS,
            Query(rates("hbm_operator_reconcile_total", "", "result"), "{{result}}"),
            Query("sum(hbm_operator_queue_depth)", "waiting"),
            span=THIRD,
        ),
        graph(
            "Latency of the operator",
            "99th percentiles: one look of the controller, one of its requests, one admission.",
            SECONDS,
            Query(quantile(0.99, "hbm_operator_reconcile_duration_seconds", ""), "reconcile"),
            Query(quantile(0.99, "hbm_operator_api_request_duration_seconds", ""), "API request"),
            Query(quantile(0.99, "hbm_webhook_request_duration_seconds", ""), "admission"),
            levels=Levels(0.5, 2),
            span=THIRD,
        ),
        graph(
            "API requests",
            "Requests of the controller to the API server by status; 0: no answer. 429: it is "
            "asked to wait.",
            PER_SECOND,
            Query(rates("hbm_operator_api_requests_total", "", "code"), "{{code}}"),
            stacked=True,
            span=THIRD,
        ),
        graph(
            "Silence of watches",
            "Since each watch of the controller last heard something, bookmarks included. Its "
            "probes fail from 180 s on.",
            SECONDS,
            Query(
                "time() - max by (resource) (hbm_operator_watch_last_event_timestamp_seconds)",
                "{{resource}}",
            ),
            levels=Levels(90, 180),
            span=THIRD,
        ),
        graph(
            "Certificate of the webhook",
            "Time left of the certificate that is served, the least of all replicas.",
            SECONDS,
            Query("min(hbm_webhook_certificate_expiry_timestamp_seconds) - time()", "left"),
            levels=Levels(30 * 86_400, 7 * 86_400, worse_above=False),
            span=THIRD,
        ),
        graph(
            "Events",
            "Kubernetes events of the controller by result. Repeated ones are told once an hour.",
            EVENTS,
            Query(rates_or_none("hbm_operator_events_total", "", "result"), "{{result}}"),
            span=THIRD,
        ),
    )
