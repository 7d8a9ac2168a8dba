"""What moving α can bring at most: two oracles that know the regimes, against the best static.

*Warm-stitched*: every request takes the time it takes on a node that has seen nothing but its
regime, at that regime's own α*: no move costs anything and caches are warm for every regime at
once, which no server reaches. *Paying*: a real node is told at each change of regime to go towards
α*, some part of the way from the best static split, at some speed, relocating rows or dropping
them; the best price is chosen in hindsight, for each seed and (stricter) one for all of them.

A static split pays for the change of regime too: its caches hold what the regime before left. So
the warm-stitched oracle is also held against a static split that is warm in the same sense.

`python -m hbm_sim.bounds` prints both for rows under LRU (by which the published bounds were found)
and under the pool's own rule.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hbm_sim.engine import EngineNode
from hbm_sim.load_level import phase_rates
from hbm_sim.node_spec import NodeSpec, RowRule
from hbm_sim.optimum import StaticOptimum, latencies, p99, static_optimum, static_run
from hbm_sim.stream import Stream, make_stream, stream_of_phases
from hbm_sim.workload import Phase, Workload, load_workload

Oracle = Literal["stitched", "warm", "paying", "one price"]
ORACLES: Final[tuple[Oracle, ...]] = ("stitched", "warm", "paying", "one price")
"""Against the best static split, but for `warm`: against a static one that is warm likewise."""
WORKLOADS: Final = ("trend", "burst-hot", "burst-new", "mix")
PUBLISHED: Final = {
    "trend": (22.0, 21.0),
    "burst-hot": (31.0, 12.0),
    "burst-new": (21.0, 15.0),
    "mix": (30.0, 17.0),
}
"""Warm-stitched and paying oracle, P99 in % below the best static split, rows under LRU."""
FRACTIONS: Final = (0.25, 0.5, 0.75, 1.0)
SLEWS_PER_S: Final = (0.02, 0.05, 0.2)
STEP_S: Final = 0.25
WARM_STEPS: Final = (-0.1, -0.05, 0.0, 0.05, 0.1)


class Price(NamedTuple):
    """How far and how fast the paying oracle goes."""

    fraction: float
    slew_per_s: float
    drop_only: bool = False


@dataclasses.dataclass(frozen=True)
class SeedBounds:
    """One stream. P99 in ms over all counted requests."""

    seed: int
    alpha: dict[str, float]  # per regime, by mean service time
    static_alpha: float
    static_ms: float
    half_ms: float  # α = 0.5
    stitched_ms: float
    warm_static_ms: float  # the best single α near the best static one, warm at once likewise
    paying_ms: dict[Price, float]
    moved_bytes: dict[Price, int]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """One workload under one rule, over all seeds."""

    workload: str
    rows: RowRule
    seeds: tuple[SeedBounds, ...]
    price: Price

    def gains(self, oracle: Oracle) -> npt.NDArray[np.float64]:
        """P99 in % below the best static split, per seed."""
        pairs = {
            "stitched": [(each.stitched_ms, each.static_ms) for each in self.seeds],
            "warm": [(each.stitched_ms, each.warm_static_ms) for each in self.seeds],
            "paying": [(min(each.paying_ms.values()), each.static_ms) for each in self.seeds],
            "one price": [(each.paying_ms[self.price], each.static_ms) for each in self.seeds],
        }[oracle]
        gains: npt.NDArray[np.float64] = 100.0 * (1.0 - np.array([a / b for a, b in pairs]))
        return gains

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain: dict[str, Any] = {
            "workload": self.workload,
            "rows": self.rows,
            "price": self.price._asdict(),
        }
        for oracle in ORACLES:
            gains = self.gains(oracle)
            plain[oracle] = {
                "gain_percent": float(gains.mean()),
                "standard_error": float(gains.std(ddof=1) / np.sqrt(len(gains)))
                if len(gains) > 1
                else None,
                "by_seed": gains.tolist(),
            }
        plain["seeds"] = [
            {
                "seed": each.seed,
                "alpha": each.alpha,
                "static_alpha": each.static_alpha,
                "static_p99_ms": each.static_ms,
                "half_p99_ms": each.half_ms,
                "stitched_p99_ms": each.stitched_ms,
                "warm_static_p99_ms": each.warm_static_ms,
                "paying_p99_ms": each.paying_ms[self.price],
                "moved_gb": each.moved_bytes[self.price] / 1e9,
            }
            for each in self.seeds
        ]
        return plain


def unpriced(spec: NodeSpec) -> NodeSpec:
    """A node whose moves take no time on the serving thread and are done at once, as in the model
    by which the published bounds were found."""
    return dataclasses.replace(spec, slice_ms=0.0, slice_rows=1 << 40, growth_extents=1 << 40)


def bounds(
    workload: Workload,
    rows: RowRule,
    seeds: Sequence[int],
    *,
    load: float = 1.0,
    rate: float | None = None,
    spec: NodeSpec | None = None,
    refill_bytes_per_s: float = 0.0,
    fine: bool = False,
    jobs: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Bounds:
    """Both oracles on one workload. "Load" is by capacities under the same rule of rows.
    `refill_bytes_per_s`: what may be copied into extents that the paying oracle has won."""
    spec = spec or workload.node_spec()
    if rows == "lru":
        spec = unpriced(spec)
    found = []
    for seed in seeds:
        stream = stream_at(workload, seed, rows, load, rate)
        optimum = static_optimum(stream, spec, rows=rows, fine=fine, jobs=jobs)
        found.append(_of_seed(workload, stream, spec, rows, optimum, seed, refill_bytes_per_s))
        if progress is not None:
            last = found[-1]
            best = min(last.paying_ms, key=lambda price: last.paying_ms[price])
            progress(
                f"{workload.name} {rows} seed {seed}: P99 static {last.static_ms:.1f} ms at "
                f"{last.static_alpha:.2f}, half {last.half_ms:.1f}, stitched "
                f"{last.stitched_ms:.1f}, paying {last.paying_ms[best]:.1f} at {tuple(best)}"
            )
    mean = {
        price: float(np.mean([each.paying_ms[price] / each.static_ms for each in found]))
        for price in found[0].paying_ms
    }
    return Bounds(workload.name, rows, tuple(found), min(mean, key=lambda price: mean[price]))


def stream_at(
    workload: Workload, seed: int, rows: RowRule, load: float, rate: float | None = None
) -> Stream:
    """The workload's stream at a load measured under either rule."""
    stream = make_stream(workload, seed, rate, qps=1.0)
    phases = workload.phases()
    rates = [load * each for each in phase_rates(workload, phases, rows)]
    lengths = [phase.requests for phase in phases]
    if workload.warm_up:
        rates, lengths = [rates[0], *rates], [workload.warm_up, *lengths]
    gaps = np.diff(stream.arrival_s, prepend=0.0)
    return dataclasses.replace(stream, arrival_s=np.cumsum(gaps / np.repeat(rates, lengths)))


def _of_seed(
    workload: Workload,
    stream: Stream,
    spec: NodeSpec,
    rows: RowRule,
    optimum: StaticOptimum,
    seed: int,
    refill_bytes_per_s: float,
) -> SeedBounds:
    counted = stream.counted
    alpha = {each.regime: each.by_service.alpha for each in optimum.regimes}
    static = optimum.pooled.by_p99
    low, high = spec.info.alpha_min, spec.info.alpha_max
    near = [min(max(static.alpha + step, low), high) for step in WARM_STEPS]
    stitched_ms, *warm_ms = _warm_p99(
        workload, stream, spec, rows, [alpha, *(dict.fromkeys(alpha, each) for each in near)], seed
    )
    paying, moved = {}, {}
    # It may also leave α alone.
    paying[Price(0.0, 0.0)], moved[Price(0.0, 0.0)] = static.value_ms, 0
    for price in prices(rows):
        paying[price], moved[price] = _paying(
            stream, spec, rows, alpha, static.alpha, price, refill_bytes_per_s
        )
    return SeedBounds(
        seed=seed,
        alpha=alpha,
        static_alpha=static.alpha,
        static_ms=static.value_ms,
        half_ms=p99(optimum.run_at(0.5).latency_ms[counted]),
        stitched_ms=stitched_ms,
        warm_static_ms=min(warm_ms),
        paying_ms=paying,
        moved_bytes=moved,
    )


def prices(rows: RowRule) -> list[Price]:
    """What the paying oracle chooses from. LRU gives up its tail: there is nothing to relocate."""
    return [
        Price(fraction, slew, drop_only)
        for drop_only in ((False, True) if rows == "tz" else (False,))
        for fraction in FRACTIONS
        for slew in SLEWS_PER_S
    ]


def _warm_p99(
    workload: Workload,
    stream: Stream,
    spec: NodeSpec,
    rows: RowRule,
    splits: list[dict[str, float]],
    seed: int,
) -> list[float]:
    """P99 if each request took what it takes on a node that knows no other regime and holds the
    split given for it; one for each of `splits`."""
    kinds = {phase.name: phase.regime for phase in workload.phases()}
    times = np.zeros((len(splits), 2, len(stream)))
    for name in splits[0]:
        here = np.flatnonzero(stream.regime == stream.regimes.index(name))
        phases = [Phase("", workload.warm_up, kinds[name]), Phase(name, len(here), kinds[name])]
        only = stream_of_phases(workload, phases, [1.0, 1.0], seed, stream.rate)
        for alpha in {split[name] for split in splits}:
            run = static_run(only, spec, alpha, rows)
            for index, split in enumerate(splits):
                if split[name] == alpha:
                    times[index, 0, here] = run.gather_ms[-len(here) :]
                    times[index, 1, here] = run.compute_ms[-len(here) :]
    return [p99(latencies(stream, spec, *each)[stream.counted]) for each in times]


def _paying(
    stream: Stream,
    spec: NodeSpec,
    rows: RowRule,
    alpha: dict[str, float],
    static_alpha: float,
    price: Price,
    refill_bytes_per_s: float,
) -> tuple[float, int]:
    """A node told where to go, at each step from the arrivals of that moment. -> P99, bytes."""
    goals = np.array(
        [
            static_alpha + price.fraction * (alpha.get(name, static_alpha) - static_alpha)
            for name in stream.regimes
        ]
    )
    target = float(goals[stream.regime[0]])
    node = EngineNode(spec, target, stream.rate, rows, sampled_rows=len(stream.row_keys))
    steps = int(np.ceil(stream.arrival_s[-1] / STEP_S))
    times = (np.arange(steps) + 1) * STEP_S
    newest = np.minimum(np.searchsorted(stream.arrival_s, times), len(stream) - 1)
    reach = price.slew_per_s * STEP_S
    for until_s, goal in zip(times.tolist(), goals[stream.regime[newest]].tolist(), strict=True):
        node.advance(stream, until_s)
        if target == goal and refill_bytes_per_s == 0.0:
            continue
        target = min(max(goal, target - reach), target + reach)
        # What is copied while EMB gives extents up would be dropped.
        refill = refill_bytes_per_s if target >= node.alpha else 0.0
        node.command(target, refill, price.drop_only)
    node.serve(stream, node.position, len(stream))
    assert node.outcome is not None
    return p99(node.outcome.latency_ms[stream.counted]), node.moved_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one line per workload and rule, or JSON."""
    import argparse
    import json

    parser = argparse.ArgumentParser(prog="python -m hbm_sim.bounds", description=__doc__)
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="names or files")
    parser.add_argument("--rows", default="lru,tz", help="lru, tz or both")
    parser.add_argument("--seeds", type=int, default=6, help="seeds 1 to N")
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--rate", type=float, help="share of rows followed (the workload's)")
    parser.add_argument("--gather", choices=("serial", "overlap"), default="serial")
    parser.add_argument("--refill", type=float, default=0.0, help="bytes/s of the paying oracle")
    parser.add_argument("--fine", action="store_true", help="grid of 0.0125 around each optimum")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", action="store_true", dest="as_json")
    chosen = parser.parse_args(arguments)
    results = []
    for rows in chosen.rows.split(","):
        for name in chosen.workloads.split(","):
            found = bounds(
                load_workload(name).with_gather(chosen.gather),
                rows,
                range(1, chosen.seeds + 1),
                load=chosen.load,
                rate=chosen.rate,
                refill_bytes_per_s=chosen.refill,
                fine=chosen.fine,
                jobs=chosen.jobs,
                progress=lambda said: print(said, file=sys.stderr, flush=True),
            )
            results.append(found.to_dict())
            if not chosen.as_json:
                print(_line(found), flush=True)
    if chosen.as_json:
        print(json.dumps(results, indent=2))
    return 0


def _line(found: Bounds) -> str:
    text = f"{found.workload:10} {found.rows:4}"
    published = dict(zip(("warm", "paying"), PUBLISHED.get(found.workload, ()), strict=False))
    for oracle in ORACLES:
        gains = found.gains(oracle)
        error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else float("nan")
        text += f"  {oracle} {gains.mean():.1f} ± {error:.1f} %"
        if found.rows == "lru" and oracle in published:
            text += f" (published {published[oracle]:.0f})"
    alphas = {
        name: float(np.mean([each.alpha[name] for each in found.seeds]))
        for name in found.seeds[0].alpha
    }
    shown = " ".join(f"{name} {alpha:.2f}" for name, alpha in alphas.items())
    static = float(np.mean([each.static_alpha for each in found.seeds]))
    price = f"{found.price.fraction:g} of the way at {found.price.slew_per_s:g}/s"
    dropping = ", dropping" if found.price.drop_only else ""
    return f"{text}  α* {shown}; static {static:.2f}; {price}{dropping}"


if __name__ == "__main__":
    raise SystemExit(main())
