"""The controller's conditions: of a partition from what the sidecar says, of a policy from counts.

Pure. Messages never hold an age or a clock time that moves by itself: a condition that differs is
written, and every write wakes whoever watches.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from hbm_operator import names
from hbm_operator.models.base import Condition, ConditionStatus, find_condition
from hbm_operator.models.partition import ConditionType, PartitionMode, Reason
from hbm_operator.models.policy import HBMPolicy
from hbm_operator.observed import Partition, Pod
from hbm_operator.planner import Selection

TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN
REFUSALS = frozenset({Reason.ARTEFACT_INVALID, Reason.SPEC_REFUSED})
"""Why a sidecar does not follow a spec and will not by waiting."""
MAX_NAMED = 3
"""Policies named in a message."""


class Verdict(NamedTuple):
    """One condition without its history."""

    type: str
    status: ConditionStatus
    reason: str
    message: str


def is_silent(partition: Partition, pod: Pod, now: datetime, stale_s: float) -> bool:
    """The pod runs, and its sidecar has not written for `stale_s` seconds, though it had the time:
    it counts from its start at the earliest."""
    if pod.phase != "Running" or pod.terminating:
        return False
    last = partition.status.last_report_time or partition.created
    since = max(last, pod.sidecar_started or last)
    return now - since > timedelta(seconds=stale_s)


def applied(partition: Partition) -> Condition | None:
    """What the sidecar says of the newest spec; None while it has not looked at it."""
    said = find_condition(partition.status.conditions, ConditionType.APPLIED)
    if said is None or said.observed_generation < partition.generation:
        return None
    return said


def partition_conditions(
    partition: Partition, pod: Pod, selection: Selection, *, now: datetime, stale_s: float
) -> tuple[Condition, ...]:
    """Admitted, Degraded and Ready as they shall be."""
    silent = is_silent(partition, pod, now, stale_s)
    verdicts = (
        _admitted(selection),
        _degraded(partition, silent, now, stale_s),
        _ready(partition, selection, silent),
    )
    return stamped(verdicts, partition.status.conditions, partition.generation, now)


def stamped(
    verdicts: tuple[Verdict, ...],
    before: tuple[Condition, ...],
    generation: int,
    now: datetime,
) -> tuple[Condition, ...]:
    """Verdicts as conditions that keep the time of their last change of status."""
    return tuple(
        Condition.new(
            verdict.type,
            verdict.status,
            verdict.reason,
            verdict.message,
            generation=generation,
            now=now,
            before=find_condition(before, verdict.type),
        )
        for verdict in verdicts
    )


def differing(wanted: tuple[Condition, ...], found: tuple[Condition, ...]) -> list[Condition]:
    """Those of `wanted` that are not in `found` as they are."""
    return [one for one in wanted if find_condition(found, one.type) != one]


def _admitted(selection: Selection) -> Verdict:
    policy = selection.policy
    if policy is None:
        return Verdict(
            ConditionType.ADMITTED,
            FALSE,
            Reason.NO_POLICY,
            "No HBMPolicy of this namespace selects this pod; α is held where it is.",
        )
    message = f"HBMPolicy {policy.metadata.name} governs this pod."
    if selection.overruled:
        message += f" Overruled, though they match too: {_listed(selection.overruled)}."
    return Verdict(ConditionType.ADMITTED, TRUE, Reason.POLICY_SELECTED, message)


def _listed(of: tuple[str, ...]) -> str:
    named = ", ".join(of[:MAX_NAMED])
    return f"{named} and {len(of) - MAX_NAMED} more" if len(of) > MAX_NAMED else named


def _degraded(partition: Partition, silent: bool, now: datetime, stale_s: float) -> Verdict:
    status, said = partition.status, applied(partition)
    if silent:
        last = status.last_report_time
        since = f"since {last:%Y-%m-%dT%H:%M:%SZ}" if last else "since the partition was made"
        return Verdict(
            ConditionType.DEGRADED,
            TRUE,
            Reason.SIDECAR_SILENT,
            f"The pod runs, but its sidecar has not written {since}. The model server goes on with "
            "its last α. Look at the logs of container hbm-sidecar.",
        )
    if said is not None and said.reason == Reason.SERVER_ABSENT:
        return Verdict(
            ConditionType.DEGRADED,
            TRUE,
            Reason.SERVER_STALE,
            f"The sidecar sees no live model server: {said.message or 'no control block'}",
        )
    if status.sidecar is not None and status.sidecar.protocol < names.PROTOCOL_VERSION:
        return Verdict(
            ConditionType.DEGRADED,
            TRUE,
            Reason.SIDECAR_OUTDATED,
            f"Sidecar {status.sidecar.version} speaks protocol {status.sidecar.protocol}, the "
            f"controller {names.PROTOCOL_VERSION}. It goes on working; recreate the pod to renew "
            "it.",
        )
    if _twin_is_stale(partition, now, stale_s):
        return Verdict(
            ConditionType.DEGRADED,
            TRUE,
            Reason.TWIN_STALE,
            "The sidecar has no estimate of the best α; α is held. Look at the twin in "
            "`hbm explain`.",
        )
    return Verdict(ConditionType.DEGRADED, FALSE, Reason.AS_EXPECTED, "")


def _twin_is_stale(partition: Partition, now: datetime, stale_s: float) -> bool:
    """It decides by the twin, has done so for a while, and the twin says nothing."""
    said, spec, status = applied(partition), partition.spec, partition.status
    if said is None or said.status != TRUE or spec is None or status.alpha is None:
        return False
    if spec.mode not in (PartitionMode.AUTO, PartitionMode.RECOMMEND) or status.anchor is not None:
        return False
    return now - said.last_transition_time > timedelta(seconds=stale_s)


def _ready(partition: Partition, selection: Selection, silent: bool) -> Verdict:
    said = applied(partition)
    if silent:
        return Verdict(
            ConditionType.READY, UNKNOWN, Reason.SIDECAR_SILENT, "The sidecar does not report."
        )
    if said is None:
        return Verdict(
            ConditionType.READY,
            FALSE,
            Reason.NOT_APPLIED,
            f"The sidecar has not looked at generation {partition.generation} yet.",
        )
    if said.status != TRUE:
        return Verdict(
            ConditionType.READY, FALSE, Reason.NOT_APPLIED, f"{said.reason}: {said.message}"
        )
    if selection.policy is None:
        return Verdict(
            ConditionType.READY, FALSE, Reason.NO_POLICY, "No policy governs the pod; α is held."
        )
    return Verdict(ConditionType.READY, TRUE, Reason.READY, "")


class Counts(NamedTuple):
    """What became of a policy."""

    selected: int = 0
    """Partitions made from it."""
    applied: int = 0
    failed: int = 0
    not_injected: int = 0
    overruled: int = 0
    """Pods that match but follow another policy."""


def outcome(partition: Partition, policy: HBMPolicy) -> ConditionStatus:
    """Whether one partition follows the policy: yes, no and it will not, or not yet."""
    spec, said = partition.spec, applied(partition)
    reference = spec.policy_ref if spec is not None else None
    if reference is None or reference.generation != policy.metadata.generation or said is None:
        return UNKNOWN
    if said.status == TRUE:
        return TRUE
    return FALSE if said.reason in REFUSALS else UNKNOWN


def policy_conditions(policy: HBMPolicy, counts: Counts, now: datetime) -> tuple[Condition, ...]:
    """Ready, Progressing and Degraded as they shall be."""
    generation = policy.metadata.generation
    waiting = counts.selected - counts.applied - counts.failed
    of = f"Pods that follow generation {generation}: {counts.applied} of {counts.selected}."
    if counts.overruled:
        of += (
            f" Pods that match but follow a policy that comes before this one: {counts.overruled}."
        )
    if counts.selected == 0:
        ready = Verdict("Ready", TRUE, "NoPods", "No injected pod follows this policy yet. " + of)
    elif counts.applied == counts.selected:
        ready = Verdict("Ready", TRUE, "AllApplied", of)
    else:
        ready = Verdict("Ready", FALSE, "NotAllApplied", of)
    progressing = (
        Verdict(
            "Progressing", TRUE, "RollingOut", f"Sidecars that have not answered yet: {waiting}."
        )
        if waiting
        else Verdict("Progressing", FALSE, "Settled", "")
    )
    return stamped(
        (ready, progressing, _policy_degraded(counts)), policy.status.conditions, generation, now
    )


def _policy_degraded(counts: Counts) -> Verdict:
    if counts.failed:
        return Verdict(
            "Degraded",
            TRUE,
            "SidecarsRefuse",
            f"Sidecars that cannot follow this spec: {counts.failed}. `kubectl describe hbmp` says "
            "why.",
        )
    if counts.not_injected:
        return Verdict(
            "Degraded",
            TRUE,
            "PodsNotInjected",
            f"Matching pods that ask for the sidecar but run without it: {counts.not_injected}. "
            "See the events of their owners, then recreate them.",
        )
    return Verdict("Degraded", FALSE, str(Reason.AS_EXPECTED), "")
