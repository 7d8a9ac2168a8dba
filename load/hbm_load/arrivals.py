"""When requests arrive: a Poisson process with a wandering, swinging and flashing rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hbm_load.scenario import Arrivals

_GRID_S = 0.05
_HALF_LIFE_S = 1.0


def arrival_times(
    arrivals: Callable[[float], Arrivals],
    seconds: float,
    random: np.random.Generator,
    start_s: float = 0.0,
    count: int | None = None,
) -> npt.NDArray[np.float64]:
    """Arrival times of one step, `[n] float64` s within [start_s, start_s + seconds), ascending.

    `arrivals` gives the parameters at a position 0..1 of the step. An inhomogeneous Poisson
    process by time rescaling: unit-rate arrivals mapped through the inverse of the integrated
    rate (Cinlar 1975, chapter 4.7). With `count`, exactly that many (the process conditioned on
    its count).
    """
    cells = max(1, math.ceil(seconds / _GRID_S))
    edges = np.linspace(0.0, seconds, cells + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    parameters = [arrivals(float(middle / seconds)) for middle in middles]
    rate = np.array([each.rate_per_s for each in parameters])
    rate = rate * _modulation(parameters, seconds / cells, random)
    rate = rate * _swing(parameters, middles + start_s)
    rate = rate + _flashes(parameters, edges, random)
    mass = np.concatenate([[0.0], np.cumsum(rate * np.diff(edges))])
    number = int(random.poisson(mass[-1])) if count is None else count
    points = np.sort(random.random(number)) * mass[-1]
    times: npt.NDArray[np.float64] = np.interp(points, mass, edges) + start_s
    return times


def _modulation(
    parameters: list[Arrivals], cell_s: float, random: np.random.Generator
) -> npt.NDArray[np.float64]:
    noise = random.standard_normal(len(parameters))
    if all(each.modulation_sd == 0.0 for each in parameters):
        return np.ones(len(parameters))
    value, factors = float(noise[0]), np.empty(len(parameters))
    for cell, each in enumerate(parameters):
        keep = math.exp(-cell_s / each.modulation_correlation_s)
        value = keep * value + math.sqrt(1.0 - keep * keep) * float(noise[cell])
        # Minus half the variance: the mean of a lognormal factor is then 1.
        factors[cell] = math.exp(each.modulation_sd * value - each.modulation_sd**2 / 2)
    return factors


def _swing(parameters: list[Arrivals], times_s: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    amplitude = np.array([each.swing for each in parameters])
    phase = 2 * math.pi * times_s / np.array([each.swing_period_s for each in parameters])
    factor: npt.NDArray[np.float64] = 1.0 + amplitude * (np.sin(phase) + 0.5 * np.sin(2 * phase))
    factor[factor < 0.0] = 0.0
    return factor


def _flashes(
    parameters: list[Arrivals], edges: npt.NDArray[np.float64], random: np.random.Generator
) -> npt.NDArray[np.float64]:
    extra = np.zeros(len(parameters))
    lengths = np.diff(edges)
    starts = random.poisson(np.array([each.flashes_per_s for each in parameters]) * lengths)
    for cell in np.nonzero(starts)[0]:
        decay = parameters[cell].flash_decay
        scale = _HALF_LIFE_S / (2.0 ** (1.0 / decay) - 1.0)
        age = edges[cell:] - edges[cell]
        # Share of the crowd that has come by `age`, for a rate ~ (1 + age / scale)^-decay.
        arrived = 1.0 - (1.0 + age / scale) ** (1.0 - decay)
        crowd = starts[cell] * parameters[cell].flash_requests
        extra[cell:] += crowd * np.diff(arrived) / lengths[cell:]
    return extra
