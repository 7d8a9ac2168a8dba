"""A log of decisions is decided again to the same bits, or the first difference is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hbm_policy import Policy, PolicyConfig, PolicyState, Reason, ResidualConfig, Traffic
from hbm_policy.config import GateConfig
from hbm_policy.onnx_residual import OnnxResidual
from hbm_policy.replay import Recorder, ReplayError, replay
from hbm_pool.contracts.records import Mode

from tests.residual_model import WIDTH, residual_model, write_residual

TICK_NS = 250_000_000


@pytest.fixture
def residuals(tmp_path: Path) -> tuple[Path, str]:
    """A directory with a residual that says something, and the digits of its hash."""
    weights = np.random.default_rng(5).normal(0.0, 0.3, (WIDTH, 4)).astype(np.float32)
    content = residual_model(weights=weights, gain="1.0")
    digits = write_residual(tmp_path / "made.onnx", content)[:16]
    (tmp_path / f"residual-{digits}.onnx").write_bytes(content)
    return tmp_path, digits


@pytest.fixture
def log(reading, valley, residuals) -> list[str]:
    """All layers, two regimes, every kind of trouble; the policy changes on the way."""
    folder, digits = residuals
    residual = OnnxResidual(folder / f"residual-{digits}.onnx", digits)
    config = PolicyConfig(
        residual=ResidualConfig(residual_gain=0.7), gate=GateConfig(gate_threshold=6.0)
    )
    policies = [(Policy(config, residual=residual), digits), (Policy(PolicyConfig()), "")]
    random = np.random.default_rng(1)
    recorder, state, lines = Recorder(), PolicyState(), []
    alpha, generation, requests, said = 0.5, 0, 0, 0
    curve = None
    for tick in range(1, 400):
        policy, used = policies[tick > 300]
        late = 150 < tick < 220
        requests += int(random.poisson(40 if late else 20))
        if tick % 3 == 0:
            curve = valley(
                0.8 if late else 0.4,
                monotonic_ns=tick * TICK_NS,
                requests=requests,
                kv_hit_ratio=tuple(random.random(17).tolist()),
                emb_miss_ratio=tuple(random.random(17).tolist()),
            )
            noise = (1.0 + late) * random.normal(1.0, 0.01, 17)
            cost = zip(curve.cost_ms, noise.tolist(), strict=True)
            curve = curve._replace(cost_ms=tuple(a * b for a, b in cost))
        fields: dict[str, object] = {}
        if tick % 50 == 0:
            fields = {"alpha": math.nan}
        if tick % 70 == 0:
            fields = {"telemetry_ns": 1}
        if tick in (100, 101):
            fields = {"mode": int(Mode.RECOMMEND)}
        if tick == 250:
            fields = {"boot_epoch": 8, "telemetry_epoch": 8}
        if tick == 280:
            curve = None
        seen = reading(
            tick,
            **{
                "alpha": alpha,
                "alpha_target": alpha,
                "command_generation": generation,
                "requests": requests,
                "curve": curve,
                "pool_bytes": 1 << 24,
                "slo_ms": 20.0,
                "traffic": Traffic(
                    kv_lookups=requests,
                    kv_hits=requests // 3,
                    emb_misses=requests * 7,
                    gather_ms=requests * 0.7,
                    compute_ms=requests * 1.3,
                    service_ms=requests * 2.0,
                    latency_p50_ms=3.3,
                    latency_p99_ms=math.inf if tick == 30 else 9.1,
                ),
            }
            | fields,
        )
        if tick in (1, 301):
            lines.append(recorder.start(policy.config, used, state))
        decision = policy.decide(seen, state)
        lines.append(recorder.tick(seen, decision))
        state = decision.state
        said |= decision.reasons
        if decision.apply:
            alpha, generation = decision.target, decision.generation
    for reason in (
        Reason.GATE_OPEN,
        Reason.RESIDUAL,
        Reason.MOVE_STARTED,
        Reason.TELEMETRY_STALE,
        Reason.TELEMETRY_INVALID,
        Reason.SERVER_RESTARTED,
        Reason.CURVES_MISSING,
        Reason.MODE_RECOMMEND,
    ):
        assert said & reason, reason
    return lines


def test_every_decision_is_taken_again_to_the_bit(log, residuals) -> None:
    assert replay(log, residuals[0]) == (399, None)


def test_one_that_was_killed_while_writing_is_replayed_as_far_as_it_goes(log, residuals) -> None:
    assert replay([*log[:100], log[100][:-20]], residuals[0]) == (99, None)


def change(line: str, part: str, place: int, by: object) -> str:
    content = json.loads(line)
    content[part][place] = by
    return json.dumps(content) + "\n"


@pytest.mark.parametrize(
    ("part", "field"), [("target", "target"), ("gain", "gain"), ("reasons", "reasons")]
)
def test_the_first_difference_is_named(log, residuals, part, field) -> None:
    names = json.loads(log[0])["decision"]
    place, number = names.index(part), 41
    was = json.loads(log[number])["decision"][place]
    wrong = was + 1 if isinstance(was, int) else math.nextafter(was, 2.0)
    log[number] = change(log[number], "decision", place, wrong)
    count, difference = replay(log, residuals[0])
    assert difference is not None
    assert (count, difference.line, difference.field) == (number - 1, number + 1, field)
    assert (difference.recorded, difference.replayed) == (wrong, was)


def test_another_state_is_a_difference_even_where_the_decision_is_the_same(log, residuals) -> None:
    content = json.loads(log[60])
    content["state"] ^= 1
    log[60] = json.dumps(content) + "\n"
    assert replay(log, residuals[0]).difference.field == "state"


def test_other_parameters_decide_otherwise(log, residuals) -> None:
    content = json.loads(log[0])
    content["policy"]["shield"]["slew_per_s"] *= 1.5
    log[0] = json.dumps(content) + "\n"
    assert replay(log, residuals[0]).difference is not None


def test_without_the_residual_that_had_a_say_it_refuses(log, tmp_path) -> None:
    with pytest.raises(ReplayError, match="name the directory"):
        replay(log)
    with pytest.raises(ReplayError, match="cannot be read"):
        replay(log, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "is empty"),
        (["{}\n"], "does not begin with a start line"),
        (["not json\n"], "line 1 is not JSON"),
        (["[1]\n"], "line 1 is no object"),
        (['{"start": 99}\n'], "version 99"),
        (['{"start": 1, "reading": ["x"]}\n'], "fields of a reading"),
    ],
)
def test_what_is_no_log_is_refused(lines, said) -> None:
    with pytest.raises(ReplayError, match=said):
        replay(lines)


def test_a_damaged_line_is_named(log, residuals) -> None:
    content = json.loads(log[7])
    del content["reading"][3:]
    log[7] = json.dumps(content) + "\n"
    with pytest.raises(ReplayError, match="line 8 is no decision"):
        replay(log, residuals[0])
