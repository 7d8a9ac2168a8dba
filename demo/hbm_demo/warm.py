"""`python -m hbm_demo.warm`: compiles what server, twin and sweep need into numba's cache.

On a machine's first demo this takes a while; no server must measure its prices, and the adaptive
arm not spend its first regime, beside it.
"""

from __future__ import annotations

import numpy as np
from hbm_load import generate, load_scenario
from hbm_policy.twin import Twin
from hbm_pool.contracts.records import CURVES
from hbm_serving.config import load_config
from hbm_serving.engine import Engine
from hbm_sim.model_file import costs_of, load_node
from hbm_sim.requests import TraceRequests
from hbm_sim.sweep import static_sweep

from hbm_demo.settings import MODEL_PRESET

_REQUESTS = 12


def main() -> None:
    """Starts a server, and runs the others once over a handful of requests."""
    Engine(load_config(MODEL_PRESET)).close()
    info, config = load_node(MODEL_PRESET)
    costs = costs_of(config, fixed_ms=1.0, token_us=1.0, token_context_ns=1.0)
    requests = TraceRequests(generate(load_scenario("demo"), 1, requests=_REQUESTS), info)
    twin = Twin(info)
    twin.feed([each.sample for each in requests], 0, costs)
    twin.curves(np.zeros((), dtype=CURVES))
    static_sweep(requests, info, costs)


if __name__ == "__main__":
    main()
