"""The node of a model file as a workload's node, for a log to be served on.

A study workload has one table of rows of one width, `lookups_per_token` of them per item. A model's
tables are taken together: one row of each per item, at their mean width, rounded to a width that
divides an extent. `LogNode.rounded` says when that is not the model's own.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from hbm_load.trace import Trace
from hbm_pool.contracts.records import CostModel, ServerInfo
from hbm_pool.host.config import PoolConfig
from hbm_sim.trace_stream import node_for
from hbm_sim.workload import Node, Workload

_ROW: Final = 16
"""No row is narrower, bytes."""


class Compute(NamedTuple):
    """What a request takes of the device."""

    fixed_ms: float
    token_us: float
    token_context_ns: float
    gather_bytes_per_s: float


class LogNode(NamedTuple):
    """A workload without traffic of its own, and whether its rows are an approximation."""

    workload: Workload
    rounded: bool


def node_of(trace: Trace, info: ServerInfo, config: PoolConfig, compute: Compute) -> LogNode:
    """What is simulated of a model file's node. Raises WorkloadError, and ValueError for a shape
    that no node has."""
    widths = [info.classes[table.class_index].row_bytes for table in info.tables]
    mean = sum(widths) / len(widths)
    row_bytes = _ROW
    while info.extent_bytes % (2 * row_bytes) == 0 and abs(2 * row_bytes - mean) <= abs(
        row_bytes - mean
    ):
        row_bytes *= 2
    node = Node(
        pool_bytes=info.extents * info.extent_bytes,
        extent_bytes=info.extent_bytes,
        page_tokens=info.page_tokens,
        token_bytes=config.kv.token_bytes,
        row_bytes=row_bytes,
        lookups_per_token=len(info.tables),
        max_sequence_tokens=info.max_sequence_tokens,
        drop_block_tokens=info.drop_block_tokens,
        gather="overlap" if info.cost_model == CostModel.OVERLAP else "serial",
        fixed_ms=compute.fixed_ms,
        token_us=compute.token_us,
        token_context_ns=compute.token_context_ns,
        # The price of a row is that of the model's own bytes.
        gather_bytes_per_s=compute.gather_bytes_per_s * row_bytes / mean,
        alpha_min=info.alpha_min,
        alpha_max=info.alpha_max,
        slo_ms=info.slo_ms or 80.0,
    )
    regime = {"arrivals": {"rate_per_s": 1.0}, "history": {"median": 1.0}}
    empty = Workload.model_validate(
        {
            "schema_version": 1,
            "name": "log",
            "rows": 1 << 20,
            "node": node.model_dump(),
            "regimes": {"log": regime},
            "walk": [{"regime": "log", "requests": 1}],
        }
    )
    return LogNode(node_for(trace, empty), any(width != row_bytes for width in widths))
