"""Load x: how many requests per second a regime's own best α just serves within the SLO.

The capacity of a regime is the highest rate at which some α, held from cold, keeps pooled P99
within the node's SLO. It depends on node, regime, sample and row rule only, so it is kept: for the
shipped workloads beside them (`workloads/rates.json`), for others in the user's cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.records import CostModel

from hbm_sim.node_spec import RowRule
from hbm_sim.queueing import queue_ms

if TYPE_CHECKING:
    from hbm_load.scenario import Regime

    from hbm_sim.workload import Phase, Workload

RULE: Final = 1
"""Changes when the way of finding a capacity does: older results no longer count."""
WARM_UP: Final = 4000
REQUESTS: Final = 6000
ARRIVAL_DRAWS: Final = 8
ALPHA_STEP: Final = 0.05
SEED: Final = 4242


def phase_rates(workload: Workload, phases: list[Phase], rows: RowRule = "tz") -> list[float]:
    """Requests per second of each stretch at load 1."""
    return [capacity_per_s(workload, phase.regime, rows) for phase in phases]


def capacity_per_s(workload: Workload, regime: Regime, rows: RowRule = "tz") -> float:
    """Highest rate of one regime at which its best static α meets the SLO at P99."""
    known = shipped_capacity(workload, regime, rows)
    if known is not None:
        return known
    kept = _cache_folder() / f"{_key(workload, regime, rows)}.json"
    try:
        return float(json.loads(kept.read_text())["per_s"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = find_capacity(workload, regime, rows)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"per_s": found}))
        partial.replace(kept)
    except OSError:
        pass  # a read-only home: found again next time
    return found


def shipped_capacity(workload: Workload, regime: Regime, rows: RowRule = "tz") -> float | None:
    """The capacity kept beside the shipped workloads, if it is there."""
    return _shipped().get(_key(workload, regime, rows))


def _key(workload: Workload, regime: Regime, rows: RowRule) -> str:
    content: dict[str, Any] = {
        "rule": RULE,
        "rows": rows,
        "node": workload.node.model_dump(mode="json"),
        "table": [workload.rows, workload.sample_rate, workload.unsampled_top],
        "regime": regime.model_dump(mode="json", exclude={"arrivals"}),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _shipped() -> dict[str, float]:
    table = files("hbm_sim") / "workloads" / "rates.json"
    if not table.is_file():
        return {}
    found: dict[str, float] = json.loads(table.read_text(encoding="utf-8"))
    return found


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "hbm-partition" / "rates"


def find_capacity(workload: Workload, regime: Regime, rows: RowRule = "tz") -> float:
    """`capacity_per_s`, by simulation of every α on the grid over one stream."""
    from hbm_sim.engine import EngineNode
    from hbm_sim.stream import stream_of_phases
    from hbm_sim.workload import Phase

    phases = [Phase("", WARM_UP, regime), Phase("only", REQUESTS, regime)]
    stream = stream_of_phases(workload, phases, [1.0, 1.0], SEED, workload.sample_rate)
    spec = workload.node_spec()
    info = spec.info
    gaps = np.random.default_rng([SEED, 36]).exponential(size=(ARRIVAL_DRAWS, REQUESTS))
    best = 0.0
    for alpha in np.arange(info.alpha_min, info.alpha_max + 1e-9, ALPHA_STEP):
        node = EngineNode(spec, float(alpha), stream.rate, rows, sampled_rows=len(stream.row_keys))
        node.serve(stream, 0, len(stream))
        assert node.outcome is not None
        times = node.outcome.gather_ms[WARM_UP:], node.outcome.compute_ms[WARM_UP:]
        overlap = info.cost_model == CostModel.OVERLAP
        best = max(best, _rate_within(gaps, *times, overlap, info.slo_ms, best))
    return best


def _rate_within(
    gaps: npt.NDArray[np.float64],
    gather_ms: npt.NDArray[np.float64],
    compute_ms: npt.NDArray[np.float64],
    overlap: bool,
    slo_ms: float,
    at_least: float,
) -> float:
    """Highest rate per second at which pooled P99 stays within the SLO; 0 below `at_least`."""

    def p99(per_s: float) -> float:
        latencies = [
            queue_ms(np.cumsum(draw) * (1e3 / per_s), gather_ms, compute_ms, overlap=overlap)
            for draw in gaps
        ]
        return float(np.percentile(np.concatenate(latencies), 99))

    if at_least > 0.0 and p99(at_least) > slo_ms:
        return 0.0
    busy_ms = np.maximum(gather_ms, compute_ms) if overlap else gather_ms + compute_ms
    low, high = at_least, 1e3 / float(busy_ms.mean())
    while high - low > 1e-4 * high:
        middle = (low + high) / 2.0
        if p99(middle) <= slo_ms:
            low = middle
        else:
            high = middle
    return low


def main(arguments: list[str] | None = None) -> int:
    """Finds what `workloads/rates.json` lacks and writes it there."""
    import argparse

    from hbm_sim.workload import load_workload, workloads

    parser = argparse.ArgumentParser(prog="python -m hbm_sim.load_level", description=main.__doc__)
    parser.add_argument("--workloads", default=",".join(workloads()))
    parser.add_argument("--gather", default="serial,overlap")
    parser.add_argument("--rows", default="tz", help="tz, lru or both")
    chosen = parser.parse_args(arguments)
    path = Path(str(files("hbm_sim") / "workloads" / "rates.json"))
    for name in chosen.workloads.split(","):
        for gather in chosen.gather.split(","):
            workload = load_workload(name).with_gather(gather)
            for rows in chosen.rows.split(","):
                for phase in workload.phases():
                    known = json.loads(path.read_text()) if path.exists() else {}
                    key = _key(workload, phase.regime, rows)
                    if key not in known:
                        known[key] = round(find_capacity(workload, phase.regime, rows), 4)
                        print(
                            f"{name} {gather} {rows} {phase.name}: {known[key]} per s", flush=True
                        )
                        path.write_text(json.dumps(known, indent=0, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
