"""Oracles: what they may and may not be better than; capacities."""

from __future__ import annotations

import numpy as np
import pytest
from hbm_sim.bounds import Price, bounds
from hbm_sim.load_level import find_capacity
from hbm_sim.optimum import latencies, p99, static_optimum
from hbm_sim.stream import make_stream, stream_of_phases
from hbm_sim.workload import Phase

from tests.hbm_sim.small_workload import small_workload


def test_at_its_capacity_a_regime_just_meets_the_slo() -> None:
    workload = small_workload(warm_up=400)
    regime = workload.regimes["busy"]
    capacity = find_capacity(workload, regime)
    spec = workload.node_spec()
    tails = {}
    for load in (0.9, 1.0, 1.05):
        found = []
        for seed in (1, 2, 3, 4):
            phases = [Phase("", 400, regime), Phase("busy", 6000, regime)]
            stream = stream_of_phases(workload, phases, [load * capacity] * 2, seed, 1.0)
            found.append(static_optimum(stream, spec, fine=False).pooled.by_p99.value_ms)
        tails[load] = float(np.mean(found))
    assert tails[0.9] < spec.info.slo_ms
    assert tails[1.0] == pytest.approx(spec.info.slo_ms, rel=0.25)
    assert tails[1.05] > tails[1.0]


@pytest.mark.parametrize("rows", ["lru", "tz"])
def test_an_oracle_never_loses_what_it_could_leave_alone(
    rows: str, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    workload = small_workload(warm_up=400)
    found = bounds(workload, rows, [1, 2], load=0.9)  # type: ignore[arg-type]
    assert (found.gains("paying") >= 0.0).all()
    for each in found.seeds:
        assert each.static_ms <= each.half_ms
        assert each.paying_ms[Price(0.0, 0.0)] == each.static_ms
        assert each.moved_bytes[Price(0.0, 0.0)] == 0
        assert max(each.moved_bytes.values()) > 0
        assert set(each.alpha) == {"quiet", "busy"}
    plain = found.to_dict()
    assert plain["paying"]["gain_percent"] == pytest.approx(found.gains("paying").mean())
    # Capacities that were looked for are kept.
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_latencies_of_given_times_are_those_of_the_node() -> None:
    workload = small_workload()
    stream, spec = make_stream(workload, 1, qps=100.0), workload.node_spec()
    run = static_optimum(stream, spec, fine=False).run_at(0.5)
    again = latencies(stream, spec, run.gather_ms, run.compute_ms)
    assert again == pytest.approx(run.latency_ms)
    refused = run.latency_ms.copy()
    refused[:20] = np.nan  # two of a hundred were never answered
    assert p99(refused) == np.inf
    refused[5:20] = run.latency_ms[5:20]
    assert p99(refused) < np.inf
