"""Policies and a pod in, the partition's spec and conditions out: golden files and properties.

A golden file holds `policies`, `pod`, maybe `partition`, and what must come of them. Write the
expected parts anew with `HBM_UPDATE_GOLDEN=1` and read the difference.
"""

from __future__ import annotations

import os
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hbm_operator import names
from hbm_operator.conditions import partition_conditions
from hbm_operator.models.partition import HBMPartitionSpec, PartitionMode, PodReference
from hbm_operator.models.policy import HBMPolicy
from hbm_operator.observed import Partition, Pod
from hbm_operator.planner import matches, plan, select
from hypothesis import given
from hypothesis import strategies as st

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.yaml"))
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
STALE_S = 90.0


@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_golden(path: Path) -> None:
    case = yaml.safe_load(path.read_text())
    pod = Pod.of(case["pod"])
    policies = [HBMPolicy.model_validate(policy) for policy in case.get("policies") or ()]
    existing = Partition.of(case["partition"]) if "partition" in case else None
    spec, selection = plan(policies, pod, existing.spec if existing else None)
    expected: dict[str, Any] = {"spec": spec.to_object()}
    if existing is not None:
        conditions = partition_conditions(existing, pod, selection, now=NOW, stale_s=STALE_S)
        expected["conditions"] = [condition.to_object() for condition in conditions]
    if os.environ.get("HBM_UPDATE_GOLDEN"):
        head = {key: value for key, value in case.items() if key != "expected"}
        dumped = yaml.safe_dump(head | {"expected": expected}, sort_keys=False, allow_unicode=True)
        path.write_text(dumped)
    assert expected == case.get("expected")


# -- properties ------------------------------------------------------------------------------------

LABELS = st.dictionaries(st.sampled_from("abc"), st.sampled_from("xyz"), max_size=3)
REQUIREMENTS = st.one_of(
    st.builds(
        lambda key, operator, values: {"key": key, "operator": operator, "values": values},
        st.sampled_from("abc"),
        st.sampled_from(["In", "NotIn"]),
        st.lists(st.sampled_from("xyz"), min_size=1, max_size=3),
    ),
    st.builds(
        lambda key, operator: {"key": key, "operator": operator},
        st.sampled_from("abc"),
        st.sampled_from(["Exists", "DoesNotExist"]),
    ),
)
SPECS = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["Auto", "Recommend"]),
        "priority": st.integers(0, 2),
        "selector": st.fixed_dictionaries(
            {"matchLabels": LABELS, "matchExpressions": st.lists(REQUIREMENTS, max_size=2)}
        ),
        "tickMilliseconds": st.integers(20, 60_000),
    },
    optional={"container": st.sampled_from(["model", "other"])},
)


def as_policy(index: int, spec: dict[str, Any], age_s: int, deleting: bool) -> HBMPolicy:
    metadata: dict[str, Any] = {
        "name": f"p{index}",
        "namespace": "ns",
        "uid": f"uid-{index}",
        "generation": 1 + index,
        "creationTimestamp": (NOW - timedelta(seconds=age_s)).isoformat(),
    }
    if deleting:
        metadata["deletionTimestamp"] = NOW.isoformat()
    return HBMPolicy.model_validate({"metadata": metadata, "spec": spec})


POLICIES = st.lists(st.tuples(SPECS, st.integers(0, 2), st.booleans().map(bool)), max_size=5).map(
    lambda rows: [as_policy(i, *row) for i, row in enumerate(rows)]
)


def as_pod(labels: dict[str, str], uid: str = "pod-uid") -> Pod:
    return Pod("ns", "pod-0", uid, 1, labels, "n", "model", True, "", "Running", False, None)


PODS = LABELS.map(as_pod)


@given(POLICIES, PODS, st.randoms(use_true_random=False))
def test_the_order_of_the_policies_does_not_matter(
    policies: list[HBMPolicy], pod: Pod, chance: random.Random
) -> None:
    shuffled = policies[:]
    chance.shuffle(shuffled)
    assert select(policies, pod) == select(shuffled, pod)


@given(POLICIES, PODS)
def test_the_one_that_governs_beats_every_other_that_matches(
    policies: list[HBMPolicy], pod: Pod
) -> None:
    chosen = select(policies, pod).policy
    matching = [policy for policy in policies if matches(policy, pod)]
    if chosen is None:
        assert not matching
        return
    assert chosen.metadata.deletion_timestamp is None
    for other in matching:
        assert chosen.spec.priority >= other.spec.priority
        if chosen.spec.priority == other.spec.priority:
            assert (chosen.metadata.creation_timestamp, chosen.metadata.name) <= (
                other.metadata.creation_timestamp,
                other.metadata.name,
            )


@given(POLICIES, POLICIES, PODS)
def test_planning_again_changes_nothing(
    before: list[HBMPolicy], after: list[HBMPolicy], pod: Pod
) -> None:
    first, _ = plan(before, pod, None)
    second, _ = plan(after, pod, first)
    third, _ = plan(after, pod, second)
    assert third == second


@given(POLICIES, PODS)
def test_what_is_written_reads_back_as_the_same_spec(policies: list[HBMPolicy], pod: Pod) -> None:
    wanted, _ = plan(policies, pod, None)
    stored = wanted.to_object() | {"podRef": {"name": pod.name, "uid": pod.uid}}
    assert HBMPartitionSpec.model_validate(stored) == wanted


@given(POLICIES, PODS)
def test_without_a_policy_alpha_is_held_within_the_bounds_it_had(
    policies: list[HBMPolicy], pod: Pod
) -> None:
    governed, _ = plan(policies, pod, None)
    held, selection = plan([], pod, governed)
    assert selection.policy is None
    assert held.mode is PartitionMode.HOLD
    assert held.policy_ref is None
    assert held.alpha == governed.alpha


@given(POLICIES, PODS)
def test_a_partition_never_claims_another_pod(policies: list[HBMPolicy], pod: Pod) -> None:
    previous, _ = plan(policies, as_pod(dict(pod.labels), uid="predecessor"), None)
    spec, _ = plan(policies, pod, previous)
    assert spec.pod_ref == PodReference(name=pod.name, uid=pod.uid)


def as_partition(**status: Any) -> Partition:
    spec, _ = plan([], as_pod({}), None)
    return Partition.of(
        {
            "apiVersion": names.API_VERSION,
            "kind": "HBMPartition",
            "metadata": {
                "name": "pod-0",
                "namespace": "ns",
                "uid": "u",
                "generation": 2,
                "creationTimestamp": (NOW - timedelta(hours=1)).isoformat(),
            },
            "spec": spec.to_object(),
            "status": status,
        }
    )


@given(
    age_s=st.integers(0, 300),
    phase=st.sampled_from(["Pending", "Running", "Unknown"]),
    terminating=st.booleans(),
)
def test_only_the_silence_of_a_running_pod_counts(
    age_s: int, phase: str, terminating: bool
) -> None:
    pod = as_pod({})._replace(phase=phase, terminating=terminating)
    partition = as_partition(lastReportTime=(NOW - timedelta(seconds=age_s)).isoformat())
    found = partition_conditions(partition, pod, select([], pod), now=NOW, stale_s=STALE_S)
    degraded = next(one for one in found if one.type == "Degraded")
    silent = phase == "Running" and not terminating and age_s > STALE_S
    assert (degraded.reason == "SidecarSilent") == silent


@given(age_s=st.integers(0, 300))
def test_a_sidecar_that_just_started_has_the_time_to_speak(age_s: int) -> None:
    """Its image may have been pulled for minutes, and a restart interrupts its reports."""
    started = NOW - timedelta(seconds=age_s)
    pod = as_pod({})._replace(sidecar_started=started)
    found = partition_conditions(as_partition(), pod, select([], pod), now=NOW, stale_s=STALE_S)
    degraded = next(one for one in found if one.type == "Degraded")
    assert (degraded.reason == "SidecarSilent") == (age_s > STALE_S)


def test_the_start_of_the_sidecar_is_read_off_the_pod() -> None:
    status = {
        "initContainerStatuses": [
            {"name": "other", "state": {"running": {"startedAt": "2026-01-01T10:00:00Z"}}},
            {"name": "hbm-sidecar", "state": {"running": {"startedAt": "2026-01-01T11:00:00Z"}}},
        ]
    }
    metadata = {"name": "a", "namespace": "ns", "uid": "u"}
    assert Pod.of({"metadata": metadata, "status": status}).sidecar_started == datetime(
        2026, 1, 1, 11, tzinfo=UTC
    )
    status["initContainerStatuses"][1]["state"] = {"waiting": {"reason": "CrashLoopBackOff"}}
    assert Pod.of({"metadata": metadata, "status": status}).sidecar_started is None


def test_a_condition_that_stays_the_same_is_not_written_again_as_time_goes_by() -> None:
    pod = as_pod({})
    partition = as_partition(lastReportTime=(NOW - timedelta(seconds=100)).isoformat())
    first = partition_conditions(partition, pod, select([], pod), now=NOW, stale_s=STALE_S)
    kept = partition._replace(status=partition.status.model_copy(update={"conditions": first}))
    later = NOW + timedelta(minutes=10)
    again = partition_conditions(kept, pod, select([], pod), now=later, stale_s=STALE_S)
    assert again == first


def test_an_older_sidecar_is_named_and_goes_on_working(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "PROTOCOL_VERSION", 2)
    said = {"type": "Applied", "status": "True", "reason": "Applied", "observedGeneration": 2}
    partition = as_partition(
        lastReportTime=NOW.isoformat(),
        sidecar={"version": "0.1.0", "protocol": 1},
        conditions=[said | {"lastTransitionTime": NOW.isoformat()}],
    )
    policies = [as_policy(0, {}, 0, False)]
    pod = as_pod({})
    found = partition_conditions(partition, pod, select(policies, pod), now=NOW, stale_s=STALE_S)
    assert {one.type: (one.status.value, one.reason) for one in found} == {
        "Admitted": ("True", "PolicySelected"),
        "Degraded": ("True", "SidecarOutdated"),
        "Ready": ("True", "Ready"),
    }
