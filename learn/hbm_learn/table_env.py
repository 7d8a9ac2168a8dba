"""The table environment: the same decisions over tables instead of caches, for pre-training.

The policy is the real one, and so are the stream and the twin's curves; only the node is a look-up
(`table_kernel`). One decision stands for the whole period of a step, so the burst gate's ticks are
counted in periods; telemetry comes without delay or noise. A policy learns here in minutes what
moves are, and on the simulator what they cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from hbm_policy.config import GateConfig, PolicyConfig
from hbm_policy.decide import Policy
from hbm_policy.intake import read_curve
from hbm_policy.layers import Action
from hbm_policy.reading import Curve, Decision, PolicyState, Reading, Traffic
from hbm_pool.contracts.records import Mode
from hbm_sim.curve_track import tick_ns

from hbm_learn import table_kernel as at
from hbm_learn.env import EpisodeEnv
from hbm_learn.episode import TICK_S, WINDOW_REQUESTS, Episode, Library, around
from hbm_learn.pupil import NO_ACTION, TRAINED_STACK, Asking
from hbm_learn.reward import RewardConfig, Step
from hbm_learn.table_kernel import TableNode, percentiles_ms, serve_from_tables

SETTLING: Final = 24
"""Decisions before the first that counts: averages and the gate learn what is normal."""
_AUTO: Final = int(Mode.AUTO)
_TIMES: Final = slice(at.GATHER, at.SERVICE + 1)


class _Prepared(NamedTuple):
    node: TableNode
    curves: list[Curve]
    """One per period."""
    best_sum_ms: npt.NDArray[np.float64]  # [n + 1]
    first: int
    """Period of the first decision that counts."""


def coarse_stack(period_ticks: int, config: PolicyConfig = TRAINED_STACK) -> PolicyConfig:
    """The stack for one decision per period: what the gate counts in ticks, in periods."""
    gate = config.gate
    if gate is None:
        return config
    gate = GateConfig(
        **{
            **gate.model_dump(),
            "gate_burst_ticks": math.ceil(gate.gate_burst_ticks / period_ticks),
            "gate_refractory_ticks": math.ceil(gate.gate_refractory_ticks / period_ticks),
        }
    )
    return config.model_copy(update={"gate": gate})


class TableEnv(EpisodeEnv):
    """One step is one decision and the period behind it, looked up in tables."""

    def __init__(
        self, library: Library, seeds: Sequence[int], reward: RewardConfig, period_ticks: int
    ) -> None:
        super().__init__(library, seeds, reward, period_ticks)
        self._action = NO_ACTION
        self._policy = Policy(
            coarse_stack(period_ticks), residual=Asking(lambda observation: self._action)
        )
        self._prepared: dict[int, _Prepared] = {}
        self._state = PolicyState()

    def share(self, other: EpisodeEnv) -> None:
        """The tables in the node's form, too."""
        super().share(other)
        if isinstance(other, TableEnv):
            self._prepared = other._prepared

    def _steps_without(self, episode: Episode) -> list[Step]:
        env = TableEnv(self.library, self.seeds, self._reward, self.period_ticks)
        env.share(self)
        env._begin(episode)
        steps = []
        while True:
            observed, happened = env._go(NO_ACTION)
            steps.append(happened)
            if observed is None:
                return steps

    def _begin(self, episode: Episode) -> tuple[float, ...]:
        self._this = episode
        self._now = self._prepare(episode)
        info = episode.spec.info
        self._period = max(self._now.first - SETTLING, 0)
        alpha = min(max(episode.drawn.start_alpha, info.alpha_min), info.alpha_max)
        self._alpha = round(alpha * info.extents) / info.extents
        self._node_state = np.zeros(at.SLOTS)
        self._node_state[at.EMB_WARM] = self._alpha
        self._node_state[at.KV_WARM] = 1.0 - self._alpha
        self._node_state[at.FREE_MS] = self._time_ms
        self._bins = np.zeros(at.BINS)
        self._at = int(np.searchsorted(episode.stream.arrival_s, self._time_ms / 1e3))
        self._state = PolicyState()
        self._refill = 0.0
        self._reading = self._read()
        while self._period < self._now.first:
            self._decide(NO_ACTION)
            self._serve()
        return self._policy.observe(self._reading, self._state)

    def _go(self, action: Action) -> tuple[tuple[float, ...] | None, Step]:
        before, begin, late = self._alpha, self._at, self._node_state[at.LATE]
        served_ms = self._node_state[at.SERVICE]
        self._decide(action)
        self._serve()
        best = self._now.best_sum_ms
        happened = Step(
            requests=self._at - begin,
            late=int(self._node_state[at.LATE] - late),
            served_ms=float(self._node_state[at.SERVICE] - served_ms),
            best_ms=float(best[self._at] - best[begin]),
            moved=abs(self._alpha - before),
        )
        if self._period >= len(self._now.curves):
            return None, happened
        return self._policy.observe(self._reading, self._state), happened

    @property
    def _time_ms(self) -> float:
        """When the next decision is due."""
        return self._period * self.period_ticks * TICK_S * 1e3

    def _decide(self, action: Action) -> None:
        self._action = action
        decision: Decision = self._policy.decide(self._reading, self._state)
        self._state = decision.state
        self._alpha, self._refill = decision.target, decision.refill_bytes_per_s

    def _serve(self) -> None:
        self._period += 1
        pool_bytes = self._this.spec.info.extents * self._this.spec.info.extent_bytes
        self._at = serve_from_tables(
            self._now.node,
            self._node_state,
            self._bins,
            self._at,
            self._time_ms,
            self._alpha,
            self._refill / 1e3 / pool_bytes,
        )
        self._reading = self._read()

    def _read(self) -> Reading:
        """As the sidecar would read the records of such a node."""
        info, state = self._this.spec.info, self._node_state.tolist()
        counts = [int(value) for value in state[at.REQUESTS : at.MISSES + 1]]
        requests, hits, reused, computed, accesses, misses = counts
        now_ns = tick_ns(self._period * self.period_ticks - 1, TICK_S)
        p50_ms, p99_ms = percentiles_ms(self._bins, info.slo_ms)
        alpha, low, high = self._alpha, info.alpha_min, info.alpha_max
        curve = self._now.curves[min(self._period, len(self._now.curves)) - 1]
        traffic = Traffic(
            0, 0, p50_ms, p99_ms, 0, requests, hits, reused, computed, misses, *state[_TIMES]
        )
        return Reading(
            now_ns,
            boot_epoch=1,
            telemetry_ns=now_ns,
            telemetry_epoch=1,
            alpha=alpha,
            alpha_target=alpha,
            command_generation=max(1, self._state.generation),
            moving=False,
            draining=False,
            requests=requests,
            emb_accesses=accesses,
            emb_slots=round(alpha * info.extents) * info.classes[0].rows_per_extent,
            refill_backlog_rows=0,
            link_busy=0.0,
            extents=info.extents,
            server_alpha_min=low,
            server_alpha_max=high,
            mode=_AUTO,
            alpha_min=low,
            alpha_max=high,
            alpha_fixed=math.nan,
            refill_bytes_per_s=self._this.drawn.refill_bytes_per_s,
            curve=curve,
            pool_bytes=info.extents * info.extent_bytes,
            slo_ms=info.slo_ms,
            traffic=traffic,
        )

    def _prepare(self, episode: Episode) -> _Prepared:
        found = self._prepared.get(episode.seed)
        if found is None:
            found = self._prepared[episode.seed] = _prepared(episode, self.period_ticks)
        return found


def _prepared(episode: Episode, period_ticks: int) -> _Prepared:
    tables, info = episode.tables, episode.spec.info
    missed = around(tables.missed_rows.astype(np.float64), WINDOW_REQUESTS)
    looked_up = around(tables.looked_up_rows.astype(np.float64), WINDOW_REQUESTS)
    node = TableNode(
        arrival_ms=episode.stream.arrival_s * 1e3,
        tokens=episode.stream.tokens.astype(np.float64),
        gather_ms=tables.gather_ms,
        compute_ms=tables.compute_ms,
        cached_tokens=tables.cached_tokens,
        looked_up_rows=tables.looked_up_rows,
        miss_ratio=(missed / np.maximum(looked_up, 1.0)).astype(np.float32),
        low=float(episode.alphas[0]),
        step=float(episode.alphas[1] - episode.alphas[0]),
        row_share=1.0 / (info.extents * info.classes[0].rows_per_extent),
        token_share=1.0 / (info.extents * info.pages_per_extent * info.page_tokens),
        slo_ms=info.slo_ms,
        overlap=episode.overlap,
    )
    records = episode.track.records[period_ticks - 1 :: period_ticks]
    return _Prepared(
        node,
        [read_curve(record) for record in records],
        np.concatenate([[0.0], np.cumsum(episode.best_ms)]),
        math.ceil(episode.begins_s / (period_ticks * TICK_S)),
    )
