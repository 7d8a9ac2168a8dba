"""Reasons are said in words; a reading is what the records say."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hbm_policy import Intake, Reason, describe, read_curve
from hbm_policy.intake import Fields
from hbm_policy.reading import HOLDS
from hbm_pool.contracts.records import CURVES, INTENT, MAX_CURVE_POINTS, TELEMETRY, Mode


def test_every_reason_has_its_own_bit_and_words() -> None:
    bits = [int(reason) for reason in Reason]
    assert all(bit.bit_count() == 1 for bit in bits)
    assert len(set(bits)) == len(bits)
    words = [reason.description for reason in Reason]
    assert all(words)
    assert len(set(words)) == len(words)


def test_reasons_are_described_lowest_bit_first_and_unknown_ones_by_number() -> None:
    reasons = int(Reason.DWELL | Reason.TWIN_COLD) | 1 << 60
    assert describe(reasons) == [
        Reason.TWIN_COLD.description,
        Reason.DWELL.description,
        "unknown reason (bit 60)",
    ]
    assert describe(0) == []


def test_holds_are_the_reasons_that_keep_alpha() -> None:
    assert HOLDS & Reason.TELEMETRY_STALE
    assert HOLDS & Reason.MODE_HOLD
    assert not HOLDS & Reason.DWELL


def test_intake_reads_each_field_of_the_records(make_info) -> None:
    telemetry = np.zeros((), TELEMETRY)
    telemetry["monotonic_ns"], telemetry["boot_epoch"] = 11, 12
    telemetry["alpha"], telemetry["alpha_target"] = 0.25, 0.5
    telemetry["command_generation"], telemetry["moving"] = 13, 1
    telemetry["requests"], telemetry["draining"] = 14, 0
    telemetry["emb_accesses"] = 15
    telemetry["class_extents"] = (3, 2, 0, 0)
    telemetry["refill_backlog_rows"], telemetry["link_busy"] = 16, 0.75
    intent = np.zeros((), INTENT)
    intent["mode"], intent["alpha_min"], intent["alpha_max"] = Mode.FIXED, 0.2, 0.8
    intent["alpha_fixed"], intent["refill_bytes_per_s"] = 0.4, 1e6
    curves = np.zeros((), CURVES)
    curves["monotonic_ns"], curves["boot_epoch"], curves["points"] = 17, 12, 3
    curves["requests"], curves["requests_lost"], curves["warm"] = 18, 19, 0.5
    curves["alpha"][:3], curves["cost_ms"][:3] = (0.1, 0.5, 0.9), (3.0, 2.0, 4.0)

    seen = Intake(make_info()).reading(20, 12, telemetry, intent, curves)

    assert seen.now_ns == 20
    assert (seen.boot_epoch, seen.telemetry_ns, seen.telemetry_epoch) == (12, 11, 12)
    assert (seen.alpha, seen.alpha_target, seen.command_generation) == (0.25, 0.5, 13)
    assert (seen.moving, seen.draining, seen.requests) == (True, False, 14)
    assert seen.emb_accesses == 15
    assert seen.emb_slots == 3 * 32 + 2 * 64
    assert (seen.refill_backlog_rows, seen.link_busy, seen.extents) == (16, 0.75, 64)
    assert (seen.server_alpha_min, seen.server_alpha_max) == (0.1, 0.9)
    assert (seen.mode, seen.alpha_min, seen.alpha_max) == (Mode.FIXED, 0.2, 0.8)
    assert (seen.alpha_fixed, seen.refill_bytes_per_s) == (0.4, 1e6)
    assert seen.curve == read_curve(curves)
    assert seen.curve is not None
    assert seen.curve.alpha == (0.1, 0.5, 0.9)
    assert seen.curve.cost_ms == (3.0, 2.0, 4.0)
    assert seen.curve[:5] == (17, 12, 18, 19, 0.5)


def test_intake_follows_records_that_are_refreshed_in_place(make_info) -> None:
    intake = Intake(make_info())
    telemetry, curves = np.zeros((), TELEMETRY), np.zeros((), CURVES)
    for step in range(1, 4):
        telemetry["alpha"] = step / 10
        curves["monotonic_ns"], curves["points"] = step, 1
        curves["cost_ms"][0] = step
        seen = intake.reading(step, 1, telemetry, None, curves)
        assert seen.alpha == step / 10
        assert seen.curve is not None
        assert seen.curve.cost_ms == (step,)


def test_intake_without_records_says_that_nothing_was_read(make_info) -> None:
    seen = Intake(make_info()).reading(20, 12, None, None, None)
    assert seen.telemetry_ns == 0
    assert seen.mode is None
    assert seen.curve is None


@pytest.mark.parametrize("points", [-1, MAX_CURVE_POINTS + 1, 2**62])
def test_a_curve_with_an_impossible_number_of_points_is_empty(points: int) -> None:
    curves = np.zeros((), CURVES)
    curves["points"] = points
    assert read_curve(curves).alpha == ()


@pytest.mark.parametrize("cost_ms", [math.nan, math.inf, 0.0, -1.0])
def test_a_curve_with_an_impossible_cost_is_empty(cost_ms: float) -> None:
    curves = np.zeros((), CURVES)
    curves["points"] = 2
    curves["alpha"][:2], curves["cost_ms"][:2] = (0.1, 0.5), (1.0, cost_ms)
    assert read_curve(curves).alpha == read_curve(curves).cost_ms == ()


def test_fields_must_be_named_in_the_order_of_the_record() -> None:
    with pytest.raises(ValueError, match="order"):
        Fields(INTENT, ("alpha_max", "alpha_min"))


def test_fields_of_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be unpacked"):
        Fields(np.dtype([("small", "<i2")]), ("small",))


def test_deciding_needs_no_numba() -> None:
    code = "import sys, hbm_policy; sys.exit(1 if 'numba' in sys.modules else 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_names_of_the_package_are_attribute_errors() -> None:
    import hbm_policy

    with pytest.raises(AttributeError, match="no attribute 'Twim'"):
        _ = hbm_policy.Twim
    assert math.isnan(hbm_policy.PolicyState().anchor)
