"""Where jobs run: on the cores of this machine (joblib), or on a cluster (Ray)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class Backend(Protocol):
    """Runs one function over many jobs; results come as they are finished, in any order.

    A job is taken from `jobs` only when a worker is free for it, so that whoever makes them may
    stop at any time.
    """

    def run(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]: ...


class JoblibBackend:
    """Worker processes on this machine."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """One worker: in this process, so that an error's trace is its own."""
        if self.workers == 1:
            yield from map(function, jobs)
            return
        import joblib

        parallel = joblib.Parallel(
            n_jobs=self.workers,
            return_as="generator_unordered",
            pre_dispatch=self.workers,
            batch_size=1,
        )
        yield from parallel(joblib.delayed(function)(job) for job in jobs)


class RayBackend:
    """Tasks on the Ray cluster of `RAY_ADDRESS`; without it one is started on this machine.

    Nodes must have the package and see the output folder under the same path.
    """

    def __init__(self, workers: int) -> None:
        import ray

        self._ray: Any = ray
        if not ray.is_initialized():
            # A cluster that is there already has its own idea of how many cores it has.
            here = not os.environ.get("RAY_ADDRESS")
            ray.init(num_cpus=workers if here else None, log_to_driver=False)
        self.workers = workers

    def run(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """At most `workers` tasks at once."""
        remote = self._ray.remote(num_cpus=1)(function)
        waiting = iter(jobs)
        running = [remote.remote(job) for job in itertools.islice(waiting, self.workers)]
        while running:
            done, running = self._ray.wait(running, num_returns=1)
            running += [remote.remote(job) for job in itertools.islice(waiting, 1)]
            yield self._ray.get(done[0])


def backend(name: str, workers: int) -> Backend:
    """`joblib` or `ray`. Raises ImportError when Ray is not installed."""
    return RayBackend(workers) if name == "ray" else JoblibBackend(workers)
