"""Workloads: scenarios, traces and the open-loop load generator."""

from hbm_load.errors import LoadError, LogError, ScenarioError
from hbm_load.generate import generate
from hbm_load.scenario import Scenario, load_scenario, scenarios
from hbm_load.trace import Trace, TraceRequest

__all__ = [
    "LoadError",
    "LogError",
    "Scenario",
    "ScenarioError",
    "Trace",
    "TraceRequest",
    "generate",
    "load_scenario",
    "scenarios",
]
