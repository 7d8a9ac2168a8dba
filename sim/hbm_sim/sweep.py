"""α*: an exhaustive sweep of static splits over one and the same stream of requests.

Every candidate serves the whole stream from cold; what was served before a regime settled is not
counted. The grid is 0.05, then 0.0125 around each regime's optimum. Two criteria: J1, mean service
time, and, where arrivals are known, J2, the tail of latency (first come, first served; an
overlapped node is two stages in tandem). With each goes the plateau within 1 % of the optimum: on
it every α is as good, and a distance to α* alone says little.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from hbm_policy.costs import CostConstants, usable
from hbm_pool.contracts.records import CostModel, ServerInfo

from hbm_sim.node import Node, Served
from hbm_sim.queueing import queue_ms
from hbm_sim.requests import RowNumbers, SimRequest

COARSE_STEP: Final = 0.05
FINE_STEP: Final = 0.0125
PLATEAU: Final = 0.01
P99_MIN_REQUESTS: Final = 1000
"""Below it the tail is P95."""
POOLED: Final = ""
"""Name of all nodes together."""


class SweepError(ValueError):
    """A sweep that cannot be run; the message says what to change."""


@dataclasses.dataclass(frozen=True, slots=True)
class Optimum:
    """The best α by one criterion."""

    alpha: float
    value_ms: float
    plateau_low: float
    plateau_high: float
    """α around the best for which the criterion stays within 1 %."""

    def distance(self, alpha: float) -> float:
        """How far an α is from the plateau; 0 on it."""
        return max(self.plateau_low - alpha, alpha - self.plateau_high, 0.0)


@dataclasses.dataclass(frozen=True, slots=True)
class RegimeSweep:
    """One regime on one node, or on all of them. Columns run over `alpha`."""

    regime: str
    node: str
    requests: int
    """Counted ones."""
    alpha: tuple[float, ...]
    mean_service_ms: tuple[float, ...]
    kv_hit_ratio: tuple[float, ...]
    emb_miss_ratio: tuple[float, ...]
    tail_percentile: int
    """99, or 95 for fewer than 1,000 requests."""
    tail_latency_ms: tuple[float, ...] | None
    """None without arrivals."""
    best_mean: Optimum
    best_tail: Optimum | None


@dataclasses.dataclass(frozen=True, slots=True)
class Sweep:
    """Result of a sweep."""

    pooled: tuple[RegimeSweep, ...]
    """Per regime, all nodes together, in order of first appearance."""
    by_node: dict[str, tuple[RegimeSweep, ...]]
    requests: int
    cost_model: str
    costs: CostConstants

    def regime(self, name: str, node: str = POOLED) -> RegimeSweep:
        """One regime. Raises KeyError for a name that did not appear."""
        for each in self.pooled if node == POOLED else self.by_node[node]:
            if each.regime == name:
                return each
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = dataclasses.asdict(self)
        plain["costs"] = self.costs._asdict()
        return plain


class _Outcomes:
    """What every request cost under each α that has been run."""

    def __init__(self) -> None:
        self.alpha: list[float] = []
        self.compute_ms: list[npt.NDArray[np.float64]] = []  # per α, [n]
        self.gather_ms: list[npt.NDArray[np.float64]] = []
        self.kv_hit: list[npt.NDArray[np.bool_]] = []
        self.lookups: list[npt.NDArray[np.int64]] = []
        self.misses: list[npt.NDArray[np.int64]] = []

    def sort(self) -> None:
        order = np.argsort(self.alpha)
        for name, column in vars(self).items():
            setattr(self, name, [column[i] for i in order])


def static_sweep(
    requests: Sequence[SimRequest],
    info: ServerInfo,
    costs: CostConstants,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """α* per regime, pooled and per node, for the stream as it was sent to each node.

    `requests` is gone through twice (coarse grid, fine grid), in order of arrival. `costs` price
    every candidate alike. `progress(done, total)` counts requests times passes.

    Raises SweepError when nothing is counted or the constants cannot price a request.
    """
    if not usable(costs):
        raise SweepError(f"cost constants {costs} cannot price a request")
    regimes = list(dict.fromkeys(each.regime for each in requests if each.settled))
    if not regimes:
        raise SweepError("no settled request in the stream; it is empty or all warm-up")
    labels = _Labels(requests)
    outcomes = _Outcomes()
    total = 2 * len(requests)
    coarse = _grid(info, info.alpha_min, info.alpha_max, COARSE_STEP)
    _run(requests, info, costs, coarse, outcomes, progress, 0, total)
    fine = _around_optima(labels, regimes, outcomes, info)
    if fine:
        done = len(requests)
        _run(requests, info, costs, fine, outcomes, progress, done, total)
    outcomes.sort()
    latency_ms = _latencies(labels, outcomes, info) if labels.has_arrivals else None
    pooled = tuple(
        _summary(regime, POOLED, labels.counted(regime, None), outcomes, latency_ms, info)
        for regime in regimes
    )
    by_node = {
        node: tuple(
            _summary(regime, node, mask, outcomes, latency_ms, info)
            for regime in regimes
            if (mask := labels.counted(regime, node)).any()
        )
        for node in labels.nodes
    }
    if progress is not None:
        progress(total, total)
    return Sweep(pooled, by_node, len(requests), info.cost_model.name.lower(), costs)


class _Labels:
    """Per request: regime, node, whether it counts, when it arrived."""

    def __init__(self, requests: Iterable[SimRequest]) -> None:
        rows = [(each.regime, each.node, each.settled, each.arrival_s) for each in requests]
        self.regime = np.array([row[0] for row in rows])
        self.node = np.array([row[1] for row in rows])
        self.settled = np.array([row[2] for row in rows], dtype=np.bool_)
        self.arrival_s = np.array([row[3] for row in rows], dtype=np.float64)
        self.nodes = [str(node) for node in dict.fromkeys(self.node.tolist())]
        self.has_arrivals = bool(np.isfinite(self.arrival_s).all())

    def counted(self, regime: str, node: str | None) -> npt.NDArray[np.bool_]:
        """Mask of the counted requests of a regime, on one node or (None) on all."""
        mask: npt.NDArray[np.bool_] = self.settled & (self.regime == regime)
        return mask if node is None else mask & (self.node == node)


def settled_by_share(regimes: Sequence[str], share: float) -> list[bool]:
    """For a stream without marks: False for the leading `share` of each run of one regime."""
    settled: list[bool] = []
    start = 0
    for index in range(1, len(regimes) + 1):
        if index == len(regimes) or regimes[index] != regimes[start]:
            length = index - start
            first = math.ceil(length * share)
            settled += [position >= first for position in range(length)]
            start = index
    return settled


def _grid(info: ServerInfo, low: float, high: float, step: float) -> list[int]:
    """EMB extents of a grid of α over [low, high], within the server's bounds."""
    low, high = max(low, info.alpha_min), min(high, info.alpha_max)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    alphas = {low, high, *(index * step for index in range(first, last + 1))}
    least = math.ceil(info.alpha_min * info.extents - 1e-9)
    most = max(least, math.floor(info.alpha_max * info.extents + 1e-9))
    return sorted({min(max(round(alpha * info.extents), least), most) for alpha in alphas})


def _around_optima(
    labels: _Labels, regimes: list[str], outcomes: _Outcomes, info: ServerInfo
) -> list[int]:
    """Fine grid one coarse step around the optimum of every regime, pooled and per node."""
    alphas = np.array(outcomes.alpha)
    known = {round(alpha * info.extents) for alpha in outcomes.alpha}
    wanted: set[int] = set()
    for regime in regimes:
        for node in (None, *labels.nodes):
            mask = labels.counted(regime, node)
            if mask.any():
                best = float(alphas[int(np.argmin(_means(outcomes, mask, info)))])
                wanted.update(_grid(info, best - COARSE_STEP, best + COARSE_STEP, FINE_STEP))
    return sorted(wanted - known)


def _run(
    requests: Iterable[SimRequest],
    info: ServerInfo,
    costs: CostConstants,
    emb_extents: Sequence[int],
    outcomes: _Outcomes,
    progress: Callable[[int, int], None] | None,
    done: int,
    total: int,
) -> None:
    """Serves the stream with every candidate side by side: one request is prepared once."""
    alphas = [extents / info.extents for extents in emb_extents]
    numbers = RowNumbers(info)
    nodes: dict[str, list[Node]] = {}
    served: list[list[Served]] = [[] for _ in alphas]
    for request in requests:
        if request.node not in nodes:
            nodes[request.node] = [Node(info, costs, alpha) for alpha in alphas]
        lists = numbers.lists(request.sample)
        for column, node in zip(served, nodes[request.node], strict=True):
            column.append(node.serve(request.sample, lists))
        done += 1
        if progress is not None and done % 64 == 0:
            progress(done, total)
    for alpha, column in zip(alphas, served, strict=True):
        outcomes.alpha.append(alpha)
        outcomes.compute_ms.append(np.array([each.compute_ms for each in column]))
        outcomes.gather_ms.append(np.array([each.gather_ms for each in column]))
        outcomes.kv_hit.append(np.array([each.cached_tokens > 0 for each in column]))
        outcomes.lookups.append(np.array([each.lookups for each in column]))
        outcomes.misses.append(np.array([sum(each.misses) for each in column]))


def _service_ms(outcomes: _Outcomes, index: int, info: ServerInfo) -> npt.NDArray[np.float64]:
    compute_ms, gather_ms = outcomes.compute_ms[index], outcomes.gather_ms[index]
    if info.cost_model == CostModel.OVERLAP:
        return np.maximum(compute_ms, gather_ms)
    return compute_ms + gather_ms


def _means(
    outcomes: _Outcomes, mask: npt.NDArray[np.bool_], info: ServerInfo
) -> npt.NDArray[np.float64]:
    return np.array(
        [_service_ms(outcomes, index, info)[mask].mean() for index in range(len(outcomes.alpha))]
    )


def _latencies(
    labels: _Labels, outcomes: _Outcomes, info: ServerInfo
) -> list[npt.NDArray[np.float64]]:
    """Latency of every request under each α, from its intended arrival, ms."""
    overlap = info.cost_model == CostModel.OVERLAP
    result = []
    for index in range(len(outcomes.alpha)):
        latency_ms = np.empty(len(labels.node))
        for node in labels.nodes:
            mine = labels.node == node
            latency_ms[mine] = queue_ms(
                labels.arrival_s[mine] * 1e3,
                outcomes.gather_ms[index][mine],
                outcomes.compute_ms[index][mine],
                overlap=overlap,
            )
        result.append(latency_ms)
    return result


def _summary(
    regime: str,
    node: str,
    mask: npt.NDArray[np.bool_],
    outcomes: _Outcomes,
    latency_ms: list[npt.NDArray[np.float64]] | None,
    info: ServerInfo,
) -> RegimeSweep:
    means = _means(outcomes, mask, info)
    count = int(mask.sum())
    percentile = 99 if count >= P99_MIN_REQUESTS else 95
    tails = None
    if latency_ms is not None:
        tails = np.array([float(np.percentile(each[mask], percentile)) for each in latency_ms])
    lookups = [max(int(each[mask].sum()), 1) for each in outcomes.lookups]
    misses = [int(each[mask].sum()) for each in outcomes.misses]
    return RegimeSweep(
        regime=regime,
        node=node,
        requests=count,
        alpha=tuple(outcomes.alpha),
        mean_service_ms=tuple(means.tolist()),
        kv_hit_ratio=tuple(float(each[mask].mean()) for each in outcomes.kv_hit),
        emb_miss_ratio=tuple(m / n for m, n in zip(misses, lookups, strict=True)),
        tail_percentile=percentile,
        tail_latency_ms=None if tails is None else tuple(tails.tolist()),
        best_mean=optimum(outcomes.alpha, means),
        best_tail=None if tails is None else optimum(outcomes.alpha, tails),
    )


def optimum(alpha: Sequence[float], value_ms: npt.NDArray[np.float64]) -> Optimum:
    """Minimum of a curve, and the stretch around it that stays within 1 %."""
    best = int(np.argmin(value_ms))
    limit = float(value_ms[best]) * (1.0 + PLATEAU)
    low = high = best
    while low > 0 and value_ms[low - 1] <= limit:
        low -= 1
    while high < len(alpha) - 1 and value_ms[high + 1] <= limit:
        high += 1
    return Optimum(
        alpha=float(alpha[best]),
        value_ms=float(value_ms[best]),
        plateau_low=float(alpha[low]),
        plateau_high=float(alpha[high]),
    )
