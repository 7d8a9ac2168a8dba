"""A learned policy from a file: used when it is the one meant, refused with words when not."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
from hbm_policy import Policy, PolicyConfig, PolicyState, Reason, ResidualConfig, decide
from hbm_policy.layers import MAX_CORRECTION
from hbm_policy.observation import OBSERVATION_NAMES, OBSERVATION_VERSION
from hbm_policy.onnx_residual import MAX_FILE_BYTES, OnnxResidual, ResidualError

from tests.residual_model import WIDTH, residual_model, write_residual

TICK_NS = 250_000_000


@pytest.fixture
def load(tmp_path):
    def make(content: bytes) -> OnnxResidual:
        path = tmp_path / "residual.onnx"
        return OnnxResidual(path, write_residual(path, content))

    return make


def test_it_answers_as_its_graph_says(load) -> None:
    random = np.random.default_rng(1)
    weights = random.normal(0.0, 0.2, (WIDTH, 4)).astype(np.float32)
    residual = load(residual_model((0.1, -0.2, 0.3, 0.0), weights, gain="0.5"))
    for _ in range(200):
        shown = random.normal(0.0, 2.0, WIDTH).astype(np.float32)
        expected = np.clip(shown @ weights + np.float32([0.1, -0.2, 0.3, 0.0]), -1.0, 1.0)
        assert residual.act(tuple(shown.tolist())) == pytest.approx(expected, abs=1e-6)
        assert residual.act(tuple(shown.tolist())) == residual.act(tuple(shown.tolist()))
    assert (residual.gain, residual.commit) == (0.5, "0123abcd")


def test_a_decision_takes_its_wish(load, reading, valley, adopted) -> None:
    residual = load(residual_model((0.5, 0.0, 0.0, 0.0), gain="0.8"))
    policy = Policy(
        PolicyConfig(gate=None, residual=ResidualConfig(residual_gain=0.5)), residual=residual
    )
    seen = reading(20, curve=valley(0.8, monotonic_ns=20 * TICK_NS))
    decision = decide(seen, adopted, policy)
    assert decision.reasons & Reason.RESIDUAL
    assert decision.correction.alpha == pytest.approx(0.5 * 0.8 * 0.5 * MAX_CORRECTION)
    assert decision.wish == pytest.approx(decision.anchor + decision.correction.alpha)


@pytest.mark.parametrize("value", [math.nan, 1e300, -1e300])
def test_what_is_no_number_in_is_no_correction(load, value) -> None:
    weights = np.ones((WIDTH, 4), np.float32)
    residual = load(residual_model(weights=weights))
    for place in range(WIDTH):
        shown = [0.0] * WIDTH
        shown[place] = value
        assert any(math.isnan(answer) for answer in residual.act(tuple(shown)))
    assert residual.act((0.0,) * WIDTH) == (0.0, 0.0, 0.0, 0.0), "the next one is sound again"


def test_a_residual_that_breaks_leaves_the_other_layers_deciding(
    load, reading, valley, adopted
) -> None:
    weights = np.zeros((WIDTH, 4), np.float32)
    weights[OBSERVATION_NAMES.index("kv_hit")] = math.inf
    policy = Policy(
        PolicyConfig(gate=None, residual=ResidualConfig(residual_gain=1.0)),
        residual=_Unchecked(load, weights),
    )
    seen = reading(20, curve=valley(0.8, monotonic_ns=20 * TICK_NS))
    decision = decide(seen, adopted, policy)
    assert decision.reasons & Reason.RESIDUAL_INVALID
    assert decision.target == decide(seen, adopted, Policy(PolicyConfig(gate=None))).target


class _Unchecked:
    """The file answers zeros well, and breaks on what it is shown: inf x 0 is no number."""

    gain = 1.0

    def __init__(self, load, weights) -> None:
        self.file = load(residual_model())
        self.weights = weights

    def act(self, observation):
        with np.errstate(invalid="ignore"):
            answer = np.array(observation, np.float32) @ self.weights
        return type(self.file.act(observation))(*answer.tolist())


def refused(path, content: bytes, sha256: str | None = None) -> str:
    path.write_bytes(content)
    with pytest.raises(ResidualError) as error:
        OnnxResidual(path, sha256 or hashlib.sha256(content).hexdigest())
    assert "\n" not in str(error.value)
    assert path.name in str(error.value)
    return str(error.value)


def test_a_file_that_is_not_the_one_meant(tmp_path) -> None:
    path, content = tmp_path / "residual.onnx", residual_model()
    found = hashlib.sha256(content).hexdigest()
    assert found[:12] in refused(path, content, "0" * 64)
    assert "is asked for" in refused(path, content, found[:8])
    flipped = bytearray(content)
    flipped[len(flipped) // 2] ^= 1
    assert "is asked for" in refused(path, bytes(flipped), found)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no ONNX model"),
        (b"not a model", "no ONNX model"),
        (residual_model()[:-40], ""),
        (residual_model(observation_version=str(OBSERVATION_VERSION + 1)), "version"),
        (residual_model(observation="alpha,beta"), "hbm.observation differs"),
        (residual_model(observation=",".join(reversed(OBSERVATION_NAMES))), "their order"),
        (residual_model(action="shift"), "hbm.action differs"),
        (residual_model(gain="2"), "hbm.gain is '2'"),
        (residual_model(gain="nan"), "hbm.gain"),
        (residual_model(gain=""), "hbm.gain"),
        (residual_model(inputs=WIDTH + 1), "it must have one observation"),
        (residual_model((math.nan, 0.0, 0.0, 0.0)), "to zeros"),
    ],
)
def test_a_file_that_is_no_residual_for_this_program(tmp_path, content, said) -> None:
    assert said in refused(tmp_path / "residual.onnx", content)


def test_a_file_that_is_too_large_or_missing(tmp_path) -> None:
    assert "larger than" in refused(tmp_path / "residual.onnx", bytes(MAX_FILE_BYTES + 1))
    with pytest.raises(ResidualError, match="cannot be read"):
        OnnxResidual(tmp_path / "missing.onnx", "0" * 64)


def test_a_decision_without_a_residual_loads_no_runtime() -> None:
    code = (
        "import sys; from hbm_policy import Policy; Policy();"
        "print([name for name in sys.modules if name.startswith(('onnx', 'numba', 'torch'))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_observations_are_dimensionless(reading, valley) -> None:
    """A node twice as fast, or a pool of larger rows, shows the same numbers."""
    from hbm_policy import Traffic

    def shown(ms: float) -> tuple[float, ...]:
        policy = Policy(PolicyConfig(gate=None))
        state = PolicyState()
        for tick in range(1, 30):
            traffic = Traffic(
                latency_p50_ms=4.0 * ms,
                latency_p99_ms=9.0 * ms,
                kv_lookups=5 * tick,
                kv_hits=2 * tick,
                kv_tokens_reused=40 * tick,
                kv_tokens_computed=60 * tick,
                emb_misses=900 * tick,
                gather_ms=3.0 * ms * tick,
                compute_ms=7.0 * ms * tick,
                service_ms=50.0 * tick,
            )
            curve = valley(0.7, monotonic_ns=tick * TICK_NS, requests=5 * tick)
            curve = curve._replace(cost_ms=tuple(ms * each for each in curve.cost_ms))
            seen = reading(tick, traffic=traffic, curve=curve, slo_ms=20.0 * ms)
            features = policy.observe(seen, state)
            state = policy.decide(seen, state).state
        return features

    assert shown(1.0) == pytest.approx(shown(7.0), abs=1e-9)
    by_name = dict(zip(OBSERVATION_NAMES, shown(1.0), strict=True))
    assert by_name["anchor_ahead"] == pytest.approx(0.2, abs=0.02)
    assert by_name["kv_hit"] == pytest.approx(0.4)
    assert by_name["recompute"] == pytest.approx(0.6)
    assert by_name["gather"] == pytest.approx(0.3)
    assert by_name["log_p99_slo"] == pytest.approx(math.log(9 / 20))
    assert by_name["slope"] < 0.0, "it gets cheaper towards the optimum"
