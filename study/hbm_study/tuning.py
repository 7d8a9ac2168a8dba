"""`hbm eval tune`: parameters of one arm, searched on training episodes and checked on others.

What is minimised is the mean over episodes of ln(P99 ÷ P99 of that episode's best static α): a
factor counts alike in either direction, and no episode outweighs the others by its unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml
from hbm_learn.domain import Domain
from hbm_learn.episode import TICK_S, Episode, Library
from hbm_sim.loop import run_node
from hbm_sim.optimum import latencies, p99

from hbm_study.arms import ArmConfig, ArmError, Known, load_arm, make_arm
from hbm_study.arms.config import parse_arm
from hbm_study.frozen import TRAINING_SEEDS, VALIDATION_SEEDS
from hbm_study.statistics import interval

WORST: Final = 1.5
"""ln of a factor of 4.5: a collapse is a collapse, whatever its queue."""
_MOVES: Final = {
    "moves.slew_per_s": (0.01, 0.4, "log"),
    "moves.move_fraction": (0.25, 1.0, ""),
    "moves.dwell_accesses_per_slot": (0.005, 1.0, "log"),
}
SPACES: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "policy": {
        **_MOVES,
        "moves.min_gain": (0.002, 0.06, "log"),
        "anchor.smoothing_requests": (32.0, 512.0, "log"),
        "drop_only": (False, True),
    },
    "pid": {
        "log_ratio": (-2.5, 2.5, ""),
        "proportional": (0.0, 0.1, ""),
        "integral": (0.0003, 0.03, "log"),
        "period_s": (1.0, 8.0, "log"),
        "drop_only": (False, True),
    },
    "climb": {
        "period_s": (2.0, 30.0, "log"),
        "step": (0.01, 0.1, "log"),
        "restart": (0.05, 0.5, "log"),
        "drop_only": (False, True),
    },
    "bayes": {
        "period_s": (2.0, 20.0, "log"),
        "settle_s": (0.5, 10.0, "log"),
        "drop_only": (False, True),
    },
    "xgboost": {**_MOVES, "moves.min_change": (0.005, 0.1, "log"), "drop_only": (False, True)},
    "lstm": {**_MOVES, "moves.min_change": (0.005, 0.1, "log"), "drop_only": (False, True)},
    "paper": {
        "adapter_rate": (0.0005, 0.1, "log"),
        "override_hot_users": (0.1, 0.8, ""),
        "override_memory": (0.02, 0.5, "log"),
        "drop_only": (False, True),
    },
}


def changed(config: ArmConfig, values: Mapping[str, Any]) -> ArmConfig:
    """A configuration with some values at dotted places. Raises `ArmError`."""
    plain = config.model_dump(mode="json")
    for place, value in values.items():
        *parents, name = place.split(".")
        section = plain
        for parent in parents:
            section = section[parent]
        section[name] = value
    return parse_arm("changed", plain)


def loss(config: ArmConfig, name: str, episode: Episode, reference_ms: float) -> float:
    """ln(P99 ÷ reference) of an arm on one episode."""

    def unknown() -> Known:
        raise ArmError(f"{name} is an oracle: nothing of it is tuned")

    arm = make_arm(name, config, lambda: episode.track, unknown)
    run = run_node(
        episode.stream,
        episode.spec,
        arm,
        episode.seed,
        tick_s=TICK_S,
        curves=episode.track,
        alpha=episode.drawn.start_alpha,
        refill_bytes_per_s=episode.drawn.refill_bytes_per_s,
    )
    tail = p99(run.latency_ms[episode.stream.counted])
    return min(math.log(tail / reference_ms), WORST) if math.isfinite(tail) else WORST


def best_static_ms(episode: Episode) -> float:
    """Lowest P99 of the static α of an episode's tables."""
    tables, counted = episode.tables, episode.stream.counted
    tails = []
    for index in range(len(episode.alphas)):
        columns = (tables.gather_ms[:, index], tables.compute_ms[:, index])
        times = [column.astype(np.float64) for column in columns]
        tails.append(p99(latencies(episode.stream, episode.spec, *times)[counted]))
    return min(tails)


def tune_arm(
    name: str,
    trials: int,
    episodes: int,
    held: int,
    kept: Path | None,
    seconds: float,
    write: bool,
) -> Iterator[str]:
    """Searches, checks on validation seeds, and writes the file where that is wished and better."""
    import optuna

    config = load_arm(name)
    space = SPACES.get(config.kind, {})
    if not space:
        raise ArmError(f"{name} has nothing to tune")
    library = Library(Domain(), kept)
    training = [library.episode(seed) for seed in TRAINING_SEEDS[:episodes]]
    references = [best_static_ms(episode) for episode in training]
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial: optuna.trial.Trial) -> float:
        tried = changed(config, {place: _suggest(trial, place, space[place]) for place in space})
        pairs = zip(training, references, strict=True)
        return float(np.mean([loss(tried, name, episode, ms) for episode, ms in pairs]))

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1, multivariate=True))
    study.enqueue_trial({place: _present(config, place) for place in space})
    study.optimize(objective, n_trials=trials, timeout=seconds)
    before, best = study.trials[0].value, study.best_value
    count = len(study.trials)
    yield f"{name}: {count} settings on {episodes} episodes: {before:+.4f} -> {best:+.4f}"
    tuned = changed(config, study.best_params)
    for place, value in study.best_params.items():
        yield f"  {place}: {value if isinstance(value, bool) else round(value, 5)}"
    better = best < (before or math.inf)
    if held:
        differences = []
        for seed in VALIDATION_SEEDS[:held]:
            episode = library.episode(seed)
            reference = best_static_ms(episode)
            now, then = (loss(each, name, episode, reference) for each in (tuned, config))
            differences.append(now - then)
        seen = interval(differences)
        better = better and seen.mean < 0.0
        yield (
            f"  on {held} validation episodes ln P99 changes by {seen.mean:+.4f} "
            f"[{seen.low:+.4f}, {seen.high:+.4f}]"
        )
    if write and better:
        _write(
            name,
            study.best_params,
            f"hbm eval tune, {len(study.trials)} settings, seeds 1000 "
            f"to {999 + episodes}; validation 2000 to {1999 + held}",
        )
        yield f"  written to {name}.yaml"
    elif write:
        yield "  not written: not better on both"


def _suggest(trial: Any, place: str, how: Sequence[Any]) -> Any:
    if isinstance(how[0], bool):
        return trial.suggest_categorical(place, list(how))
    low, high, scale = how
    return trial.suggest_float(place, low, high, log=scale == "log")


def _present(config: ArmConfig, place: str) -> Any:
    value: Any = config
    for name in place.split("."):
        value = getattr(value, name)
    how = SPACES[config.kind][place]
    return value if isinstance(how[0], bool) else min(max(value, how[0]), how[1])


def _write(name: str, values: Mapping[str, Any], how: str) -> None:
    path = Path(str(files("hbm_study"))) / "arm_configs" / f"{name}.yaml"
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    for place, value in values.items():
        *parents, last = place.split(".")
        section = plain
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value if isinstance(value, bool) else float(f"{value:.4g}")
    plain["tuned"] = how
    path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")
