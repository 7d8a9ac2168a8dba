"""Simulated nodes that run the pool's own index code: the static sweep for α*."""

from hbm_sim.node import Node
from hbm_sim.requests import SimRequest, TraceRequests, sample_of
from hbm_sim.sweep import Optimum, RegimeSweep, Sweep, SweepError, static_sweep

__all__ = [
    "Node",
    "Optimum",
    "RegimeSweep",
    "SimRequest",
    "Sweep",
    "SweepError",
    "TraceRequests",
    "sample_of",
    "static_sweep",
]
