"""One episode: a drawn stream, the twin's curves over it, and what every static α would have cost.

The last is privileged: it serves the reward and the table environment, no policy sees it. Times of
a static run do not depend on when requests arrive, so it is made first, and the arrival rates of
each stretch follow from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from hbm_pool.contracts.records import CURVES, CostModel
from hbm_sim.curve_track import CurveTrack
from hbm_sim.engine import EngineNode
from hbm_sim.faults import scaled
from hbm_sim.node_spec import NodeSpec
from hbm_sim.stream import Stream, stream_of_phases

from hbm_learn.domain import Domain, Drawn, draw

FORMAT: Final = 1
"""Of the files in a library's folder."""
POINTS: Final = 17
"""Static α of the tables, evenly over the node's bounds."""
WINDOW_REQUESTS: Final = 256
"""Requests around one over which its best static α is taken."""
TICK_S: Final = 0.25
KEPT: Final = 96
"""Episodes that a library keeps in memory."""

Columns = npt.NDArray[np.float32]


class Tables(NamedTuple):
    """What each request costs at each static α, `[n, POINTS]`."""

    gather_ms: Columns
    compute_ms: Columns
    cached_tokens: Columns
    missed_rows: Columns
    looked_up_rows: Columns


@dataclasses.dataclass(frozen=True)
class Episode:
    """Everything an environment needs; nothing of it is changed by a run."""

    drawn: Drawn
    stream: Stream
    spec: NodeSpec
    track: CurveTrack
    alphas: npt.NDArray[np.float64]  # [POINTS]
    tables: Tables

    @property
    def seed(self) -> int:
        """Seed of the draw."""
        return self.drawn.seed

    @property
    def overlap(self) -> bool:
        """The node gathers while it computes."""
        return self.spec.info.cost_model == CostModel.OVERLAP

    @property
    def begins_s(self) -> float:
        """When the warm-up ends."""
        return float(self.stream.arrival_s[self.stream.warm_up])

    @cached_property
    def best_ms(self) -> npt.NDArray[np.float64]:
        """Service time of each request on a pool that is warm at the α best for the requests
        around it, `[n]`."""
        service = service_ms(self.tables, self.overlap)
        best = around(service, WINDOW_REQUESTS).argmin(axis=1)
        chosen: npt.NDArray[np.float64] = service[np.arange(len(service)), best]
        return chosen


def service_ms(tables: Tables, overlap: bool) -> npt.NDArray[np.float64]:
    """What one request takes of the server, `[n, POINTS]`."""
    gather, compute = tables.gather_ms.astype(np.float64), tables.compute_ms.astype(np.float64)
    return np.maximum(gather, compute) if overlap else gather + compute


def around(values: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Mean over the `window` rows around each row, fewer at the ends, `[n, k]`."""
    n = len(values)
    sums = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)])
    begin = np.maximum(np.arange(n) - window // 2, 0)
    end = np.minimum(np.arange(n) + window // 2 + 1, n)
    means: npt.NDArray[np.float64] = (sums[end] - sums[begin]) / (end - begin)[:, None]
    return means


def make_episode(domain: Domain, seed: int) -> Episode:
    """Draws and simulates what an episode is made of: about two seconds of one core."""
    drawn = draw(domain, seed)
    stream = stream_of_phases(
        drawn.workload, list(drawn.phases), [1.0] * len(drawn.phases), seed, domain.sample_rate
    )
    spec = drawn.workload.node_spec()
    alphas = np.linspace(spec.info.alpha_min, spec.info.alpha_max, POINTS)
    tables = _tables(stream, spec, alphas)
    service = service_ms(tables, spec.info.cost_model == CostModel.OVERLAP)
    lengths = [phase.requests for phase in drawn.phases]
    edges = np.concatenate([[0], np.cumsum(lengths)])
    best = np.array([service[a:b].mean(axis=0).min() for a, b in pairwise(edges.tolist())])
    gaps = np.diff(stream.arrival_s, prepend=0.0) * np.repeat(best / 1e3 / drawn.loads, lengths)
    stream = dataclasses.replace(stream, arrival_s=np.cumsum(gaps))
    spec = _spec(drawn, float(np.average(best, weights=lengths)))
    track = CurveTrack.of(stream, spec, tick_s=TICK_S, rate=drawn.twin_rate)
    return Episode(drawn, stream, spec, track, alphas, tables)


def _tables(stream: Stream, spec: NodeSpec, alphas: npt.NDArray[np.float64]) -> Tables:
    columns: list[list[npt.NDArray[np.float64]]] = []
    for alpha in alphas.tolist():
        node = EngineNode(spec, alpha, stream.rate, sampled_rows=len(stream.row_keys))
        node.serve(stream, 0, len(stream))
        outcome = node.outcome
        assert outcome is not None
        columns.append([getattr(outcome, name) for name in Tables._fields])
    return Tables(
        *(np.stack(each, axis=1).astype(np.float32) for each in zip(*columns, strict=True))
    )


def _spec(drawn: Drawn, best_ms: float) -> NodeSpec:
    """The node with its latency goal, and with what it says wrongly, late or with noise."""
    spec = drawn.workload.node_spec()
    return dataclasses.replace(
        spec,
        info=dataclasses.replace(spec.info, slo_ms=drawn.slo_factor * best_ms),
        declared=scaled(spec.costs, drawn.cost_error),
        telemetry_noise=drawn.noise,
        telemetry_delay_ticks=drawn.delay_ticks,
    )


class Library:
    """Episodes of one domain by seed. With a folder they are simulated once and then read."""

    def __init__(self, domain: Domain, folder: Path | None = None) -> None:
        self.domain = domain
        self.folder = folder
        self._digest = hashlib.sha256(f"{FORMAT} {domain.model_dump_json()}".encode()).hexdigest()
        self._kept: dict[int, Episode] = {}

    def episode(self, seed: int) -> Episode:
        """The episode of a seed."""
        found = self._kept.pop(seed, None)
        if found is None:
            found = self._read(seed) or self._make(seed)
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
        self._kept[seed] = found
        return found

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Of these, the seeds that would have to be simulated."""
        return [seed for seed in seeds if seed not in self._kept and not self._path(seed).is_file()]

    def _path(self, seed: int) -> Path:
        return (self.folder or Path(os.devnull)) / f"{self._digest[:12]}-{seed}.npz"

    def _make(self, seed: int) -> Episode:
        episode = make_episode(self.domain, seed)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            columns = {
                field.name: getattr(episode.stream, field.name)
                for field in dataclasses.fields(Stream)
            }
            partial = self._path(seed).with_suffix(f".{os.getpid()}.npz")
            np.savez(
                partial,
                alphas=episode.alphas,
                curves=episode.track.records.view(np.uint8),
                slo_ms=episode.spec.info.slo_ms,
                **{f"stream_{name}": value for name, value in columns.items()},
                **{f"table_{name}": value for name, value in episode.tables._asdict().items()},
            )
            partial.replace(self._path(seed))
        return episode

    def _read(self, seed: int) -> Episode | None:
        try:
            held = np.load(self._path(seed))
        except (OSError, ValueError, BadZipFile):
            return None
        with held:
            drawn = draw(self.domain, seed)
            slo_ms = float(held["slo_ms"])
            spec = _spec(drawn, slo_ms / drawn.slo_factor)
            columns = {
                field.name: held[f"stream_{field.name}"] for field in dataclasses.fields(Stream)
            }
            stream = Stream(
                **{
                    **columns,
                    "name": str(columns["name"]),
                    "seed": int(columns["seed"]),
                    "rate": float(columns["rate"]),
                    "regimes": tuple(str(each) for each in columns["regimes"]),
                }
            )
            track = CurveTrack(
                TICK_S, held["curves"].view(CURVES), spec.declares(), spec.info.cost_model
            )
            tables = Tables(*(held[f"table_{name}"] for name in Tables._fields))
            return Episode(drawn, stream, spec, track, held["alphas"], tables)
