"""Arms that steer by what the server has measured of itself: PID, hill climb, Bayesian search.

None of them knows what another α would have cost. They compare the present with the past, or with
a set point; what traffic does meanwhile looks to them like the effect of their own moves.
"""

from __future__ import annotations

import math
from typing import Any, Final

from hbm_sim.loop import Action, Observation
from hbm_sim.node_spec import NodeSpec

from hbm_study.arms.config import BayesArm, ClimbArm, PidArm
from hbm_study.arms.steering import Steering

_EPSILON_MS: Final = 1e-6


class _Sums:
    """Time by part since the last look, from the server's counters."""

    _COUNTERS: Final = ("requests", "gather_ms", "compute_ms", "service_ms", "candidate_tokens")

    def __init__(self) -> None:
        self._before: dict[str, float] | None = None

    def look(self, telemetry: Any) -> dict[str, float] | None:
        """Growth of each counter; None at first, after a restart, or when nothing was served."""
        now = {name: float(telemetry[name]) for name in self._COUNTERS}
        before, self._before = self._before, now
        if before is None or now["requests"] <= before["requests"]:
            return None
        grown = {name: now[name] - before[name] for name in self._COUNTERS}
        return grown if all(math.isfinite(value) for value in grown.values()) else None


class Pid:
    """Velocity form: what is at a bound does not wind up.

    The error is ln(time of missed rows ÷ time of recomputed tokens) less the set point. Time of
    missed rows grows when α is too small, of recomputed tokens when it is too large; which ratio
    is best is not known and tuned, which is what a PID has instead of a model.
    """

    def __init__(self, name: str, config: PidArm) -> None:
        self.name = name
        self._config = config
        self._steering = Steering(config.moves)
        self._sums = _Sums()
        self._errors = (math.nan, math.nan)
        self._due_s = config.period_s
        self._alpha = math.nan

    def start(self, spec: NodeSpec, seed: int) -> None:
        """Nothing to prepare: costs are those that telemetry declares."""

    def act(self, observation: Observation) -> Action:
        """A correction each period."""
        if observation.time_s >= self._due_s:
            self._due_s = observation.time_s + self._config.period_s
            self._correct(observation)
        return self._steering.action(
            observation.reading, None if math.isnan(self._alpha) else self._alpha
        )

    def _correct(self, observation: Observation) -> None:
        grown = self._sums.look(observation.telemetry)
        if grown is None:
            return
        config = self._config
        telemetry, reading = observation.telemetry, observation.reading
        own_ms = (
            float(telemetry["cost_fixed_ms"]) * grown["requests"]
            + float(telemetry["cost_token_ms"]) * grown["candidate_tokens"]
        )
        recompute_ms = max(grown["compute_ms"] - own_ms, _EPSILON_MS)
        error = math.log(max(grown["gather_ms"], _EPSILON_MS) / recompute_ms) - config.log_ratio
        if not math.isfinite(error):
            return
        last, before = self._errors
        step = config.integral * error
        if not math.isnan(last):
            step += config.proportional * (error - last)
            if not math.isnan(before):
                step += config.derivative * (error - 2.0 * last + before)
        self._errors = (error, last)
        here = self._alpha if not math.isnan(self._alpha) else reading.alpha_target
        self._alpha = min(max(here + step, reading.alpha_min), reading.alpha_max)


class Climb:
    """One step each period; the direction is kept while mean service time falls."""

    def __init__(self, name: str, config: ClimbArm) -> None:
        self.name = name
        self._config = config
        self._steering = Steering(config.moves)
        self._sums = _Sums()
        self._due_s = config.period_s
        self._alpha = math.nan
        self._step = config.step
        self._cost_ms = math.nan

    def start(self, spec: NodeSpec, seed: int) -> None:
        """Nothing to prepare."""

    def act(self, observation: Observation) -> Action:
        """A step each period."""
        reading = observation.reading
        if observation.time_s >= self._due_s:
            self._due_s = observation.time_s + self._config.period_s
            grown = self._sums.look(observation.telemetry)
            if grown is not None:
                self._turn(grown["service_ms"] / grown["requests"])
                here = self._alpha if not math.isnan(self._alpha) else reading.alpha_target
                self._alpha = min(max(here + self._step, reading.alpha_min), reading.alpha_max)
        return self._steering.action(reading, None if math.isnan(self._alpha) else self._alpha)

    def _turn(self, cost_ms: float) -> None:
        config, before = self._config, self._cost_ms
        self._cost_ms = cost_ms
        if math.isnan(before):
            return
        if abs(cost_ms / before - 1.0) > config.restart:
            self._step = math.copysign(config.step, self._step)
        elif cost_ms > before:
            self._step = -math.copysign(max(abs(self._step) / 2.0, config.step / 4.0), self._step)


class Bayes:
    """Each trial holds one α for a period and reports its mean service time to optuna."""

    def __init__(self, name: str, config: BayesArm) -> None:
        self.name = name
        self._config = config
        self._steering = Steering(config.moves)
        self._sums = _Sums()
        self._trials: list[Any] = []
        self._alpha = math.nan
        self._counts_from_s = math.inf
        self._due_s = 0.0
        self._seed = 0
        self._asked = 0

    def start(self, spec: NodeSpec, seed: int) -> None:
        """Search space: the server's bounds."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._seed = seed
        self._space = {
            "alpha": optuna.distributions.FloatDistribution(
                spec.info.alpha_min, spec.info.alpha_max
            )
        }

    def act(self, observation: Observation) -> Action:
        """Asks for the next α when a trial has ended."""
        now_s = observation.time_s
        if now_s >= self._counts_from_s:
            self._counts_from_s = math.inf
            self._sums.look(observation.telemetry)
        if now_s >= self._due_s:
            if not math.isnan(self._alpha):
                self._tell(observation)
            self._alpha = self._ask()
            self._counts_from_s = now_s + self._config.settle_s
            self._due_s = now_s + self._config.settle_s + self._config.period_s
        return self._steering.action(observation.reading, self._alpha)

    def _tell(self, observation: Observation) -> None:
        import optuna

        grown = self._sums.look(observation.telemetry)
        if grown is None:
            return
        self._trials.append(
            optuna.trial.create_trial(
                params={"alpha": self._alpha},
                distributions=self._space,
                value=grown["service_ms"] / grown["requests"],
            )
        )
        del self._trials[: -self._config.trials]

    def _ask(self) -> float:
        import optuna

        config = self._config
        self._asked += 1
        seed = self._seed * 100_003 + self._asked
        sampler: Any
        if config.sampler == "gp":
            sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=config.startup)
        else:
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=config.startup)
        # A study of the remembered trials alone: a study cannot forget.
        study = optuna.create_study(sampler=sampler)
        study.add_trials(self._trials)
        return float(study.ask(self._space).params["alpha"])
