"""Domain randomisation: each seed is one workload on one node, drawn within stated ranges.

What a policy must not learn is one node. Nodes and regimes are drawn around the standard ones of
the study, wider than these, so that the residual sees pools that are too small and too large,
traffic that pulls α either way, or nowhere.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, NamedTuple

import numpy as np
from hbm_load.scenario import Arrivals, History, Items, Regime, Users
from hbm_sim.workload import Node, Phase, Step, Workload
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

TRAINING_SEEDS: Final = range(1000, 2000)
VALIDATION_SEEDS: Final = range(2000, 2100)
"""Never trained on. Seeds 1 to 20 with the shipped workloads are the test, not used here."""
EXTENT_BYTES: Final = 2 << 20


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if not pair[0] <= pair[1]:
        raise ValueError(f"{pair[0]:g} to {pair[1]:g} is no range: the first must not be larger")
    return pair


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
"""Lowest and highest value."""


class Domain(BaseModel):
    """What is drawn for each episode. Ranges are [lowest, highest]; equal ends fix a value."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    requests: int = Field(10_000, ge=200, le=1_000_000)
    """Requests of an episode, after the warm-up."""
    warm_up: int = Field(2500, ge=0, le=100_000)
    """Requests before the first decision that counts: caches and twin become warm."""
    sample_rate: float = Field(0.002, gt=0.0, le=1.0)
    """Share of rows that the simulation follows."""
    pool_bytes: Range = (30e9, 90e9)
    rows: Range = (2e7, 1e8)
    """Rows of the embedding table."""
    row_bytes: tuple[int, ...] = (512, 1024, 2048)
    """Bytes of one row: one of these."""
    token_bytes: tuple[int, ...] = (8192, 16_384, 32_768)
    """KV of one token: one of these."""
    lookups_per_token: tuple[int, ...] = (2, 3, 4)
    candidates: tuple[int, ...] = (256, 512, 1024)
    gather_bytes_per_s: Range = (2e9, 8e9)
    compute_factor: Range = (0.7, 1.4)
    """Factor on the compute constants of the standard node."""
    history_median: Range = (4096.0, 10_240.0)
    overlap_share: float = Field(0.15, ge=0.0, le=1.0)
    """Share of nodes that gather while they compute."""
    revisit: Range = (0.05, 0.65)
    revisit_distance: Range = (120.0, 450.0)
    hot: Range = (0.05, 0.65)
    zipf_s: Range = (0.6, 1.0)
    churn: Range = (0.0, 1500.0)
    """Ranks that change their item per request, in the half of the regimes that have any."""
    new_share: Range = (0.1, 0.3)
    """Share of lookups that goes to a shelf of new rows, in the quarter of regimes with one."""
    regimes: tuple[int, int] = (1, 3)
    """How many different regimes an episode has."""
    regime_requests: Range = (1200.0, 5000.0)
    """Length of a stretch of one regime."""
    ramp_share: float = Field(0.4, ge=0.0, le=1.0)
    """Share of the changes of regime that are a ramp of levels instead of a jump."""
    load: Range = (0.4, 0.95)
    """Utilisation at the best static α of each stretch."""
    slo_factor: Range = (5.0, 12.0)
    """Latency goal over the mean service time at the best static α."""
    cost_error: Range = (0.5, 2.0)
    """Factor by which declared prices of missed rows are wrong, in the third of nodes where any."""
    delay_ticks: tuple[int, int] = (0, 2)
    """Age of telemetry, ticks."""
    noise: Range = (0.0, 0.1)
    """Standard deviation of the log of measured times."""
    twin_rate: Range = (0.0005, 0.002)
    """Share of rows that the twin follows."""
    refill_bytes_per_s: Range = (0.0, 1e9)
    start_alpha: Range = (0.15, 0.85)
    """α that the node begins with."""


class Drawn(NamedTuple):
    """One draw: everything but the arrival rates, which follow from the best static α."""

    seed: int
    workload: Workload
    phases: tuple[Phase, ...]
    loads: tuple[float, ...]
    slo_factor: float
    cost_error: float
    delay_ticks: int
    noise: float
    twin_rate: float
    refill_bytes_per_s: float
    start_alpha: float


def draw(domain: Domain, seed: int) -> Drawn:
    """The episode of a seed: equal inputs, equal draw."""
    random = np.random.default_rng([seed, 71])
    node = _node(domain, random)
    median = _uniform(random, domain.history_median)
    candidates = int(random.choice(domain.candidates))
    count = int(random.integers(domain.regimes[0], domain.regimes[1] + 1))
    rows = round(_log_uniform(random, domain.rows))
    regimes = {f"r{i}": _regime(domain, random, median, candidates, rows) for i in range(count)}
    walk = _walk(domain, random, list(regimes))
    workload = Workload(
        schema_version=1,
        name=f"drawn-{seed}",
        rows=rows,
        sample_rate=domain.sample_rate,
        unsampled_top=1000,
        warm_up=domain.warm_up,
        node=node,
        regimes=regimes,
        walk=tuple(walk),
    )
    phases = workload.phases()
    if domain.warm_up:
        phases.insert(0, Phase("", domain.warm_up, phases[0].regime))
    wrong = random.random() < 1 / 3
    low, high = domain.load
    level = _uniform(random, domain.load)
    return Drawn(
        seed=seed,
        workload=workload,
        phases=tuple(phases),
        # Stretches of one episode have about the same load, as far as the range allows.
        loads=tuple(min(max(level * random.uniform(0.9, 1.1), low), high) for _ in phases),
        slo_factor=_uniform(random, domain.slo_factor),
        cost_error=_log_uniform(random, domain.cost_error) if wrong else 1.0,
        delay_ticks=int(random.integers(domain.delay_ticks[0], domain.delay_ticks[1] + 1)),
        noise=_uniform(random, domain.noise),
        twin_rate=_log_uniform(random, domain.twin_rate),
        refill_bytes_per_s=_uniform(random, domain.refill_bytes_per_s),
        start_alpha=_uniform(random, domain.start_alpha),
    )


def _node(domain: Domain, random: np.random.Generator) -> Node:
    factor = _log_uniform(random, domain.compute_factor)
    extents = round(_log_uniform(random, domain.pool_bytes) / EXTENT_BYTES)
    standard: dict[str, Any] = {"fixed_ms": 1.2, "token_us": 0.28, "token_context_ns": 0.07 / 1.024}
    return Node(
        pool_bytes=max(64, extents) * EXTENT_BYTES,
        extent_bytes=EXTENT_BYTES,
        token_bytes=int(random.choice(domain.token_bytes)),
        row_bytes=int(random.choice(domain.row_bytes)),
        lookups_per_token=int(random.choice(domain.lookups_per_token)),
        gather="overlap" if random.random() < domain.overlap_share else "serial",
        context="whole",
        gather_bytes_per_s=_log_uniform(random, domain.gather_bytes_per_s),
        **{name: value * factor for name, value in standard.items()},
    )


def _regime(
    domain: Domain, random: np.random.Generator, median: float, candidates: int, rows: int
) -> Regime:
    items: dict[str, Any] = {"zipf_s": _uniform(random, domain.zipf_s)}
    if random.random() < 0.5:
        items["churn"] = _uniform(random, domain.churn)
    if random.random() < 0.25:
        items["new_share"] = _uniform(random, domain.new_share)
        items["new_items"] = min(1_000_000, rows // 4)
    return Regime(
        arrivals=Arrivals(rate_per_s=20.0),
        users=Users(
            revisit=_uniform(random, domain.revisit),
            revisit_distance=_log_uniform(random, domain.revisit_distance),
            hot=_uniform(random, domain.hot),
        ),
        items=Items(**items),
        history=History(median=median, sigma=0.5, minimum=512, maximum=16_384, growth=128.0),
        candidates=candidates,
    )


def _walk(domain: Domain, random: np.random.Generator, names: list[str]) -> list[Step]:
    """Stretches until the requests are used up; a change of regime is a jump or six levels."""
    steps: list[Step] = []
    left, now = domain.requests, 0
    while left > 0:
        length = min(left, round(_log_uniform(random, domain.regime_requests)))
        if steps and len(names) > 1:
            then = int(random.integers(len(names) - 1))
            then += then >= now
            if random.random() < domain.ramp_share:
                each = max(1, min(length, left) // 6)
                for level in range(1, 6):
                    if left > each:
                        ramp = Step(
                            regime=names[now], towards=names[then], weight=level / 6, requests=each
                        )
                        steps.append(ramp)
                        left -= each
                length = min(left, length)
            now = then
        steps.append(Step(regime=names[now], requests=length))
        left -= length
    return steps


def _uniform(random: np.random.Generator, pair: tuple[float, float]) -> float:
    return float(random.uniform(*pair))


def _log_uniform(random: np.random.Generator, pair: tuple[float, float]) -> float:
    return float(np.exp(random.uniform(np.log(pair[0]), np.log(pair[1]))))
