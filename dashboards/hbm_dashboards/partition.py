"""Dashboard of one partition: why is α where it is, and what does it bring?"""

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
    copies,
    figure,
    graph,
    requests,
    within_slo,
)
from hbm_dashboards.queries import (
    COUNT,
    EVENTS,
    RATIO,
    SECONDS,
    Query,
    quantile,
    rates,
    rates_or_none,
    ratio,
)

UID: Final = "hbm-partition"
_POD: Final = 'namespace="$namespace", pod="$pod"'


def dashboard() -> Dashboard:
    result = board(
        "HBM Partition / One partition",
        UID,
        "One pod: its pool, its caches, its latency, and the decisions of its sidecar.",
        [
            choice(
                "namespace",
                "Namespace",
                "label_values(hbm_sidecar_alpha, namespace)",
                multiple=False,
            ),
            choice(
                "pod",
                "Pod",
                'label_values(hbm_sidecar_alpha{namespace="$namespace"}, pod)',
                multiple=False,
            ),
        ],
    ).annotations(list(moves_and_bursts(_POD)))
    _glance(result)
    _split(result)
    _caches(result)
    _latency(result)
    _decisions(result)
    _seams(result)
    return result


def _glance(board: Dashboard) -> None:
    section(
        board,
        "Now",
        figure(
            "α",
            "Share of the pool's extents that hold embedding rows, as the server has it.",
            RATIO,
            f"hbm_pool_alpha{{{_POD}}}",
            decimals=1,
        ),
        figure(
            "Best α by the twin",
            "The anchor: the α at which the miniature simulation of both caches is cheapest.",
            RATIO,
            f"hbm_sidecar_alpha_anchor{{{_POD}}}",
            decimals=1,
        ),
        figure(
            "Gain still to be had",
            "Predicted saving of service time if α went to the anchor. Large for long: bounds, "
            "mode Recommend or Fixed, or moves that are too slow.",
            RATIO,
            f"hbm_sidecar_predicted_gain_ratio{{{_POD}}}",
            levels=Levels(0.05, 0.15),
        ),
        figure(
            "P99 of the server",
            "99th percentile of scored requests, from the request line to the answer.",
            SECONDS,
            quantile(0.99, "hbm_serving_request_seconds", _POD),
        ),
        within_slo(_POD),
        requests(_POD, "Requests that were scored, per second."),
    )


def _split(board: Dashboard) -> None:
    section(
        board,
        "The split",
        graph(
            "α",
            "Applied α, where the sidecar wants it, and the twin's best. In mode Recommend target "
            "and anchor go their way without the applied one.",
            RATIO,
            Query(f"hbm_pool_alpha{{{_POD}}}", "applied"),
            Query(f"hbm_sidecar_alpha_target{{{_POD}}}", "target"),
            Query(f"hbm_sidecar_alpha_anchor{{{_POD}}}", "best by the twin"),
            top=1,
        ),
        graph(
            "Extents",
            "Who holds the pool. Pending: given up, still read by work in flight.",
            COUNT,
            Query(f"hbm_pool_extents_emb{{{_POD}}}", "rows"),
            Query(f"hbm_pool_extents_kv{{{_POD}}}", "KV"),
            Query(f"hbm_pool_extents_free{{{_POD}}}", "free"),
            Query(f"hbm_pool_extents_pending{{{_POD}}}", "pending"),
            stacked=True,
        ),
        graph(
            "Moves",
            "Moves that the sidecar started, and extents that changed sides, per second.",
            EVENTS,
            Query(rates("hbm_sidecar_moves_total", _POD), "moves"),
            Query(rates("hbm_pool_moved_extents_total", _POD), "extents"),
            Query(rates("hbm_pool_reclaimed_extents_total", _POD), "reclaimed by pinned KV"),
        ),
        copies(
            _POD,
            "Rows that requests waited for (foreground) and rows copied in the background after a "
            "move (refill). The refill yields to the foreground.",
        ),
    )


def _caches(board: Dashboard) -> None:
    section(
        board,
        "The caches",
        graph(
            "Hit ratios",
            "Row lookups that hit, KV lookups that reused at least one page, and the share of "
            "history tokens whose KV was reused.",
            RATIO,
            Query(ratio("hbm_pool_emb_hits_total", "hbm_pool_emb_accesses_total", _POD), "rows"),
            Query(ratio("hbm_pool_kv_hits_total", "hbm_pool_kv_lookups_total", _POD), "KV"),
            Query(
                f"{rates('hbm_serving_kv_tokens_reused_total', _POD)} / clamp_min("
                f"{rates('hbm_serving_kv_tokens_reused_total', _POD)} + "
                f"{rates('hbm_serving_kv_tokens_computed_total', _POD)}, 1e-9)",
                "tokens reused",
            ),
            top=1,
        ),
        graph(
            "Evictions",
            "Rows overwritten; users that lost their KV or the tail of it. Ghost hits are rows "
            "that were wanted again soon after: the row cache is too small.",
            EVENTS,
            Query(rates("hbm_pool_emb_evictions_total", _POD), "rows"),
            Query(rates("hbm_pool_emb_ghost_hits_total", _POD), "ghost hits"),
            Query(rates("hbm_pool_kv_evicted_users_total", _POD), "users"),
            Query(rates("hbm_pool_kv_trimmed_users_total", _POD), "tails of users"),
        ),
    )


def _latency(board: Dashboard) -> None:
    section(
        board,
        "Latency",
        graph(
            "Latency",
            "Scored requests, from the request line to the answer.",
            SECONDS,
            Query(quantile(0.5, "hbm_serving_request_seconds", _POD), "P50"),
            Query(quantile(0.95, "hbm_serving_request_seconds", _POD), "P95"),
            Query(quantile(0.99, "hbm_serving_request_seconds", _POD), "P99"),
            span=THIRD,
        ),
        graph(
            "Time per batch",
            "Gathering rows and looking up KV, against computing. What α trades is the one for "
            "the other.",
            SECONDS,
            Query(
                ratio("hbm_serving_gather_seconds_total", "hbm_serving_batches_total", _POD),
                "gather",
            ),
            Query(
                ratio("hbm_serving_compute_seconds_total", "hbm_serving_batches_total", _POD),
                "compute",
            ),
            Query(
                ratio("hbm_serving_service_seconds_total", "hbm_serving_batches_total", _POD),
                "both, as the pipeline combines them",
            ),
            span=THIRD,
        ),
        graph(
            "Load",
            "Requests that wait, requests in a batch; requests refused, failed or computed "
            "without the cache, per second.",
            COUNT,
            Query(f"hbm_serving_queue_depth{{{_POD}}}", "waiting"),
            Query(f"hbm_serving_in_flight{{{_POD}}}", "in a batch"),
            Query(rates("hbm_serving_overloads_total", _POD), "refused/s"),
            Query(rates("hbm_serving_errors_total", _POD), "failed/s"),
            Query(rates("hbm_serving_uncached_requests_total", _POD), "uncached/s"),
            span=THIRD,
        ),
    )


def _decisions(board: Dashboard) -> None:
    section(
        board,
        "Decisions",
        graph(
            "Reasons",
            "What decisions state as their reasons, per second; `hbm explain` says each in words.",
            EVENTS,
            Query(
                rates_or_none("hbm_sidecar_decision_reasons_total", _POD, "reason"), "{{reason}}"
            ),
        ),
        graph(
            "Cost of a decision",
            "First read of telemetry to command stored, and tick due to command stored.",
            SECONDS,
            Query(quantile(0.5, "hbm_sidecar_decision_latency_seconds", _POD), "decision P50"),
            Query(quantile(0.99, "hbm_sidecar_decision_latency_seconds", _POD), "decision P99"),
            Query(quantile(0.99, "hbm_sidecar_decision_due_seconds", _POD), "since due P99"),
        ),
        graph(
            "Mode",
            "The mode in force.",
            COUNT,
            Query(f"hbm_sidecar_mode{{{_POD}}}", "{{mode}}"),
            top=1,
            span=THIRD,
        ),
        graph(
            "The twin",
            "How much of the simulated caches is warm, and the share of samples it did not get. A "
            "cold or starved twin gives no anchor.",
            RATIO,
            Query(f"hbm_sidecar_twin_warm_ratio{{{_POD}}}", "warm"),
            Query(
                f"{rates('hbm_sidecar_ring_requests_lost_total', _POD)} / clamp_min("
                f"{rates('hbm_sidecar_ring_requests_lost_total', _POD)} + "
                f"{rates('hbm_sidecar_twin_requests_total', _POD)}, 1e-9)",
                "samples lost",
            ),
            top=1,
            span=THIRD,
        ),
        graph(
            "Age of inputs",
            "Of the server's telemetry and of the twin's curve. Old inputs hold α.",
            SECONDS,
            Query(f"hbm_sidecar_telemetry_age_seconds{{{_POD}}}", "telemetry"),
            Query(f"hbm_sidecar_twin_curve_age_seconds{{{_POD}}}", "curve"),
            levels=Levels(5, 60),
            span=THIRD,
        ),
    )


def _seams(board: Dashboard) -> None:
    section(
        board,
        "What the router hears",
        graph(
            "Digest",
            "Users that the sidecar knows as resident, and those that the pool holds.",
            COUNT,
            Query(f"hbm_sidecar_residency_users{{{_POD}}}", "known"),
            Query(f"hbm_pool_kv_users{{{_POD}}}", "held"),
            span=THIRD,
        ),
        graph(
            "Redis",
            "1: the newest heartbeat was stored. Without it the router spreads users by hash.",
            COUNT,
            Query(f"hbm_sidecar_redis_up{{{_POD}}}", "stored"),
            Query(rates("hbm_sidecar_redis_errors_total", _POD), "errors/s"),
            top=1,
            span=THIRD,
        ),
        graph(
            "Restarts",
            "Processes of the sidecar that were restarted, and boots of the server that it saw.",
            COUNT,
            Query(
                f"sum by (child) (hbm_sidecar_child_restarts_total{{{_POD}}}) or "
                'label_replace(vector(0), "child", "none", "", "")',
                "{{child}}",
            ),
            Query(f"hbm_sidecar_server_boots_total{{{_POD}}}", "boots of the server"),
            span=THIRD,
        ),
    )
