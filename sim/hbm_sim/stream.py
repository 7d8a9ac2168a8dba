"""A workload and a seed make a stream of requests: columns for the compiled engine and the twin.

A user's history is drawn at the first visit and grows with every visit; a request carries all of
it. Of the rows only the hash sample is there, with the true numbers of lookups beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from hbm_sim.load_level import phase_rates
from hbm_sim.row_mix import NOTHING, Popularity, SampledRows
from hbm_sim.stream_draw import draw_visits, fill, most_rows
from hbm_sim.workload import Phase, Workload, WorkloadError

Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]
CHURN_STEP: Final = 0.005
"""Popularity is drawn anew after this share of all ranks has changed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stream:
    """Requests in order of arrival; n of them, S sampled rows. Equal inputs, equal stream."""

    name: str
    seed: int
    rate: float
    """Share of rows that is in the sample."""
    regimes: tuple[str, ...]
    arrival_s: npt.NDArray[np.float64]  # [n] intended
    user: Ints  # [n] never 0
    tokens: Numbers  # [n] history, new tokens included
    new_tokens: Numbers  # [n] of it, since the user's last visit (all of it at the first)
    candidates: Numbers  # [n]
    dropped: Numbers  # [n] tokens that the server has cut from the start of the history
    regime: npt.NDArray[np.int16]  # [n] index into `regimes`
    settled: npt.NDArray[np.bool_]  # [n] past the leading part of its step
    counted: npt.NDArray[np.bool_]  # [n] not warm-up
    history_lookups: Ints  # [n] true number, all rows of the history
    candidate_lookups: Ints  # [n]
    history_at: Ints  # [n + 1] into the two below
    history_rows: Numbers  # sampled rows by number
    history_positions: Numbers  # token of the history that looks the row up, ascending
    candidate_at: Ints  # [n + 1]
    candidate_rows: Numbers
    row_keys: npt.NDArray[np.uint64]  # [S] row key of a number

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def warm_up(self) -> int:
        """Requests at the beginning that are never counted."""
        return int(np.argmax(self.counted)) if self.counted.any() else len(self)

    def of_regime(self, name: str, *, settled: bool = True) -> npt.NDArray[np.bool_]:
        """Mask of the counted requests of a regime; `settled`: only those past its beginning."""
        mask = self.counted & (self.regime == self.regimes.index(name))
        wanted: npt.NDArray[np.bool_] = mask & self.settled if settled else mask
        return wanted

    def fingerprint(self) -> str:
        """Hash of all columns: equal streams, equal hash."""
        digest = xxhash.xxh3_64(f"{self.rate} {self.regimes}".encode())
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                digest.update(np.ascontiguousarray(value).data)
        return digest.hexdigest()


def make_stream(
    workload: Workload,
    seed: int,
    rate: float | None = None,
    *,
    load: float = 1.0,
    qps: float | None = None,
    requests: int | None = None,
) -> Stream:
    """Draws a stream. `rate`: share of rows followed, by default the workload's.

    `load` x: every regime arrives at x times the rate at which its own best α just meets the
    node's SLO at P99. `qps` gives all regimes one rate instead. `requests` cuts the walk short.

    Raises WorkloadError for values out of range.
    """
    rate = workload.sample_rate if rate is None else rate
    if not 0.0 < rate <= 1.0:
        raise WorkloadError(f"rate is {rate}; it must be above 0 and at most 1")
    if seed < 0:
        raise WorkloadError(f"seed is {seed}; it must be 0 or more")
    if requests is not None and requests < 1:
        raise WorkloadError(f"requests is {requests}; it must be at least 1")
    phases = _cut(workload, requests)
    if qps is not None:
        if not qps > 0.0:
            raise WorkloadError(f"qps is {qps}; it must be above 0")
        rates = [qps] * len(phases)
    else:
        if not load > 0.0:
            raise WorkloadError(f"load is {load}; it must be above 0")
        rates = [load * each for each in phase_rates(workload, phases)]
    return stream_of_phases(workload, phases, rates, seed, rate)


def _cut(workload: Workload, requests: int | None) -> list[Phase]:
    """The warm-up (a phase without a name), then the walk, at most `requests` of it."""
    walk = workload.phases()
    left = sum(phase.requests for phase in walk) if requests is None else requests
    phases = [Phase("", workload.warm_up, walk[0].regime)] if workload.warm_up else []
    for phase in walk:
        if left > 0:
            phases.append(phase._replace(requests=min(phase.requests, left)))
            left -= phase.requests
    return phases


def stream_of_phases(
    workload: Workload, phases: list[Phase], rates: list[float], seed: int, rate: float
) -> Stream:
    """A stream of given stretches at given arrival rates per second; a nameless one is warm-up."""
    lengths = [phase.requests for phase in phases]
    labels = tuple(dict.fromkeys(phase.name for phase in phases if phase.name)) or ("warm-up",)
    lookups = workload.node.lookups_per_token
    visits = _visits(workload, phases, seed)
    candidates = np.repeat(np.array([p.regime.candidates for p in phases], np.int32), lengths)
    rows = SampledRows(workload.rows, rate, workload.unsampled_top, seed)
    histories = _histories(workload, phases, visits, candidates, rows, seed)
    gaps = np.random.default_rng([seed, 35]).exponential(size=sum(lengths))
    settled = [np.arange(n) >= workload.settle_share * n for n in lengths]
    counted = np.repeat([bool(phase.name) for phase in phases], lengths)
    return Stream(
        name=workload.name,
        seed=seed,
        rate=rate,
        regimes=labels,
        arrival_s=np.cumsum(gaps / np.repeat(rates, lengths)),
        user=visits.population + 1,
        tokens=(visits.life - visits.dropped).astype(np.int32),
        new_tokens=(visits.life - visits.before).astype(np.int32),
        candidates=candidates,
        dropped=visits.dropped,
        regime=np.repeat(
            np.array([labels.index(p.name) if p.name else 0 for p in phases], np.int16), lengths
        ),
        settled=np.concatenate(settled) & counted,
        counted=counted,
        history_lookups=(visits.life - visits.dropped) * lookups,
        candidate_lookups=candidates.astype(np.int64) * lookups,
        history_at=histories.history_at,
        history_rows=histories.history_rows,
        history_positions=histories.history_positions,
        candidate_at=histories.candidate_at,
        candidate_rows=histories.candidate_rows,
        row_keys=rows.keys,
    )


class _Visits(NamedTuple):
    population: Ints  # [n] index of the user
    previous: Ints  # [n] the user's request before, -1: none
    life: Ints  # [n] tokens of the history ever, this visit's included
    before: Ints  # [n] of them, known before this visit
    growth: Numbers  # [n] tokens that the visit adds
    dropped: Numbers  # [n]


def _visits(workload: Workload, phases: list[Phase], seed: int) -> _Visits:
    lengths = [phase.requests for phase in phases]
    n = sum(lengths)
    random = np.random.default_rng([seed, 32])
    cohorts = sorted({phase.regime.users.cohort for phase in phases})
    size = max(p.regime.users.hot_users + p.regime.users.one_off_users for p in phases)

    def column(values: Iterable[float], kind: Any = np.float64) -> npt.NDArray[Any]:
        return np.repeat(np.array(list(values), kind), lengths)

    users = [phase.regime.users for phase in phases]
    history = [phase.regime.history for phase in phases]
    first_user = column((cohorts.index(u.cohort) * size for u in users), np.int64)
    hot_users = column((u.hot_users for u in users), np.int64)
    back = np.exp(random.standard_normal(n) * column(u.revisit_sigma for u in users))
    back = np.floor(back * column(u.revisit_distance for u in users)).astype(np.int64) + 1
    hot = _hot_users(phases, random)
    one_off = (random.random(n) * column(u.one_off_users for u in users)).astype(np.int64)
    length = np.exp(random.standard_normal(n) * column(h.sigma for h in history))
    length = np.clip(
        length * column(h.median for h in history),
        column(h.minimum for h in history),
        column(h.maximum for h in history),
    )
    growth = column((round(h.growth) for h in history), np.int32)
    population, previous, life = (np.empty(n, np.int64) for _ in range(3))
    draw_visits(
        random.random(n),
        back,
        first_user + hot,
        first_user + hot_users + one_off,
        column(u.revisit for u in users),
        column(u.hot for u in users),
        length.astype(np.int32),
        growth,
        population,
        previous,
        life,
        np.full(size * len(cohorts), -1, np.int64),
    )
    node = workload.node
    over = np.maximum(life - node.max_sequence_tokens, 0)
    dropped = -(-over // node.drop_block_tokens) * node.drop_block_tokens
    before = np.where(previous < 0, 0, life - growth)
    return _Visits(population, previous, life, before, growth, dropped.astype(np.int32))


def _hot_users(phases: list[Phase], random: np.random.Generator) -> Ints:
    """Which hot user it is if it is one, `[n]`."""
    drawn = []
    for phase in phases:
        users = phase.regime.users
        weights = np.cumsum((np.arange(users.hot_users) + 1.0) ** -users.hot_zipf_s)
        drawn.append(np.searchsorted(weights, random.random(phase.requests) * weights[-1]))
    return np.concatenate(drawn).astype(np.int64)


class _Histories(NamedTuple):
    history_at: Ints
    history_rows: Numbers
    history_positions: Numbers
    candidate_at: Ints
    candidate_rows: Numbers


def _histories(
    workload: Workload,
    phases: list[Phase],
    visits: _Visits,
    candidates: Numbers,
    rows: SampledRows,
    seed: int,
) -> _Histories:
    n = len(candidates)
    lookups = workload.node.lookups_per_token
    random = np.random.default_rng([seed, 33])
    rows_seed = np.uint64(np.random.default_rng([seed, 34]).integers(1 << 62))
    history_at, totals, candidate_at = (np.zeros(n + 1, np.int64) for _ in range(3))
    history_rows, positions = np.empty(0, np.int32), np.empty(0, np.int32)
    drawn: list[Numbers] = []
    counter = 0
    for start, stop, main, shelf, share in _epochs(phases, rows):
        span = slice(start, stop)
        latest = visits.growth[span].astype(np.int64)
        base = visits.life[span] - latest
        fresh = np.where(visits.previous[span] < 0, base, 0)
        wanted = candidates[span].astype(np.int64)
        counts = np.stack(
            [
                random.binomial(fresh * lookups, main.mass),
                random.binomial(latest * lookups, (1.0 - share) * main.mass),
                random.binomial(latest * lookups, share * shelf.mass),
                random.binomial(wanted * lookups, (1.0 - share) * main.mass),
                random.binomial(wanted * lookups, share * shelf.mass),
            ]
        )
        most = int(history_at[start]) + most_rows(start, counts, visits.previous, totals)
        history_rows, positions = _grown(history_rows, most), _grown(positions, most)
        candidate_at[start + 1 : stop + 1] = candidate_at[start] + np.cumsum(counts[3] + counts[4])
        drawn.append(np.empty(int(candidate_at[stop] - candidate_at[start]), np.int32))
        counter = fill(
            start,
            counts,
            base,
            latest,
            visits.previous,
            visits.dropped,
            *main[1:],
            *shelf[1:],
            rows_seed,
            counter,
            history_at,
            history_rows,
            positions,
            drawn[-1],
        )
    used = int(history_at[n])
    return _Histories(
        history_at,
        history_rows[:used].copy(),
        positions[:used].copy(),
        candidate_at,
        np.concatenate(drawn),
    )


def _epochs(
    phases: list[Phase], rows: SampledRows
) -> Iterator[tuple[int, int, Popularity, Popularity, float]]:
    """Stretches of one popularity: (first request, end, catalogue, shelf, share of the shelf)."""
    known: dict[Any, Popularity] = {}

    def once(key: Any, make: Callable[[], Popularity]) -> Popularity:
        if key not in known:
            while len(known) >= 8:
                del known[next(iter(known))]
            known[key] = make()
        return known[key]

    at, churned = 0, 0.0
    for phase in phases:
        items = phase.regime.items
        step = phase.requests
        if items.churn > 0.0:
            step = max(1, int(CHURN_STEP * rows.rows / items.churn))
        shelf = NOTHING
        if items.new_share > 0.0:
            shelf_key = ("shelf", items.new_items, items.new_zipf_s)
            shelf = once(shelf_key, partial(rows.shelf, items))
        for first in range(0, phase.requests, step):
            stop = min(first + step, phase.requests)
            ranks = int(churned)
            key = (items.zipf_s, items.zipf_q, ranks)
            main = once(key, partial(rows.catalogue, items, ranks))
            yield at + first, at + stop, main, shelf, items.new_share
            churned += (stop - first) * items.churn
        at += phase.requests


def _grown(array: Numbers, size: int) -> Numbers:
    if size <= len(array):
        return array
    wider = np.empty(max(size, len(array) * 3 // 2), np.int32)
    wider[: len(array)] = array
    return wider
