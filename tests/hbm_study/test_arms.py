"""Arms: configured by files, bound by the shield, equal for equal seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hbm_pool.contracts.records import TELEMETRY
from hbm_sim.faults import Fault, FaultKind
from hbm_sim.loop import run_node
from hbm_study.arms import ArmError, load_arm, make_arm
from hbm_study.arms.config import OracleArm, StaticArm, families
from hbm_study.arms.networks import lstm, mlp
from hbm_study.arms.signals import SIGNAL_NAMES, Signals
from hbm_study.scene import SceneData

LOOPED = ("static-0.30", "oracle-paid-1.00", "twin", "twin-adapter-gate", "pid", "climb", "bayes")


def _run(data: SceneData, name: str, **options: object):  # type: ignore[no-untyped-def]
    arm = make_arm(name, load_arm(name), lambda: data.track, lambda: data.known)
    return run_node(data.stream, data.spec, arm, 1, curves=data.track, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", families())
def test_every_shipped_file_is_an_arm_with_a_description(name: str) -> None:
    assert load_arm(name).description


def test_a_number_in_a_name_is_the_family_parameter() -> None:
    static, oracle = load_arm("static-0.35"), load_arm("oracle-paid-0.75")
    assert isinstance(static, StaticArm)
    assert static.alpha == 0.35
    assert isinstance(oracle, OracleArm)
    assert oracle.fraction == 0.75
    assert not oracle.free


@pytest.mark.parametrize(
    ("name", "said"),
    [("nobody", "no arm is called 'nobody'"), ("pid-0.50", "pid takes no number")],
)
def test_an_unknown_arm_is_refused_in_one_line(name: str, said: str) -> None:
    with pytest.raises(ArmError, match=said) as refused:
        load_arm(name)
    assert "\n" not in str(refused.value)


def test_an_unknown_key_in_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("kind: pid\ndescription: mine\ngain: 3\n", encoding="utf-8")
    with pytest.raises(ArmError, match="gain"):
        load_arm(str(file))


@pytest.mark.parametrize("name", LOOPED)
def test_equal_seeds_give_equal_runs(data: SceneData, name: str) -> None:
    first, second = _run(data, name), _run(data, name)
    assert first.alpha.tolist() == second.alpha.tolist()
    assert np.array_equal(first.latency_ms, second.latency_ms, equal_nan=True)


@pytest.mark.parametrize("name", LOOPED)
def test_alpha_stays_within_bounds_and_speed(data: SceneData, name: str) -> None:
    run = _run(data, name)
    info = data.spec.info
    assert (run.target >= info.alpha_min - 1e-9).all()
    assert (run.target <= info.alpha_max + 1e-9).all()
    assert np.isfinite(run.target).all()
    most = 4.0 * load_arm(name).moves.slew_per_s * 0.25 + 1.0 / info.extents
    assert np.abs(np.diff(run.target)).max() <= most + 1e-9


@pytest.mark.parametrize("name", ["twin-adapter-gate", "pid", "bayes"])
def test_telemetry_without_numbers_holds_every_arm(data: SceneData, name: str) -> None:
    begin = float(data.stream.arrival_s[-1]) / 2
    run = _run(data, name, faults=(Fault(FaultKind.NAN, begin),))
    held = run.target[run.time_s >= begin + 0.5]
    assert len(held) > 3
    assert (held == held[0]).all()


def test_the_paid_oracle_goes_where_each_regime_is_best(data: SceneData) -> None:
    run = _run(data, "oracle-paid-fast-1.00")
    for index, regime in enumerate(data.stream.regimes):
        ends = data.stream.arrival_s[data.stream.regime == index].max()
        last = run.target[run.time_s <= ends][-1]
        assert last == pytest.approx(data.known.by_mean[regime], abs=1.5 / data.spec.info.extents)


def test_an_oracle_that_goes_no_way_is_the_best_static(data: SceneData) -> None:
    run = _run(data, "oracle-paid-0.00", alpha=data.best_static)
    assert run.target == pytest.approx(data.best_static, abs=1.0 / data.spec.info.extents)


def test_learned_costs_undo_a_wrong_declaration(data: SceneData, cache: Path) -> None:
    wrong = SceneData(data.scene._replace(fault="costs-x4"), cache)
    star = {name: best.by_service for name, best in data.best.items()}

    def error(name: str) -> float:
        arm = make_arm(name, load_arm(name), lambda: wrong.track, lambda: wrong.known)
        run = run_node(wrong.stream, wrong.spec, arm, 1, curves=wrong.track, faults=wrong.faults)
        request = np.searchsorted(wrong.stream.arrival_s, run.time_s).clip(
            max=len(wrong.stream) - 1
        )
        settled = wrong.stream.settled[request] & np.isfinite(run.anchor)
        names = np.array(wrong.stream.regimes)[wrong.stream.regime[request]]
        off = [
            star[name].distance(anchor)
            for name, anchor in zip(names[settled], run.anchor[settled], strict=True)
        ]
        return float(np.mean(off))

    assert error("twin-adapter") < error("twin")


def _telemetry(**values: float) -> np.ndarray:
    record = np.zeros((), TELEMETRY)
    for name, value in values.items():
        record[name] = value
    return record


def test_signals_are_shares_since_the_last_look() -> None:
    signals = Signals(slo_ms=50.0, max_sequence_tokens=100, memory_requests=10)
    signals.count_users(np.array([1, 2, 1, 3]))
    counted = {"requests": 4, "slo_met": 3, "slo_total": 4, "kv_lookups": 4, "kv_hits": 1}
    tokens = {"kv_tokens_reused": 100, "kv_tokens_computed": 100}
    rows = {"emb_accesses": 10, "emb_hits": 7}
    first = signals.look(_telemetry(**counted, **tokens, **rows, alpha=0.4, latency_p99_ms=100.0))
    assert dict(zip(SIGNAL_NAMES, first.tolist(), strict=True)) == pytest.approx(
        {
            "hot_users": 0.25,
            "kv_hit": 0.25,
            "emb_hit": 0.7,
            "history": 0.5,
            "slo_missed": 0.25,
            "alpha": 0.4,
            "p99": 2.0,
        }
    )
    # Nothing came: ratios stay, and NaN is not believed.
    second = signals.look(_telemetry(**counted, **tokens, **rows, alpha=np.nan))
    assert second[SIGNAL_NAMES.index("kv_hit")] == 0.25
    assert second[SIGNAL_NAMES.index("alpha")] == 0.4


def test_a_user_who_stayed_away_long_is_not_hot() -> None:
    signals = Signals(50.0, 100, memory_requests=3)
    signals.count_users(np.array([9, 1, 2, 3, 4, 9]))
    assert signals.look(_telemetry(requests=6))[0] == 0.0


def test_networks_agree_with_torch() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer, head = torch.nn.LSTM(7, 5, batch_first=True), torch.nn.Linear(5, 1)
    window = np.random.default_rng(0).normal(size=(8, 7))
    with torch.no_grad():
        states, _ = layer(torch.tensor(window[None], dtype=torch.float32))
        wanted = head(states[:, -1])[0].numpy()
    weights = {name: value.detach().numpy() for name, value in layer.state_dict().items()}
    weights |= {
        "head_weight": head.weight.detach().numpy(),
        "head_bias": head.bias.detach().numpy(),
    }
    assert lstm(weights, window) == pytest.approx(wanted, abs=1e-6)

    net = torch.nn.Sequential(torch.nn.Linear(7, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    with torch.no_grad():
        wanted = net(torch.tensor(window[0], dtype=torch.float32)).numpy()
    names = ("weight_0", "bias_0", "weight_1", "bias_1")
    plain = dict(zip(names, (p.detach().numpy() for p in net.parameters()), strict=True))
    assert mlp(plain, window[0]) == pytest.approx(wanted, abs=1e-6)
