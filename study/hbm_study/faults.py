"""The fault set: what goes wrong in a scene, by name, spread over the length of its stream."""

from __future__ import annotations

from typing import Final

from hbm_sim.faults import Fault, FaultKind

TIMES: Final = 10
"""A short fault comes so often: once would not be seen in a percentile."""
SHORT_S: Final = 2.0
FAULTS: Final = {
    "": "none",
    "costs-x4": "the server declares a missed row at four times its cost, all along",
    "costs-x0.25": "the server declares a missed row at a quarter of its cost, all along",
    "frozen": "telemetry stays what it was for 2 s, ten times",
    "nan": "telemetry states α and latencies that are no numbers for 2 s, ten times",
    "twin-dead": "the twin publishes nothing new from 40 % of the stream on",
    "clock-jump": "the clock of decisions is 10 s ahead, then 10 s behind, 2 s each, five times",
    "restart": "the server dies at half the stream and is back at once, empty",
}


class UnknownFault(ValueError):
    """A name that is not in `FAULTS`."""


def faults_of(name: str, length_s: float) -> tuple[Fault, ...]:
    """Faults of a stream of that length. Raises `UnknownFault`."""
    at_s = [length_s * (index + 1) / (TIMES + 1) for index in range(TIMES)]
    match name:
        case "":
            return ()
        case "costs-x4":
            return (Fault(FaultKind.COSTS, factor=4.0),)
        case "costs-x0.25":
            return (Fault(FaultKind.COSTS, factor=0.25),)
        case "frozen":
            return tuple(Fault(FaultKind.FROZEN, each, SHORT_S) for each in at_s)
        case "nan":
            return tuple(Fault(FaultKind.NAN, each, SHORT_S) for each in at_s)
        case "twin-dead":
            return (Fault(FaultKind.TWIN_DEAD, 0.4 * length_s),)
        case "clock-jump":
            return tuple(
                Fault(FaultKind.CLOCK_JUMP, each, SHORT_S, 10.0 if index % 2 == 0 else -10.0)
                for index, each in enumerate(at_s)
            )
        case "restart":
            return (Fault(FaultKind.RESTART, 0.5 * length_s),)
    raise UnknownFault(f"no fault is called {name!r}; known: {', '.join(filter(None, FAULTS))}")
