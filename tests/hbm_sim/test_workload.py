"""Workload files: what ships says what it should, and wrong files are refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hbm_pool.contracts.records import CostModel
from hbm_sim.load_level import shipped_capacity
from hbm_sim.workload import WorkloadError, load_workload, workloads

from tests.hbm_sim.small_workload import small_workload

# Of the evaluation protocol: hot, revisit, distance, Zipf exponent, churn.
STANDARD = {
    "R0": (0.1, 0.1, 400, 0.65, 0),
    "R1": (0.3, 0.35, 250, 0.80, 1000),
    "R2": (0.6, 0.6, 165, 0.95, 0),
    "A": (0.3, 0.6, 165, 0.9, 0),
    "Bn": (0.2, 0.05, 400, 0.65, 1000),
}


@pytest.mark.parametrize("name", ["steady", "trend", "burst-hot", "burst-new", "mix"])
def test_the_standard_node_and_its_regimes_have_the_numbers_of_the_protocol(name: str) -> None:
    workload = load_workload(name)
    spec = workload.node_spec()
    assert workload.rows == 50_000_000
    assert spec.info.extents * spec.info.extent_bytes == pytest.approx(60e9, rel=1e-3)
    assert spec.info.classes[0].row_bytes == 1024
    assert spec.info.slo_ms == 80.0
    assert spec.costs.fixed_ms == 1.2
    assert spec.costs.row_ms[0] == pytest.approx(1024 / 3e9 * 1e3)
    # ctok = .7 * (0.4 + 0.1 * L / 1024) µs
    per_token_ms = spec.costs.token_ms + spec.costs.token_context_ms * 8192
    assert per_token_ms == pytest.approx(0.7 * (0.4 + 0.8) / 1e3)
    for label, regime in workload.regimes.items():
        users, items = regime.users, regime.items
        said = (users.hot, users.revisit, users.revisit_distance, items.zipf_s, items.churn)
        assert said == STANDARD[label]
        assert (users.hot_users, users.one_off_users) == (300, 2_000_000)
        assert (regime.candidates, regime.history.growth) == (512, 128)
    if "Bn" in workload.regimes:
        items = workload.regimes["Bn"].items
        assert (items.new_share, items.new_items, items.new_zipf_s) == (0.2, 1_000_000, 0.6)


def test_trend_goes_up_and_back_in_six_levels() -> None:
    phases = load_workload("trend").phases()
    assert [phase.requests for phase in phases] == [2500] * 12
    hot = [round(phase.regime.users.hot, 3) for phase in phases]
    assert hot == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert [phase.name for phase in phases[:6]] == [phase.name for phase in phases[:5:-1]]


def test_every_shipped_workload_loads_and_says_where_its_numbers_come_from() -> None:
    assert {"steady", "trend", "burst-hot", "burst-new", "mix", "light8k", "dlrmv3"} <= set(
        workloads()
    )
    for name in workloads():
        workload = load_workload(name)
        assert workload.sources, name
        spec = workload.node_spec()
        assert 0.0 < spec.info.sample_rate <= 1.0
        assert workload.with_gather("overlap").node_spec().info.cost_model == CostModel.OVERLAP


@pytest.mark.parametrize("name", ["steady", "trend", "burst-hot", "burst-new", "mix"])
@pytest.mark.parametrize("gather", ["serial", "overlap"])
def test_capacities_of_the_standard_workloads_are_kept_beside_them(name: str, gather: str) -> None:
    workload = load_workload(name).with_gather(gather)  # type: ignore[arg-type]
    for phase in workload.phases():
        capacity = shipped_capacity(workload, phase.regime)
        assert capacity is not None, f"{name} {phase.name}: run python -m hbm_sim.load_level"
        assert 20.0 < capacity < 300.0


def test_another_number_is_another_workload() -> None:
    assert small_workload().digest() == small_workload().digest()
    assert small_workload().digest() != small_workload(node={"fixed_ms": 0.6}).digest()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2]", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("schema_version: 1", "name: this key is required"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(WorkloadError) as caught:
        load_workload(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(WorkloadError, match=r"nothing: cannot be read.*trend"):
        load_workload("nothing")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"walk": [{"regime": "loud", "requests": 5}]}, "no regime is called 'loud'"),
        ({"node": {"extent_bytes": 3000}}, "must be a multiple of a KV page"),
        ({"node": {"pool_bytes": 4096}}, "fewer than 16 extents"),
        ({"sample_rate": 0.001}, "at least 64 are needed"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        small_workload(**changes)
