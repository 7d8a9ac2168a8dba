"""The graph that ships: the same numbers as torch, loadable by the sidecar, wrong files refused."""

from __future__ import annotations

import hashlib
import math

import gymnasium
import numpy as np
import pytest
import torch
from hbm_learn.checkpoint import Checkpoint, CheckpointError, Moments
from hbm_learn.config import TrainConfig
from hbm_learn.network import Network, check_observations, largest_difference
from hbm_learn.ppo import learner, untrained
from hbm_learn.pupil import action_space, observation_space
from hbm_policy.layers import Action, correction_of
from hbm_policy.observation import OBSERVATION_NAMES
from hbm_policy.onnx_residual import OnnxResidual
from hbm_policy.reading import NO_CORRECTION
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

WIDTH = len(OBSERVATION_NAMES)
ABOUT = {"hbm.gain": "1", "hbm.commit": "0" * 40}


class Still(gymnasium.Env):
    """Spaces alone: nothing is stepped."""

    observation_space = observation_space()
    action_space = action_space()


@pytest.fixture(scope="module")
def spaces() -> DummyVecEnv:
    return DummyVecEnv([Still])


@pytest.fixture(scope="module")
def trained(spaces) -> Checkpoint:
    """Weights of the size that training leaves, and a normaliser that matters."""
    random = np.random.default_rng(5)
    start = untrained(TrainConfig(), spaces, 1)
    torch.manual_seed(5)
    policy = {k: v + 0.1 * torch.randn_like(v) for k, v in start.parameters["policy"].items()}
    var = 10.0 ** random.uniform(-4, 1, WIDTH)
    observed = Moments(random.normal(size=WIDTH), var, 1e4)
    return start._replace(parameters={**start.parameters, "policy": policy}, observed=observed)


@pytest.fixture(scope="module")
def observations() -> np.ndarray:
    return check_observations()


def test_onnx_runtime_answers_as_torch_does(trained, observations) -> None:
    network = Network.of(trained)
    assert observations.shape == (100_000, WIDTH)
    assert np.isinf(observations).any()
    assert largest_difference(network, network.onnx(ABOUT)) <= 1e-6
    # The same numbers in plain numpy.
    answered = network.act(observations)
    with torch.inference_mode():
        expected = network.torch()(torch.from_numpy(observations)).numpy()
    assert np.abs(answered - expected).max() <= 1e-6
    # It is no constant, and it uses its range.
    assert np.all(answered.std(axis=0) > 0.05)
    assert answered.min() == -1.0
    assert answered.max() == 1.0


def test_the_graph_answers_as_stable_baselines_would(spaces, trained) -> None:
    model = learner(TrainConfig(), spaces, [1, 0], 1e-3)
    model.set_parameters(trained.parameters, exact_match=True)
    normalised = VecNormalize(spaces, epsilon=1e-4, clip_obs=10.0)
    normalised.obs_rms.mean, normalised.obs_rms.var, _ = trained.observed
    seen = np.random.default_rng(8).normal(size=(1000, WIDTH)).astype(np.float32)
    expected, _ = model.predict(normalised.normalize_obs(seen), deterministic=True)
    assert np.abs(Network.of(trained).act(seen) - expected).max() <= 1e-5


def test_an_untrained_one_is_the_stack_without_it(spaces, observations) -> None:
    network = Network.of(untrained(TrainConfig(), spaces, 1))
    answered = network.act(observations)
    assert np.all(answered == 0.0)
    assert correction_of(Action(*answered[0].tolist()), 1.0) == NO_CORRECTION


def test_the_sidecar_loads_and_asks_it(trained, tmp_path) -> None:
    network = Network.of(trained)
    path = tmp_path / "residual.onnx"
    path.write_bytes(network.onnx(ABOUT))
    residual = OnnxResidual(path, hashlib.sha256(path.read_bytes()).hexdigest())
    seen = np.random.default_rng(9).normal(size=WIDTH).astype(np.float32)
    expected = network.act(seen[None])[0]
    assert np.allclose(residual.act(tuple(seen.tolist())), expected, atol=1e-6)
    assert (residual.gain, residual.commit) == (1.0, "0" * 40)
    assert path.stat().st_size < 100_000
    assert all(math.isnan(value) for value in residual.act((math.nan,) * WIDTH))


def test_a_graph_of_other_weights_is_noticed(trained) -> None:
    network = Network.of(trained)
    biases = (*network.biases[:-1], network.biases[-1] + np.float32(1e-4))
    other = network._replace(biases=biases)
    assert largest_difference(network, other.onnx(ABOUT)) > 5e-5


def test_equal_weights_give_an_equal_file(trained) -> None:
    assert Network.of(trained).onnx(ABOUT) == Network.of(trained).onnx(ABOUT)


def test_a_checkpoint_comes_back_as_it_was_saved(trained, tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    trained.save(path)
    again = Checkpoint.load(path)
    assert np.array_equal(again.observed.var, trained.observed.var)
    expected = trained.parameters["policy"]
    assert all(torch.equal(again.parameters["policy"][k], expected[k]) for k in expected)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: no"):
        Checkpoint.load(path)


def test_a_checkpoint_for_other_observations_is_refused(trained) -> None:
    narrow = dict(trained.parameters["policy"])
    narrow["mlp_extractor.policy_net.0.weight"] = torch.zeros(64, WIDTH - 1)
    other = trained._replace(parameters={"policy": narrow})
    with pytest.raises(CheckpointError, match=f"takes {WIDTH - 1} observations"):
        Network.of(other)
