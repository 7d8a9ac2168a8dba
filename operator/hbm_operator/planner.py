"""Policies and a pod -> what its HBMPartition shall say. Pure; the same input, the same answer.

Of several policies that match a pod the one with the highest priority governs it, then the oldest,
then the first by name. Where none does, α is held where it is: the partition keeps what it said
last, in mode Hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from hbm_operator.models.partition import (
    HBMPartitionSpec,
    PartitionMode,
    PodReference,
    PolicyReference,
)
from hbm_operator.models.policy import GovernSpec, HBMPolicy
from hbm_operator.observed import Pod

_LAST = datetime.max.replace(tzinfo=UTC)


class Selection(NamedTuple):
    """Who governs a pod."""

    policy: HBMPolicy | None
    overruled: tuple[str, ...] = ()
    """Names of the policies that match too, the next in line first."""


def matches(policy: HBMPolicy, pod: Pod) -> bool:
    """Whether the policy is meant for the pod; one that is being deleted is for none."""
    if policy.metadata.namespace != pod.namespace or policy.metadata.deletion_timestamp:
        return False
    if policy.spec.container not in (None, pod.container):
        return False
    return policy.spec.selector.matches(dict(pod.labels))


def select(policies: Iterable[HBMPolicy], pod: Pod) -> Selection:
    """The policy that governs the pod, in whatever order they are given."""
    ranked = sorted((policy for policy in policies if matches(policy, pod)), key=_rank)
    if not ranked:
        return Selection(None)
    return Selection(ranked[0], tuple(policy.metadata.name for policy in ranked[1:]))


def _rank(policy: HBMPolicy) -> tuple[int, datetime, str]:
    metadata = policy.metadata
    return (-policy.spec.priority, metadata.creation_timestamp or _LAST, metadata.name)


def plan(
    policies: Iterable[HBMPolicy], pod: Pod, existing: HBMPartitionSpec | None
) -> tuple[HBMPartitionSpec, Selection]:
    """What the partition of the pod shall say, and why.

    Args:
        policies: of the pod's namespace.
        pod: an injected pod.
        existing: what the pod's partition says now; None where there is none.
    """
    selection = select(policies, pod)
    identity: dict[str, Any] = {
        "pod_ref": PodReference(name=pod.name, uid=pod.uid),
        "node_name": pod.node,
        "container": pod.container,
    }
    if selection.policy is None:
        return _held(existing, identity), selection
    metadata, spec = selection.policy.metadata, selection.policy.spec
    reference = PolicyReference(
        name=metadata.name, uid=metadata.uid, generation=metadata.generation
    )
    governed = {name: getattr(spec, name) for name in GovernSpec.model_fields if name != "mode"}
    wanted = HBMPartitionSpec(
        **governed, **identity, mode=PartitionMode(spec.mode.value), policy_ref=reference
    )
    return wanted, selection


def _held(existing: HBMPartitionSpec | None, identity: dict[str, Any]) -> HBMPartitionSpec:
    """α stays where it is, within the bounds that it was moved in."""
    kept = existing if existing is not None else HBMPartitionSpec(**identity)
    return kept.model_copy(update={**identity, "mode": PartitionMode.HOLD, "policy_ref": None})
