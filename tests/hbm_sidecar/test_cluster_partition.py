"""From an HBMPartition to the wish, and from what is known to its status: the pure parts."""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hbm_operator import names
from hbm_operator.models.partition import HBMPartition, HBMPartitionStatus, PartitionMode
from hbm_operator.models.policy import GovernSpec
from hbm_pool.contracts.records import TELEMETRY
from hbm_sidecar import cluster_status
from hbm_sidecar.artefact import Artefact, ResidualSlot
from hbm_sidecar.cluster import ClusterPartition, SpecRefused, bytes_of, wish_of
from hbm_sidecar.cluster_status import (
    FIELD_MANAGER,
    HEARTBEAT_S,
    JITTER,
    PENDING_GRACE_S,
    PROTOCOL_VERSION,
    REPORT_S,
    Applied,
    Pacing,
    Report,
    measured,
    status_of,
)
from hbm_sidecar.launch import LaunchError, configuration
from hbm_sidecar.log import configure
from hbm_sidecar.partition import (
    LocalPartition,
    ModeName,
    Partition,
    PartitionRefused,
    new_intent,
)
from hypothesis import given
from hypothesis import strategies as st

from tests.residual_model import residual_model

UID = "11111111-aaaa"
STARTED = Partition()
SPEC: dict[str, Any] = {
    "podRef": {"name": "web-0", "uid": UID},
    "mode": "Auto",
    "alpha": {"min": 0.2, "max": 0.8, "initial": 0.6},
    "slo": {"latencyMs": 80},
    "refill": {"maxBytesPerSecond": "64Mi"},
    "moves": {"slewPerSecond": 0.1, "fraction": 0.5, "minChange": 0.03, "dwellSeconds": 4},
    "tickMilliseconds": 500,
}
CONTENT = residual_model((0.5, 0.0, 0.0, 0.0))
GOOD = {"key": "residual.onnx", "sha256": hashlib.sha256(CONTENT).hexdigest()}


def partition(generation: int = 1, uid: str = "p-1", **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "web-0", "namespace": "n", "uid": uid, "generation": generation},
        "spec": copy.deepcopy(SPEC) | spec,
    }


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    """Where the ConfigMap is mounted; it is not there yet."""
    return tmp_path / "policies"


@pytest.fixture
def source(tmp_path: Path, policies: Path) -> ClusterPartition:
    return ClusterPartition(STARTED, "n", "web-0", UID, policies, tmp_path)


def again(source: ClusterPartition, tmp_path: Path, uid: str = UID) -> ClusterPartition:
    """The source of a process that starts after `source` has died."""
    return ClusterPartition(STARTED, "n", "web-0", uid, tmp_path / "policies", tmp_path)


def test_every_field_of_the_spec_reaches_the_wish() -> None:
    assert wish_of(SPEC, STARTED) == Partition(
        mode=ModeName.AUTO,
        alpha_min=0.2,
        alpha_max=0.8,
        alpha_initial=0.6,
        slo_ms=80.0,
        tick_ms=500.0,
        refill_bytes_per_s=64 * 2**20,
        slew_per_s=0.1,
        move_fraction=0.5,
        min_change=0.03,
        dwell_ms=4000.0,
    )


def test_what_the_models_leave_at_their_defaults_is_what_the_sidecar_starts_with() -> None:
    """A policy that says nothing and a sidecar that is told nothing do the same."""
    spec = GovernSpec().to_object()
    assert wish_of(spec, STARTED) == STARTED


@pytest.mark.parametrize("mode", list(PartitionMode))
def test_every_mode_is_known(mode: PartitionMode) -> None:
    spec = SPEC | {"mode": mode.value, "alpha": {"min": 0.1, "max": 0.9, "fixed": 0.4}}
    assert wish_of(spec, STARTED).mode.value == mode.value.lower()


def test_without_a_mode_alpha_is_held() -> None:
    assert wish_of({"podRef": SPEC["podRef"]}, STARTED).mode is ModeName.HOLD


def test_fields_of_a_newer_version_are_left_alone() -> None:
    newer = SPEC | {"gravity": {"up": True}, "moves": SPEC["moves"] | {"style": "bold"}}
    assert wish_of(newer, STARTED) == wish_of(SPEC, STARTED)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (
            {"mode": "Fixed", "alpha": {"min": 0.2}},
            "spec.alpha.fixed: mode fixed needs",
        ),
        ({"alpha": {"min": 0.9, "max": 0.2}}, "spec.alpha.max: alpha.max is 0.2, below alpha.min"),
        ({"tickMilliseconds": 5}, "spec.tickMilliseconds: Input should be greater"),
        ({"refill": {"maxBytesPerSecond": "lots"}}, "'lots' is no quantity"),
        ({"moves": {"dwellSeconds": "soon"}}, "spec: could not convert"),
        ({"mode": "Warp"}, "spec.mode: Input should be"),
    ],
)
def test_a_spec_that_cannot_be_followed_is_refused_by_its_own_names(
    spec: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(SpecRefused) as caught:
        wish_of(SPEC | spec, STARTED)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("quantity", "number"),
    [("256Mi", 2**28), ("1.5G", 1.5e9), ("0", 0), (4096, 4096), ("10k", 1e4), ("1Ti", 2**40)],
)
def test_quantities(quantity: object, number: float) -> None:
    assert bytes_of(quantity) == number


@given(st.text(max_size=20))
def test_no_text_is_a_number_of_bytes_by_accident(text: str) -> None:
    try:
        number = bytes_of(text)
    except ValueError:
        return
    assert math.isfinite(number)
    assert number >= 0.0


def test_without_a_partition_alpha_is_held_and_put_names_the_owner(
    source: ClusterPartition,
) -> None:
    assert source.current().mode is ModeName.HOLD
    assert source.owner == "HBMPartition n/web-0 (there is none yet: α is held)"
    with pytest.raises(PartitionRefused, match="HBMPartition n/web-0"):
        source.put(STARTED)


def test_a_change_is_news_once_and_a_status_is_none(source: ClusterPartition) -> None:
    assert source.observe(partition())
    assert source.poll()
    assert not source.poll()
    source.observe(partition() | {"status": {"alpha": 0.5}})
    assert not source.poll()
    source.observe(partition(2, mode="Hold"))
    assert source.poll()
    assert (source.current().mode, source.generation) == (ModeName.HOLD, 2)


def test_a_partition_of_another_pod_is_ignored(source: ClusterPartition) -> None:
    """A StatefulSet's pod comes back under its name: the old object is not about it."""
    assert not source.observe(partition(podRef={"name": "web-0", "uid": "predecessor"}))
    assert source.current().mode is ModeName.HOLD
    assert source.generation == 0
    assert "that of another pod, uid predecessor" in source.owner
    source.vanished("p-1")
    assert source.observe(partition(uid="p-2"))
    assert source.current().mode is ModeName.AUTO


def test_a_deleted_partition_holds_but_only_if_it_was_this_one(source: ClusterPartition) -> None:
    source.observe(partition(uid="p-2"))
    source.vanished("p-1")
    assert source.current().mode is ModeName.AUTO
    source.vanished("p-2")
    assert source.current().mode is ModeName.HOLD
    assert source.poll()


def test_a_refused_spec_leaves_the_one_before(source: ClusterPartition) -> None:
    source.observe(partition())
    source.observe(partition(2, mode="Warp"))
    assert source.current() == wish_of(SPEC, STARTED)
    assert source.verdict.reason == "SpecRefused"
    assert "stays in force" in source.verdict.message
    source.observe(partition(3))
    assert source.verdict.reason == ""


def test_a_restart_goes_on_with_the_last_wish(source: ClusterPartition, tmp_path: Path) -> None:
    source.observe(partition(7))
    assert again(source, tmp_path).current() == wish_of(SPEC, STARTED)
    assert again(source, tmp_path).generation == 7
    # Another pod with the same directory would be another one.
    assert again(source, tmp_path, uid="another").current().mode is ModeName.HOLD
    source.vanished()
    assert again(source, tmp_path).current().mode is ModeName.HOLD


@given(st.binary(max_size=200) | st.from_type(dict).map(lambda d: json.dumps(str(d)).encode()))
def test_a_damaged_file_is_as_if_it_were_not_there(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "cluster-partition.json").write_bytes(content)
    source = ClusterPartition(STARTED, "n", "web-0", UID, folder, folder)
    assert source.current().mode is ModeName.HOLD


# -- the artefact -------------------------------------------------------------------------------


def test_an_artefact_that_is_missing_wrong_right_and_gone(
    source: ClusterPartition, policies: Path
) -> None:
    source.observe(partition(artefact=GOOD))
    assert source.verdict.reason == "ArtefactPending"
    assert source.current() == wish_of(SPEC, STARTED)  # the rest of the spec does not wait
    policies.mkdir()
    file = policies / GOOD["key"]
    file.write_bytes(CONTENT[:-1])
    source.poll()
    assert source.verdict.reason == "ArtefactInvalid"
    assert GOOD["sha256"][:12] in source.verdict.message
    file.unlink()
    file.write_bytes(CONTENT)
    assert source.poll(), "the intent is to name it"
    assert f"{source.residual_hash:016x}" == GOOD["sha256"][:16]
    assert source.verdict.reason == "ArtefactPending"
    assert "the process that decides" in source.verdict.message
    slot = ResidualSlot(policies.parent, 0.5, configure("test"))
    assert slot.follow(source.residual_hash)
    assert not source.poll()
    assert source.verdict == ("", source.verdict.message)
    assert "gain 0.5" in source.verdict.message
    file.unlink()
    source.poll()
    assert source.verdict.reason == "ArtefactPending"
    assert not slot.follow(source.residual_hash), "what was loaded goes on"
    assert slot.residual is not None


def test_a_file_that_is_no_policy_leaves_the_one_of_before(
    source: ClusterPartition, policies: Path
) -> None:
    policies.mkdir()
    (policies / GOOD["key"]).write_bytes(CONTENT)
    source.observe(partition(artefact=GOOD))
    slot = ResidualSlot(policies.parent, 1.0, configure("test"))
    assert slot.follow(source.residual_hash)
    before = slot.residual
    wrong = residual_model(observation_version="999")
    named = {"key": "other.onnx", "sha256": hashlib.sha256(wrong).hexdigest()}
    source.observe(partition(2, artefact=named))
    assert source.verdict.reason == "ArtefactPending"
    assert not slot.follow(source.residual_hash), "not there yet: the old one goes on"
    (policies / "other.onnx").write_bytes(wrong)
    source.poll()
    assert not slot.follow(source.residual_hash)
    assert slot.residual is before
    source.poll()
    assert source.verdict.reason == "ArtefactInvalid"
    assert "version 999" in source.verdict.message
    assert "the policy of before decides" in source.verdict.message
    # Back to the old one: nothing has to be loaded.
    source.observe(partition(3, artefact=GOOD))
    assert not slot.follow(source.residual_hash)
    source.poll()
    assert source.verdict.reason == ""
    source.observe(partition(4))
    assert source.residual_hash == 0
    assert slot.follow(0)
    assert slot.residual is None


def test_a_residual_of_a_flag_comes_late(tmp_path: Path) -> None:
    file = tmp_path / "mine.onnx"
    source = LocalPartition(
        STARTED, tmp_path, Artefact(file, GOOD["sha256"], tmp_path, f"at {file}")
    )
    assert source.residual_hash == 0
    assert str(file) in source.residual_verdict.message
    assert not source.poll()
    file.write_bytes(CONTENT)
    assert source.poll()
    intent = new_intent()
    source.current().fill_intent(intent, 1, 1, source.residual_hash)
    slot = ResidualSlot(tmp_path, 0.0, configure("test"))
    assert slot.follow(int(intent["residual_hash"]))
    source.poll()
    assert source.residual_verdict.reason == ""
    assert "HBM_RESIDUAL_GAIN" in source.residual_verdict.message


def test_an_artefact_that_cannot_be_one(source: ClusterPartition, policies: Path) -> None:
    policies.mkdir()
    (policies / GOOD["key"]).mkdir()
    source.observe(partition(artefact=GOOD))
    assert source.verdict.reason == "ArtefactInvalid"
    for key in ("..", "../../etc/passwd", ""):
        source.observe(partition(source.generation + 1, artefact=GOOD | {"key": key}))
        assert source.verdict.reason == "ArtefactInvalid", key


def test_a_larger_file_than_a_config_map_holds_is_not_read_whole(
    source: ClusterPartition, policies: Path
) -> None:
    policies.mkdir()
    with (policies / GOOD["key"]).open("wb") as file:
        file.truncate(1 << 30)
    source.observe(partition(artefact=GOOD))
    assert source.verdict.reason == "ArtefactInvalid"


# -- the status ---------------------------------------------------------------------------------

NOW = datetime.datetime(2026, 5, 4, 3, 2, 1, tzinfo=datetime.UTC)
FOLLOWED = Applied("True", "Applied", "decisions follow this spec")
PENDING = Applied("False", "Pending", "no decision yet")


def report(generation: int = 1, applied: Applied = FOLLOWED, **values: Any) -> Report:
    return Report(generation, applied, {"alpha": 0.5, "p99Ms": 40.0, "moves": 1} | values)


def test_both_sides_speak_the_same_protocol() -> None:
    assert PROTOCOL_VERSION == names.PROTOCOL_VERSION
    assert FIELD_MANAGER == names.SIDECAR_MANAGER


def test_a_status_is_one_that_the_models_accept() -> None:
    telemetry = np.zeros((), dtype=TELEMETRY)
    telemetry["alpha"], telemetry["latency_p99_ms"], telemetry["latency_n"] = 0.51239, 12.5, 100
    values = measured(
        telemetry, fresh=True, target=0.6, anchor=math.nan, kv_hit_ratio=0.25, emb_hit_ratio=0.5
    )
    values["sidecar"] = cluster_status.sidecar(3)
    values["lastDecision"] = cluster_status.last_decision(
        {"time": "2026-05-04T03:02:01.123+00:00", "reasons": ["DWELL"] * 20, "text": "x" * 3000}
    )
    status = status_of(Report(4, FOLLOWED, values), {}, NOW)
    read = HBMPartitionStatus.model_validate(status)
    assert (read.alpha, read.target, read.anchor) == (0.5124, 0.6, None)
    assert (read.kv_hit_ratio, read.emb_hit_ratio, read.p99_ms) == (0.25, 0.5, 12.5)
    assert read.last_report_time == NOW
    assert read.conditions[0].observed_generation == read.observed_generation == 4
    assert HBMPartition.model_validate(
        {**partition(), "apiVersion": names.API_VERSION, "kind": "HBMPartition", "status": status}
    )


def test_nothing_is_measured_of_a_dead_server() -> None:
    values = measured(
        np.zeros((), dtype=TELEMETRY),
        fresh=False,
        target=0.4,
        anchor=math.nan,
        kv_hit_ratio=0.3,
        emb_hit_ratio=0.3,
    )
    assert values == {"target": 0.4}


def test_a_transition_time_moves_only_with_the_status() -> None:
    before = status_of(report(1, PENDING), {}, NOW)["conditions"][0]
    later = NOW + datetime.timedelta(minutes=1)
    same = status_of(report(2, Applied("False", "ServerAbsent", "")), before, later)
    assert same["conditions"][0]["lastTransitionTime"] == before["lastTransitionTime"]
    other = status_of(report(2), before, later)
    assert other["conditions"][0]["lastTransitionTime"] == "2026-05-04T03:03:01Z"


def test_a_generation_and_a_condition_are_said_at_once() -> None:
    pacing = Pacing(random.Random(1))
    assert pacing.due(report(), 0.0) == "generation"
    pacing.told(report(), 0.0)
    assert pacing.due(report(), 0.1) == ""
    assert pacing.due(report(2), 0.2) == "generation"
    pacing.told(report(2), 0.2)
    absent = report(2, Applied("False", "ServerAbsent", ""))
    assert pacing.due(absent, 0.3) == "condition"


def test_a_generation_waits_a_moment_for_its_first_decision() -> None:
    pacing = Pacing(random.Random(1))
    assert pacing.due(report(1, PENDING), 10.0) == ""
    assert pacing.due(report(1), 10.3) == "generation"
    pacing.told(report(1), 10.3)
    assert pacing.due(report(2, PENDING), 11.0) == ""
    assert pacing.due(report(3, PENDING), 11.0 + PENDING_GRACE_S) == ""
    assert pacing.due(report(3, PENDING), 11.0 + 2 * PENDING_GRACE_S) == "generation"


def test_values_wait_their_turn_and_silence_is_never_long() -> None:
    pacing = Pacing(random.Random(1))
    pacing.told(report(), 0.0)
    moved = report(alpha=0.6)
    assert pacing.due(moved, REPORT_S * (1 - JITTER) - 0.1) == ""
    assert pacing.due(moved, REPORT_S * (1 + JITTER)) == "values"
    for near in (report(alpha=0.505), report(p99Ms=42.0), report()):
        assert pacing.due(near, REPORT_S * (1 + JITTER)) == ""
        assert pacing.due(near, HEARTBEAT_S * (1 + JITTER)) == "heartbeat"


@pytest.mark.parametrize(
    "values", [{"p99Ms": 60.0}, {"moves": 2}, {"anchor": 0.4}, {"lastDecision": {"time": "x"}}]
)
def test_what_is_worth_saying(values: dict[str, Any]) -> None:
    pacing = Pacing(random.Random(1))
    pacing.told(report(), 0.0)
    assert pacing.due(report(**values), REPORT_S * (1 + JITTER)) == "values"


def test_reports_of_a_fleet_spread() -> None:
    """Sidecars that began at the same moment do not go on writing at the same moment."""
    times = set()
    for seed in range(100):
        pacing = Pacing(random.Random(seed))
        pacing.told(report(), 0.0)
        times.add(next(t for t in range(200) if pacing.due(report(), float(t))))
    assert len(times) > 15


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"kube_token_dir": "/t"}, "pod_name and pod_uid are needed"),
        ({"kube_token_dir": "/t", "policy_file": "/p"}, "kube_token_dir and policy_file are both"),
        (
            {"redis_url": "redis://h", "redis_url_file": "/u", "node_url": "http://h"},
            "redis_url and redis_url_file are both",
        ),
    ],
)
def test_settings_that_exclude_each_other(given: dict[str, str], complaint: str) -> None:
    with pytest.raises(LaunchError, match=complaint):
        configuration(given)
