"""Both environments: what a learner is shown, what a step is worth, how an episode ends."""

from __future__ import annotations

import dataclasses
import threading
import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hbm_learn.domain import Domain
from hbm_learn.env import SimulatorEnv
from hbm_learn.episode import Library
from hbm_learn.pupil import NO_ACTION, TRAINED_STACK, Asking, Pupil, run_pupil, to_features
from hbm_learn.reward import RewardConfig
from hbm_learn.table_env import TableEnv
from hbm_policy.decide import Policy
from hbm_policy.reading import PolicyState
from hbm_sim.loop import Action, run_node

SEEDS = (1002, 1004)
"""Episodes in which α moves."""
PERIOD = 4


@pytest.fixture(params=[SimulatorEnv, TableEnv])
def env(request, library):
    made = request.param(library, SEEDS, RewardConfig(), PERIOD)
    yield made
    made.close()


def play(env, actions, episode=SEEDS[0]):
    """Observations, rewards, and the last step's flags."""
    observed, _ = env.reset(options={"episode": episode})
    seen, rewards = [observed], []
    while True:
        observed, reward, terminated, truncated, _ = env.step(actions(len(rewards)))
        seen.append(observed)
        rewards.append(reward)
        if terminated or truncated:
            return np.array(seen), np.array(rewards), terminated, truncated


def with_node(episode, **changes):
    return dataclasses.replace(episode, spec=dataclasses.replace(episode.spec, **changes))


def wild(step: int) -> np.ndarray:
    return np.random.default_rng([3, step]).uniform(-1, 1, 4).astype(np.float32)


def zeros(step: int) -> np.ndarray:
    return np.zeros(4, np.float32)


def test_gymnasium_finds_nothing_wrong(env) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error")
        # Neither has a spec or draws pictures, and there is no need to.
        warnings.filterwarnings("ignore", message=".*(spec|render).*")
        check_env(env, skip_render_check=True)


def test_no_action_is_worth_nothing_more_than_the_stack_without(env) -> None:
    _, rewards, terminated, truncated = play(env, zeros)
    assert len(rewards) > 10
    assert np.all(rewards == 0.0)
    assert (terminated, truncated) == (False, True)


def test_equal_actions_make_equal_episodes_and_others_do_not(env) -> None:
    first, again, without = play(env, wild), play(env, wild), play(env, zeros)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0][: len(without[0])], without[0][: len(first[0])])


def test_an_unpaired_reward_is_a_price(library) -> None:
    env = TableEnv(library, SEEDS, RewardConfig(paired=False), PERIOD)
    _, rewards, _, _ = play(env, wild)
    assert np.all(rewards <= 0.0)
    assert rewards.min() < 0.0


def test_episodes_are_drawn_from_the_seeds_given(env) -> None:
    drawn = {env.reset(seed=seed)[1]["drawn"] for seed in range(8)}
    assert drawn == set(SEEDS)


def test_it_is_shown_exactly_what_a_deployed_residual_would_be(library, episode) -> None:
    """The same loop around the policy itself: its residual's inputs are the observations."""
    inputs: list[tuple[float, ...]] = []

    class Stack:
        name = "stack"

        def start(self, spec, seed) -> None:
            self.policy = Policy(TRAINED_STACK, residual=Asking(self.note))
            self.state = PolicyState()

        def note(self, observation):
            if self.now_s >= episode.begins_s:
                inputs.append(observation)
            return NO_ACTION

        def act(self, observation) -> Action:
            self.now_s = observation.time_s
            decision = self.policy.decide(observation.reading, self.state)
            self.state = decision.state
            return Action(
                decision.target, decision.refill_bytes_per_s, generation=decision.generation
            )

    prompt = with_node(episode, telemetry_delay_ticks=0)
    run_node(
        prompt.stream,
        prompt.spec,
        Stack(),
        prompt.seed,
        curves=prompt.track,
        alpha=prompt.drawn.start_alpha,
        refill_bytes_per_s=prompt.drawn.refill_bytes_per_s,
    )
    shown: list[tuple[float, ...]] = []

    def note(observation, step):
        shown.append(observation)
        return NO_ACTION

    run_pupil(prompt, Pupil(prompt, note, PERIOD))
    assert len(shown) > 10
    assert shown == inputs[::PERIOD]
    assert np.array_equal(to_features(shown[0]), np.array(shown[0], np.float32))


def test_late_telemetry_does_not_stop_a_move(episode) -> None:
    """The policy must not take a command still under way for one that the node refuses."""
    late = with_node(episode, telemetry_delay_ticks=2, telemetry_noise=0.0)
    prompt = with_node(episode, telemetry_delay_ticks=0, telemetry_noise=0.0)
    # On this small node hardly any move is worth the 1 % that the defaults ask for.
    shield = TRAINED_STACK.shield.model_copy(update={"min_gain": 0.0})
    stack = TRAINED_STACK.model_copy(update={"shield": shield})
    moved = {}
    for name, each in (("late", late), ("prompt", prompt)):
        run = run_pupil(each, Pupil(each, lambda observation, step: NO_ACTION, PERIOD, stack))
        moved[name] = float(np.abs(np.diff(run.target)).sum())
    assert moved["prompt"] > 0.0
    assert moved["late"] == pytest.approx(moved["prompt"], abs=0.3)


def test_an_episode_that_is_left_leaves_no_thread_behind(library) -> None:
    before = threading.active_count()
    env = SimulatorEnv(library, SEEDS, RewardConfig(), PERIOD)
    for _ in range(3):
        env.reset(options={"episode": SEEDS[0]})
        env.step(zeros(0))
    assert threading.active_count() == before + 1
    env.close()
    assert threading.active_count() == before


def test_an_episode_without_decisions_is_an_error_that_says_so(library) -> None:
    # The twin is not warm after so few requests: no residual is asked.
    short = library.domain.model_copy(
        update={"requests": 200, "warm_up": 0, "pool_bytes": (1e10, 1e10)}
    )
    env = SimulatorEnv(Library(Domain(**short.model_dump())), (1000,), RewardConfig(), PERIOD)
    with pytest.raises(RuntimeError, match="episode 1000 ends before its first decision"):
        env.reset()


def test_a_step_before_a_reset_is_refused(env) -> None:
    with pytest.raises(RuntimeError, match="before reset"):
        env.step(zeros(0))
