"""Dashboard of routers: where do requests go, and was that right?"""

from __future__ import annotations

from typing import Final

from grafana_foundation_sdk.builders.dashboard import Dashboard

from hbm_dashboards.layout import (
    board,
    choice,
    moves_and_bursts,
    section,
)
from hbm_dashboards.panels import (
    THIRD,
    Levels,
    figure,
    graph,
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
)

UID: Final = "hbm-router"
_ROUTE: Final = 'namespace=~"$namespace", route=~"$route"'


def dashboard() -> Dashboard:
    result = board(
        "HBM Partition / Router",
        UID,
        "Routers of one or several routes: traffic, decisions, belief, nodes.",
        [
            choice(
                "namespace",
                "Namespace",
                "label_values(hbm_router_inflight, namespace)",
                multiple=True,
            ),
            choice(
                "route",
                "Route",
                'label_values(hbm_router_inflight{namespace=~"$namespace"}, route)',
                multiple=True,
            ),
        ],
    ).annotations(list(moves_and_bursts('namespace=~"$namespace"')))
    _traffic(result)
    _decisions(result)
    _nodes(result)
    return result


def _failed(selector: str) -> str:
    return (
        f"(sum(rate(hbm_router_errors_total{{{selector}}}[$__rate_interval])) or vector(0)) / "
        f"clamp_min({rates('hbm_router_requests_total', selector)}, 1e-9)"
    )


def _traffic(board: Dashboard) -> None:
    section(
        board,
        "Traffic",
        figure(
            "Requests",
            "Answers per second, whatever their status.",
            PER_SECOND,
            rates("hbm_router_requests_total", _ROUTE),
        ),
        figure(
            "Errors of our own",
            "Share of answers that the router had to give itself because a client or a backend "
            "failed.",
            RATIO,
            _failed(_ROUTE),
            levels=Levels(0.001, 0.01),
            decimals=2,
        ),
        figure(
            "P99",
            "From the complete request head to the last byte handed to the client.",
            SECONDS,
            quantile(0.99, "hbm_router_request_duration_seconds", _ROUTE),
        ),
        figure(
            "Predictions that came true",
            "Of the KV hits that were predicted, those that the server confirmed.",
            RATIO,
            "sum(rate(hbm_router_kv_predicted_total"
            f'{{{_ROUTE}, outcome="tp"}}[$__rate_interval])) / clamp_min('
            "sum(rate(hbm_router_kv_predicted_total"
            f'{{{_ROUTE}, outcome=~"tp|fp"}}[$__rate_interval])), 1e-9)',
            levels=Levels(0.9, 0.7, worse_above=False),
            decimals=1,
        ),
        figure(
            "Healthy nodes",
            "Least number over the routers, panic aside.",
            COUNT,
            f"min(sum by (namespace, pod) (hbm_router_node_healthy{{{_ROUTE}}}))",
            levels=Levels(2, 1, worse_above=False),
        ),
        figure(
            "Routers with Redis",
            "Share of routers to which Redis answered the last round.",
            RATIO,
            f"avg(hbm_router_store_up{{{_ROUTE}}})",
            levels=Levels(1, 0.5, worse_above=False),
        ),
        graph(
            "Answers",
            "Answers per second by status; 499: the client left first.",
            PER_SECOND,
            Query(rates("hbm_router_requests_total", _ROUTE, "code"), "{{code}}"),
            stacked=True,
        ),
        graph(
            "Latency",
            "Whole requests, and the wait for the head of the backend's response.",
            SECONDS,
            Query(quantile(0.5, "hbm_router_request_duration_seconds", _ROUTE), "P50"),
            Query(quantile(0.99, "hbm_router_request_duration_seconds", _ROUTE), "P99"),
            Query(quantile(0.99, "hbm_router_upstream_ttfb_seconds", _ROUTE), "backend P99"),
        ),
        graph(
            "Errors and shedding",
            "Errors of our own and shed requests per second, by reason (docs/metrics-router.md).",
            EVENTS,
            Query(rates_or_none("hbm_router_errors_total", _ROUTE, "reason"), "error {{reason}}"),
            Query(rates_or_none("hbm_router_dropped_total", _ROUTE, "reason"), "shed {{reason}}"),
        ),
        graph(
            "Second tries and ejections",
            "Second tries, those the budget denied, and nodes taken out, per second.",
            EVENTS,
            Query(rates_or_none("hbm_router_retries_total", _ROUTE, "reason"), "retry {{reason}}"),
            Query(rates("hbm_router_retries_denied_total", _ROUTE), "denied"),
            Query(
                rates_or_none("hbm_router_ejections_total", _ROUTE, "reason"), "ejected {{reason}}"
            ),
        ),
    )


def _decisions(board: Dashboard) -> None:
    section(
        board,
        "Decisions",
        graph(
            "Why",
            "What decided, per second: `cost` is knowledge, `hash` and `stale` are the lack of it.",
            EVENTS,
            Query(rates_or_none("hbm_router_decisions_total", _ROUTE, "why"), "{{why}}"),
            stacked=True,
            span=THIRD,
        ),
        graph(
            "Truth check",
            "Predicted KV hits against what the server said: tp, fp, fn, tn.",
            EVENTS,
            Query(rates_or_none("hbm_router_kv_predicted_total", _ROUTE, "outcome"), "{{outcome}}"),
            stacked=True,
            span=THIRD,
        ),
        graph(
            "Error of the estimate",
            "Queue and service as the server measured them, less the estimate. Far above 0: nodes "
            "are dearer than they say.",
            SECONDS,
            Query(quantile(0.5, "hbm_router_cost_error_seconds", _ROUTE), "P50"),
            Query(quantile(0.95, "hbm_router_cost_error_seconds", _ROUTE), "P95"),
            span=THIRD,
        ),
        graph(
            "Cost of routing",
            "Choosing a node, and how late the event loop's timers fire.",
            SECONDS,
            Query(quantile(0.5, "hbm_router_decision_duration_seconds", _ROUTE), "decision P50"),
            Query(quantile(0.99, "hbm_router_decision_duration_seconds", _ROUTE), "decision P99"),
            Query(quantile(0.99, "hbm_router_event_loop_lag_seconds", _ROUTE), "loop lag P99"),
            span=THIRD,
        ),
        graph(
            "Where lengths come from",
            "Source of the history's length, per second; `header` is the best.",
            EVENTS,
            Query(rates_or_none("hbm_router_length_source_total", _ROUTE, "source"), "{{source}}"),
            stacked=True,
            span=THIRD,
        ),
        graph(
            "Digests",
            "Digests taken over, and words of nodes that were not believed, per second.",
            EVENTS,
            Query(rates("hbm_router_digest_accepted_total", _ROUTE), "accepted"),
            Query(
                rates_or_none("hbm_router_digest_rejected_total", _ROUTE, "reason"),
                "rejected {{reason}}",
            ),
            span=THIRD,
        ),
    )


def _nodes(board: Dashboard) -> None:
    section(
        board,
        "Nodes (by pod uid)",
        graph(
            "In flight",
            "Requests of all routers in flight on each node.",
            COUNT,
            Query(f"sum by (node) (hbm_router_node_inflight{{{_ROUTE}}})", "{{node}}"),
        ),
        graph(
            "Chosen",
            "Requests sent to each node, per second.",
            PER_SECOND,
            Query(rates("hbm_router_decisions_total", _ROUTE, "node"), "{{node}}"),
        ),
        graph(
            "Trust",
            "Belief in a node's last words, times how often its predicted hits came true.",
            RATIO,
            Query(
                f"avg by (node) (hbm_router_node_trust{{{_ROUTE}}} * "
                f"hbm_router_node_kv_precision{{{_ROUTE}}})",
                "{{node}}",
            ),
            top=1,
            span=THIRD,
        ),
        graph(
            "Age of digests",
            "Since a new heartbeat of the node was first seen. Fully believed up to 2 s, not at "
            "all from 30 s on.",
            SECONDS,
            Query(f"max by (node) (hbm_router_digest_age_seconds{{{_ROUTE}}})", "{{node}}"),
            levels=Levels(2, 30),
            span=THIRD,
        ),
        graph(
            "Users held",
            "Users that each node says it holds.",
            COUNT,
            Query(f"max by (node) (hbm_router_digest_users{{{_ROUTE}}})", "{{node}}"),
            span=THIRD,
        ),
    )
