"""α* of each regime: the sweep of `hbm_sim` over the very requests that each node was sent."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hbm_load.trace import Trace
from hbm_policy.costs import CostConstants
from hbm_sim.requests import SimRequest, sample_of
from hbm_sim.sweep import SweepError, static_sweep

from hbm_demo.arm import ArmResult


class NodeOptimum(NamedTuple):
    """Best fixed α of one node in the settled part of one regime, by mean service time."""

    alpha_star: float
    plateau: tuple[float, float]  # α within 1 % of the best
    alphas: tuple[float, ...]
    cost_ms: tuple[float, ...]  # the curve

    def distance(self, alpha: float) -> float:
        """|α - α*|, or the distance to the plateau where that is smaller: on it, every α is as
        good."""
        low, high = self.plateau
        return min(abs(alpha - self.alpha_star), max(low - alpha, alpha - high, 0.0))


class RegimeOptimum(NamedTuple):
    """The optima of one regime."""

    nodes: dict[str, NodeOptimum]


def find_optima(trace: Trace, result: ArmResult) -> dict[str, RegimeOptimum]:
    """By regime; empty when there is nothing to sweep over.

    Every candidate is priced alike, by the mean of what the nodes declared their work to cost.
    """
    optima: dict[str, RegimeOptimum] = {}
    if not result.described:
        return optima
    costs = mean_costs([each.costs for each in result.described.values()])
    nodes = np.array(result.records.texts["node"])
    for node, described in result.described.items():
        # Node by node: the fine grid then lies around this node's optima only.
        requests = [
            SimRequest(
                sample=sample_of(request, described.info),
                regime=request.regime,
                node=node,
                settled=bool(trace.settled[index]),
                arrival_s=float(trace.time_s[index]),
            )
            for index in np.flatnonzero(nodes == node)
            if (request := trace.request(int(index)))
        ]
        try:
            sweep = static_sweep(requests, described.info, costs)
        except SweepError:
            continue
        for each in sweep.by_node[node]:
            best = each.best_mean
            optima.setdefault(each.regime, RegimeOptimum({})).nodes[node] = NodeOptimum(
                best.alpha,
                (best.plateau_low, best.plateau_high),
                each.alpha,
                each.mean_service_ms,
            )
    return optima


def mean_costs(listed: list[CostConstants]) -> CostConstants:
    """Mean of each constant."""
    fixed, token, context = (
        float(np.mean([costs[index] for costs in listed])) for index in range(3)
    )
    rows = np.mean([costs.row_ms for costs in listed], axis=0)
    return CostConstants(fixed, token, context, tuple(float(value) for value in rows))
