"""`python -m hbm_demo.warm`: compiles what the twin and the sweep need into numba's cache.

On a machine's first demo this takes a while; the adaptive arm must not spend its first regime so.
"""

from __future__ import annotations

import numpy as np
from hbm_load import generate, load_scenario
from hbm_policy.twin import Twin
from hbm_pool.contracts.records import CURVES
from hbm_sim.model_file import costs_of, load_node
from hbm_sim.requests import TraceRequests
from hbm_sim.sweep import static_sweep

from hbm_demo.settings import MODEL_PRESET

_REQUESTS = 12


def main() -> None:
    """Runs both once over a handful of requests."""
    info, config = load_node(MODEL_PRESET)
    costs = costs_of(config, fixed_ms=1.0, token_us=1.0, token_context_ns=1.0)
    requests = TraceRequests(generate(load_scenario("demo"), 1, requests=_REQUESTS), info)
    twin = Twin(info)
    twin.feed([each.sample for each in requests], 0, costs)
    twin.curves(np.zeros((), dtype=CURVES))
    static_sweep(requests, info, costs)


if __name__ == "__main__":
    main()
