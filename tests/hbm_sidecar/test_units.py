"""Pace, back-off, rates, words: the parts that need no process."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hbm_policy import PriceState, Reason
from hbm_pool.contracts.records import CURVES, DECISION, TELEMETRY
from hbm_sidecar.cluster_link import KubeMetrics
from hbm_sidecar.contributions import block, prices
from hbm_sidecar.explain import explained, human_line, reason_codes, to_json
from hbm_sidecar.launch import LaunchError, configuration
from hbm_sidecar.metrics import SidecarMetrics
from hbm_sidecar.node_state import MIN_REQUESTS, RateWindow
from hbm_sidecar.pace import Pace
from hbm_sidecar.supervisor import BACKOFF_LAST_S, Child, backoff_s, how_it_ended
from hypothesis import given
from hypothesis import strategies as st

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics-sidecar.md"


@given(
    st.integers(0, 10**12),
    st.integers(1, 10**9),
    st.lists(st.integers(0, 5 * 10**9), max_size=20),
)
def test_deadlines_keep_their_raster_however_late_one_comes(start, period, delays) -> None:
    pace, now = Pace(start, period), start
    for delay in delays:
        now += delay
        before = pace.due_ns
        pace.advance(max(now, before))
        assert (pace.due_ns - start) % period == 0
        assert max(now, before) < pace.due_ns <= max(now, before) + period


@pytest.mark.parametrize("port", ["bad", "99999"])
def test_a_redis_url_with_no_port_is_refused_without_its_password(tmp_path, port) -> None:
    wrong = {"run_dir": tmp_path, "node_url": "http://n:1"}
    with pytest.raises(LaunchError, match=r"--redis-url: 'h:\w+' is no Redis URL") as refused:
        configuration({**wrong, "redis_url": f"redis://:secret@h:{port}"})
    assert "secret" not in str(refused.value)


def test_a_shorter_period_counts_at_once() -> None:
    pace = Pace(0, 60_000)
    pace.change(now_ns=1_000, period_ns=50)
    assert pace.due_ns == 1_050
    pace.change(now_ns=1_010, period_ns=500)
    assert pace.due_ns == 1_050


def test_back_off_doubles_and_is_bounded() -> None:
    pauses = [backoff_s(failures) for failures in range(40)]
    assert pauses[0] == 0.0
    assert pauses[2] == 2 * pauses[1]
    assert pauses == sorted(pauses)
    assert pauses[-1] == BACKOFF_LAST_S


def test_a_child_that_lived_long_is_started_at_once() -> None:
    child = Child("twin", keep=True)
    for _ in range(5):
        child.started_at = 100.0
        child.ended(status=9, now=100.5)
    assert child.due_at > 101.0
    child.ended(status=9, now=200.0)
    assert child.due_at == 200.0
    assert child.last_end == "SIGKILL"


def test_prepare_is_done_once_it_succeeds() -> None:
    child = Child("prepare", keep=False)
    child.ended(status=1 << 8, now=1.0)
    assert not child.done
    assert child.last_end == "exit 1"
    child.ended(status=0, now=2.0)
    assert child.done


def test_how_it_ended() -> None:
    assert how_it_ended(9) == "SIGKILL"
    assert how_it_ended(3 << 8) == "exit 3"


def telemetry(requests: int, at_s: float, boot: int = 1) -> np.ndarray:
    record = np.zeros((), dtype=TELEMETRY)
    record["monotonic_ns"] = int(at_s * 1e9) + 1
    record["boot_epoch"] = boot
    record["requests"] = requests
    record["service_ms"] = 4.0 * requests
    record["kv_tokens_computed"] = 90 * requests
    record["candidate_tokens"] = 10 * requests
    record["emb_accesses"] = 200 * requests
    record["emb_misses"] = 50 * requests
    record["class_misses"][:2] = (30 * requests, 20 * requests)
    record["cost_row_ms"][:2] = (0.001, 0.002)
    return record


def test_rates_of_a_window() -> None:
    window = RateWindow()
    for tick in range(100):
        rates = window.add(telemetry(10 * tick, tick * 0.25))
    assert rates.service_ms == pytest.approx(4.0)
    assert rates.rows_per_token == pytest.approx(2.0)
    assert rates.emb_miss_ratio == pytest.approx(0.25)
    assert rates.cost_row_ms == pytest.approx((30 * 0.001 + 20 * 0.002) / 50)


def test_an_idle_server_keeps_its_rates_and_a_new_one_starts_without() -> None:
    window = RateWindow()
    window.add(telemetry(0, 0.0))
    known = window.add(telemetry(MIN_REQUESTS * 2, 1.0))
    for second in range(2, 60):
        assert window.add(telemetry(MIN_REQUESTS * 2, second)).service_ms == known.service_ms
    assert window.add(telemetry(3, 61.0, boot=2)).service_ms == 0.0


def decision(**fields: float) -> np.ndarray:
    record = np.zeros((), dtype=DECISION)
    for name, value in fields.items():
        record[name] = value
    return record


def test_a_decision_in_words() -> None:
    reasons = int(Reason.MOVE_STARTED | Reason.ANCHOR_MOVED)
    record = decision(
        monotonic_ns=5_000_000_000, generation=7, tick=9, alpha=0.5, anchor=0.7, target=0.52,
        reasons=reasons, latency_us=12.5, gain=0.034, mode=1,
    )  # fmt: skip
    found = explained(record, wall_offset_ns=1_700_000_000_000_000_000)
    assert found["time"].startswith("2023-11-14T22:13:25")
    assert set(found["reasons"]) == {"MOVE_STARTED", "ANCHOR_MOVED"}
    line = human_line(found)
    for part in ("22:13:25.000Z", "auto", "α=0.500", "α̂=0.700", "target=0.520", "3.40%"):
        assert part in line
    assert Reason.MOVE_STARTED.description in line
    assert "\n" not in line


@given(st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1), st.floats())
def test_any_record_can_be_explained(reasons: int, mode: int, number: float) -> None:
    record = decision(mode=mode, alpha=number, anchor=number, gain=number, latency_us=number)
    record["reasons"] = reasons
    found = explained(record, wall_offset_ns=0)
    assert len(found["reasons"]) == reasons.bit_count()
    assert "NaN" not in to_json([found])
    assert human_line(found)


def test_what_each_layer_added_in_words_and_numbers() -> None:
    reasons = int(Reason.RESIDUAL | Reason.RAMPING | Reason.ANCHOR_MOVED | Reason.GATE_OPEN)
    record = decision(
        monotonic_ns=1, tick=9, alpha=0.5, anchor=0.7, target=0.53, gain=0.034, mode=1,
        reasons=reasons, gate_phase=1, gate_cost=1.0, gate_arrivals=-0.25, shift=-0.02,
        fraction_scale=0.5, slew_scale=2.0, wish=0.68, goal=0.6,
    )  # fmt: skip
    curves, seen = np.zeros((), CURVES), np.zeros((), TELEMETRY)
    curves["monotonic_ns"] = seen["monotonic_ns"] = 5
    curves["price_state"], curves["price_batches"] = PriceState.LEARNED, 1234
    curves["price_row_ms"][0], seen["cost_row_ms"][0] = 0.04, 0.01
    curves["price_token_ms"], seen["cost_token_ms"] = 0.02, 0.02
    said = "\n".join(block(explained(record, 0), prices(curves, seen), {}))
    for part in (
        "layers of tick 9",
        "learned from measured batches (1234 batches)",
        "row 0 0.04 (x4.00 of declared)",
        "token 0.02 (x1.00 of declared)",
        "α̂ 0.700, 3.40% cheaper than α 0.500: the best α changed",
        "gate      burst; evidence of another cost 1.00, of other arrivals -0.25",
        "shift -0.0200, part of the way x0.50",
        "wish 0.680 -> move to 0.600, speed x2.00, command 0.530 (-0.150 of the wish)",
        Reason.RAMPING.description,
    ):
        assert part in said
    unasked = decision(tick=1)
    said = "\n".join(block(explained(unasked, 0), {}, {"why": "", "how": "it does not count"}))
    assert "residual  it does not count" in said
    assert "prices" not in said


@given(st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1), st.floats())
def test_any_record_has_layers(reasons: int, phase: int, value: float) -> None:
    fields = ("anchor", "gate_cost", "shift", "fraction_scale", "slew_scale", "wish", "goal")
    record = decision(gate_phase=phase, **dict.fromkeys(fields, value))
    record["reasons"] = reasons
    found = explained(record, 0)
    assert "NaN" not in to_json([found])
    assert len(block(found, {}, {})) == 5


def test_every_reason_has_its_code() -> None:
    for reason in Reason:
        assert reason_codes(reason.value) == [reason.name]


def test_every_metric_has_its_row() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", DOCUMENT.read_text(), re.MULTILINE))
    metrics = SidecarMetrics()
    KubeMetrics(metrics.registry)
    exposed = {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in metrics.registry.collect()
    }
    assert rows == exposed


def test_the_supervisor_needs_no_libraries() -> None:
    import subprocess
    import sys

    code = "import hbm_sidecar.supervisor, sys; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    ).stdout.split()
    assert not {"numpy", "pydantic", "structlog", "typer", "redis", "fastapi"} & set(found)


def test_nan_is_none_in_json() -> None:
    found = explained(decision(anchor=math.nan, gain=math.inf), wall_offset_ns=0)
    assert found["anchor"] is None
    assert found["gain"] is None
