"""A workload so small that its node fills up and evicts within a few hundred requests."""

from __future__ import annotations

from typing import Any

from hbm_sim.workload import Workload


def small_workload(**changes: Any) -> Workload:
    """96 extents of 32 rows or 8 pages of 4 tokens; two regimes of 400 requests."""
    content: dict[str, Any] = {
        "schema_version": 1,
        "name": "small",
        "rows": 4000,
        "sample_rate": 1.0,
        "unsampled_top": 0,
        "warm_up": 100,
        "node": {
            "pool_bytes": 96 * 2048,
            "extent_bytes": 2048,
            "page_tokens": 4,
            "token_bytes": 64,
            "row_bytes": 64,
            "lookups_per_token": 2,
            "max_sequence_tokens": 128,
            "drop_block_tokens": 32,
            "fixed_ms": 0.5,
            "token_us": 20.0,
            "token_context_ns": 10.0,
            "gather_bytes_per_s": 2.0e6,
            "slo_ms": 30.0,
        },
        "regimes": {
            "quiet": regime(revisit=0.2, hot=0.1, zipf_s=0.6),
            "busy": regime(revisit=0.5, hot=0.6, zipf_s=1.1),
        },
        "walk": [{"regime": "quiet", "requests": 400}, {"regime": "busy", "requests": 400}],
    }
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(name), dict):
            content[name] = content[name] | value
        else:
            content[name] = value
    return Workload.model_validate(content)


def regime(*, revisit: float, hot: float, zipf_s: float, **items: Any) -> dict[str, Any]:
    """Users come back from about 10 requests before; 12 hot users."""
    return {
        "arrivals": {"rate_per_s": 20},
        "users": {
            "revisit": revisit,
            "revisit_distance": 10,
            "hot": hot,
            "hot_users": 12,
            "one_off_users": 500,
        },
        "items": {"zipf_s": zipf_s} | items,
        "history": {"median": 40, "sigma": 0.5, "minimum": 8, "maximum": 100, "growth": 4},
        "candidates": 8,
    }
