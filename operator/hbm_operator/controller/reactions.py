"""Which keys follow from which change. The one place that says so, whoever brought the news:
a watch, a list, or the answer to a write of our own."""

from __future__ import annotations

from collections.abc import Hashable

from hbm_operator.controller.events import EventRecorder, EventType
from hbm_operator.controller.partitions import PartitionReconciler
from hbm_operator.controller.queue import Key, KeyQueue, Kind
from hbm_operator.controller.store import Store
from hbm_operator.controller.uninjected import MISSED
from hbm_operator.models.base import find_condition
from hbm_operator.models.partition import ConditionType, Reason
from hbm_operator.models.policy import HBMPolicy
from hbm_operator.observed import Partition, Pod
from hbm_operator.planner import matches


class Reactions:
    """Listens to the store's tables and names keys."""

    def __init__(
        self,
        store: Store,
        queue: KeyQueue,
        events: EventRecorder,
        partitions: PartitionReconciler,
    ) -> None:
        self._store = store
        self._queue = queue
        self._events = events
        self._partitions = partitions
        store.pods.on_change = self._pod
        store.partitions.on_change = self._partition
        store.policies.on_change = self._policy
        store.uninjected.on_change = self._uninjected

    def _pod(self, before: Pod | None, after: Pod | None) -> None:
        if before is not None and (after is None or after.uid != before.uid):
            self._partitions.forget_pod(before)
        if after is None:
            return  # its partition goes with it, and says so itself
        if before is None and len(self._store.pods.within(after.namespace)) == 1:
            self._queue.add(Key(Kind.NAMESPACE, after.namespace))
        # A pod's status changes often, and mostly in what is of no interest here.
        if before is None or before._replace(version=after.version) != after:
            self._queue.add(Key(Kind.PARTITION, after.namespace, after.name))

    def _partition(self, before: Partition | None, after: Partition | None) -> None:
        if before is not None and (after is None or after.uid != before.uid):
            self._partitions.forget(before)
        one = after or before
        assert one is not None
        if _what_matters(before) == _what_matters(after):
            return
        self._queue.add(Key(Kind.PARTITION, one.namespace, one.name))
        was, now = _governed_by(before), _governed_by(after)
        if was == now:
            changed = [now] if now is not None else []
        else:
            # It moved from one to another; those that match too count it as well.
            changed = list(self._store.policies.within(one.namespace))
        for name in changed:
            self._queue.add(Key(Kind.POLICY, one.namespace, name))

    def _policy(self, before: HBMPolicy | None, after: HBMPolicy | None) -> None:
        one = after or before
        assert one is not None
        metadata = one.metadata
        if before is not None and after is not None and _wish(before) == _wish(after):
            return  # its status, written by ourselves
        if after is not None:
            self._queue.add(Key(Kind.POLICY, metadata.namespace, metadata.name))
        for name, pod in self._store.pods.within(metadata.namespace).items():
            if any(version is not None and matches(version, pod) for version in (before, after)):
                self._queue.add(Key(Kind.PARTITION, metadata.namespace, name))
        if _claim(before) != _claim(after):
            # Others may have won or lost pods.
            for name in self._store.policies.within(metadata.namespace):
                self._queue.add(Key(Kind.POLICY, metadata.namespace, name), 1.0)

    def _uninjected(self, before: Pod | None, after: Pod | None) -> None:
        pod = after or before
        assert pod is not None
        if before is None:
            self._tell(pod)
        if before is None or after is None:
            for policy in self._store.policies.within(pod.namespace).values():
                if matches(policy, pod._replace(container=policy.spec.container or "")):
                    self._queue.add(Key(Kind.POLICY, pod.namespace, policy.metadata.name))

    def _tell(self, pod: Pod) -> None:
        reason = pod.skip_reason or MISSED
        why = (
            f"the webhook left it alone ({reason})"
            if pod.skip_reason
            else "the webhook was not asked or did not answer; recreate the pod"
        )
        about = pod.owner or pod.reference
        which = f"A pod of this {about.kind}" if pod.owner else "This pod"
        self._events.record(
            about,
            "InjectionSkipped",
            f"{which} asks for the sidecar but runs without it: {why}.",
            EventType.WARNING,
        )


def _governed_by(partition: Partition | None) -> str | None:
    reference = partition.spec.policy_ref if partition and partition.spec else None
    return reference.name if reference is not None else None


def _what_matters(partition: Partition | None) -> Hashable:
    """What a decision depends on; measured values are none of it."""
    if partition is None:
        return None
    status = partition.status
    degraded = find_condition(status.conditions, ConditionType.DEGRADED)
    silent = degraded is not None and degraded.reason == Reason.SIDECAR_SILENT
    return (
        partition.uid,
        partition.generation,
        status.conditions,
        status.sidecar.protocol if status.sidecar else None,
        status.last_report_time if silent else None,
    )


def _claim(policy: HBMPolicy | None) -> object:
    """Which pods it is meant for, and against which others."""
    if policy is None or policy.metadata.deletion_timestamp is not None:
        return None
    spec = policy.spec
    return policy.metadata.uid, spec.selector, spec.container, spec.priority


def _wish(policy: HBMPolicy) -> Hashable:
    metadata = policy.metadata
    return (metadata.uid, metadata.generation, metadata.deletion_timestamp is not None)
