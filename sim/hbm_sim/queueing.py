"""Waiting times of a stream of service times: first come, first served, one or two stations."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _latencies(arrival: Floats, gather: Floats, compute: Floats, overlap: bool) -> Floats:
    latency = np.empty(arrival.size)
    gathered = computed = 0.0
    for i in range(arrival.size):
        gathered = max(arrival[i], gathered if overlap else computed) + gather[i]
        computed = max(gathered, computed) + compute[i]
        latency[i] = computed - arrival[i]
    return latency


def queue_ms(arrival_ms: Floats, gather_ms: Floats, compute_ms: Floats, *, overlap: bool) -> Floats:
    """Latencies of requests served first come, first served, `[n]` ms (Lindley's recursion).

    Serial: one station. Overlap: gather and compute are two stations in tandem.
    """
    latency_ms: Floats = _latencies(arrival_ms, gather_ms, compute_ms, overlap)
    return latency_ms
