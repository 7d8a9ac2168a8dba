"""The simulator: one node under a static split, and 64 nodes behind the router.

* `node`: 50,000 requests of the STD node (regime R1) at one α, from cold, with compiled code; the
  stream is drawn before. Goal: ≤ 10 s on one core.
* `fleet`: 64 nodes for ten minutes at 20 requests per second each behind the real router scoring,
  α held; 2 nodes for ten seconds when quick. Goal: ≤ 2 minutes.
"""

from __future__ import annotations

import time
from typing import Any

QPS_PER_NODE = 20.0
FLEET_RATE = 0.002
"""Share of rows that the fleet follows."""


def run(quick: bool, seed: int) -> dict[str, Any]:
    """Seconds of the clock and of the processor."""
    requests = 2_000 if quick else 50_000
    nodes, seconds = (2, 10.0) if quick else (64, 600.0)
    return {"node": node(requests, seed), "fleet": fleet(nodes, seconds, seed)}


def node(requests: int, seed: int) -> dict[str, Any]:
    """One static node."""
    from hbm_sim.engine import EngineNode
    from hbm_sim.stream import stream_of_phases
    from hbm_sim.workload import Phase, load_workload

    workload = load_workload("mix")
    regime = workload.regimes["R1"]
    spec = workload.node_spec()
    began_s = time.perf_counter()
    stream = stream_of_phases(
        workload, [Phase("R1", requests, regime)], [50.0], seed, workload.sample_rate
    )
    drawn_s = time.perf_counter() - began_s
    for _ in range(2):  # the first one compiles
        engine = EngineNode(spec, 0.5, stream.rate, sampled_rows=len(stream.row_keys))
        began_s, busy_s = time.perf_counter(), time.process_time()
        engine.serve(stream, 0, len(stream))
        took_s, took_cpu_s = time.perf_counter() - began_s, time.process_time() - busy_s
    return {
        "goal_s": 10.0,
        "requests": requests,
        "stream_s": drawn_s,
        "serve_s": took_s,
        "serve_cpu_s": took_cpu_s,
    }


def fleet(nodes: int, seconds: float, seed: int) -> dict[str, Any]:
    """All nodes of a fleet on one stream."""
    from hbm_sim.fleet import run_fleet
    from hbm_sim.stream import stream_of_phases
    from hbm_sim.workload import Phase, load_workload

    workload = load_workload("mix")
    requests = round(seconds * nodes * QPS_PER_NODE)
    phases = [Phase("R2", requests, workload.regimes["R2"])]
    began_s = time.perf_counter()
    stream = stream_of_phases(workload, phases, [nodes * QPS_PER_NODE], seed, FLEET_RATE)
    drawn_s = time.perf_counter() - began_s
    began_s, busy_s = time.perf_counter(), time.process_time()
    found = run_fleet(stream, workload.node_spec(), nodes, seed)
    return {
        "goal_s": 120.0,
        "nodes": nodes,
        "simulated_s": seconds,
        "requests": requests,
        "stream_s": drawn_s,
        "run_s": time.perf_counter() - began_s,
        "run_cpu_s": time.process_time() - busy_s,
        "kv_hit_ratio": float(found.kv_hit.mean()),
    }
