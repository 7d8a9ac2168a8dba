"""XGBoost and LSTM: what α* was, in training, when signals looked like this."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
from hbm_sim.loop import Action, Observation
from hbm_sim.node_spec import NodeSpec
from hbm_sim.stream import Stream

from hbm_study.arms.config import LearnedArm
from hbm_study.arms.networks import load_weights, lstm, model_path
from hbm_study.arms.signals import Signals
from hbm_study.arms.steering import Steering

Floats = npt.NDArray[np.float64]


class Predictor:
    """A regression from the last `window` looks at the signals."""

    def __init__(self, name: str, config: LearnedArm) -> None:
        """Raises `ArmError` when its model has not been trained."""
        self.name = name
        self._config = config
        self._steering = Steering(config.moves)
        self._window: deque[Floats] = deque(maxlen=config.window)
        self._due_s = config.period_s
        self._wanted: float | None = None
        self._predict = _xgboost(config) if config.kind == "xgboost" else _lstm(config)

    def start(self, spec: NodeSpec, seed: int) -> None:
        """Signals are relative to the node's SLO and longest history."""
        self._signals = Signals(spec.info.slo_ms, spec.info.max_sequence_tokens)

    def act(self, observation: Observation) -> Action:
        """A prediction each period, once the window is full."""
        if observation.time_s >= self._due_s:
            self._due_s = observation.time_s + self._config.period_s
            self._window.append(self._signals.look(observation.telemetry))
            if len(self._window) == self._config.window:
                predicted = self._predict(np.array(self._window))
                self._wanted = predicted if np.isfinite(predicted) else None
        return self._steering.action(observation.reading, self._wanted)

    def served(self, stream: Stream, begin: int, end: int, outcome: Any) -> None:
        """Who asked."""
        self._signals.count_users(stream.user[begin:end])


def _xgboost(config: LearnedArm) -> Any:
    import xgboost

    booster = xgboost.Booster(params={"nthread": 1})
    booster.load_model(model_path(config.model))

    def predict(window: Floats) -> float:
        return float(booster.inplace_predict(window.reshape(1, -1))[0])

    return predict


def _lstm(config: LearnedArm) -> Any:
    weights = load_weights(config.model)

    def predict(window: Floats) -> float:
        scaled = (window - weights["mean"]) / weights["scale"]
        return float(lstm(weights, scaled)[0])

    return predict
