"""One pod and its HBMPartition: made, renewed, changed, judged. Level-based: looks at both as they
are and writes the difference."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

from hbm_kube.client import KubeClient
from hbm_kube.errors import Conflict, Forbidden, Invalid, KubeError, NotFound
from hbm_kube.resources import HBM_PARTITIONS, PODS

from hbm_operator import names
from hbm_operator.conditions import REFUSALS, applied, differing, partition_conditions
from hbm_operator.controller.events import EventRecorder, EventType
from hbm_operator.controller.queue import Key
from hbm_operator.controller.store import Store
from hbm_operator.models.base import Condition, ConditionStatus, find_condition
from hbm_operator.models.partition import ConditionType, HBMPartitionSpec, Reason
from hbm_operator.observed import Partition, Pod
from hbm_operator.planner import Selection, plan

SETTLE_S: Final = 3.0
"""How long a sidecar has to answer a new spec before "not yet" is worth a write: nearly all do, and
then their answer and ours are written once."""


class PartitionReconciler:
    """Looks at one key. Raises `KubeError` for what is to be tried again."""

    def __init__(
        self,
        kube: KubeClient,
        store: Store,
        events: EventRecorder,
        *,
        stale_s: float,
        now: Callable[[], datetime],
    ) -> None:
        self._kube = kube
        self._store = store
        self._events = events
        self._stale_s = stale_s
        self._now = now
        self._written: dict[str, float] = {}
        """Partition uid -> when its spec was last written, while an answer may be on its way."""
        self._made_for: dict[str, str] = {}
        """Pod uid -> uid of the partition that was made for it."""

    async def reconcile(self, key: Key) -> float | None:
        """Returns after how many seconds to look again, or None."""
        pod = self._store.pods.get(key.namespace, key.name)
        partition = self._store.partitions.get(key.namespace, key.name)
        if pod is None:
            return None  # the partition goes with its owner
        if partition is not None and partition.pod_uid != pod.uid:
            await self._delete(partition)
            partition = None
        if pod.finished:
            if partition is not None:
                await self._delete(partition)
            return None
        if not pod.node or pod.terminating or self._store.terminating(key.namespace):
            return None
        spec, selection = plan(
            self._store.policies.within(key.namespace).values(),
            pod,
            partition.spec if partition is not None else None,
        )
        if partition is None:
            return await self._make(pod, spec, selection)
        if partition.spec != spec:
            return await self._change(partition, pod, spec, selection)
        return await self._judge(partition, pod, selection)

    def forget(self, partition: Partition) -> None:
        """It is gone."""
        self._written.pop(partition.uid, None)

    def forget_pod(self, pod: Pod) -> None:
        """It is gone."""
        self._made_for.pop(pod.uid, None)

    # -- writes ----------------------------------------------------------------------------------

    async def _make(self, pod: Pod, spec: HBMPartitionSpec, selection: Selection) -> float | None:
        if pod.uid in self._made_for and not await self._lives(pod):
            return None
        body = _body(pod, spec)
        try:
            made = await self._apply(body)
        except Forbidden as error:
            if "being terminated" in str(error):
                return None
            raise
        except (Conflict, Invalid):
            await self._look_again(pod.namespace, pod.name)
            raise
        self._made_for[pod.uid] = made.uid
        self._events.record(
            pod.reference,
            "Injected",
            f"The sidecar is in this pod; HBMPartition {pod.name} says how it is governed.",
        )
        self._tell_policy(made, selection)
        return SETTLE_S

    async def _change(
        self, partition: Partition, pod: Pod, spec: HBMPartitionSpec, selection: Selection
    ) -> float:
        body = _body(pod, spec)
        # With the uid an object that has gone, or come back as another, is left alone.
        body["metadata"]["uid"] = partition.uid
        try:
            changed = await self._apply(body)
        except (Conflict, Invalid, NotFound):
            await self._look_again(partition.namespace, partition.name)
            raise
        before = partition.spec.policy_ref if partition.spec is not None else None
        if (before.uid if before else None) != (spec.policy_ref.uid if spec.policy_ref else None):
            self._tell_policy(changed, selection)
        return SETTLE_S

    async def _judge(self, partition: Partition, pod: Pod, selection: Selection) -> float | None:
        """Write the conditions if they differ."""
        wanted = self._conditions(partition, pod, selection)
        if _says_silent(wanted) and not _says_silent(partition.status.conditions):
            # Perhaps it is the watch that is silent: an API server under load lags behind, and to
            # write of everybody's silence would be more of it. The object itself knows.
            await self._look_again(partition.namespace, partition.name)
            looked = self._store.partitions.get(partition.namespace, partition.name)
            if looked is None or (looked.uid, looked.spec) != (partition.uid, partition.spec):
                return 0.0
            partition = looked
            wanted = self._conditions(partition, pod, selection)
        found = partition.status.conditions
        if applied(partition) is not None:
            self._written.pop(partition.uid, None)
        if not differing(wanted, found):
            return None
        since = time.monotonic() - self._written.get(partition.uid, float("-inf"))
        if since < SETTLE_S:
            return SETTLE_S - since
        self._written.pop(partition.uid, None)
        body: dict[str, Any] = {
            "metadata": {
                "name": partition.name,
                "namespace": partition.namespace,
                "uid": partition.uid,
            },
            "status": {"conditions": [condition.to_object() for condition in wanted]},
        }
        try:
            answer = await self._kube.apply(
                HBM_PARTITIONS,
                body,
                field_manager=names.CONTROLLER_MANAGER,
                subresource="status",
            )
        except (Conflict, NotFound):
            await self._look_again(partition.namespace, partition.name)
            raise
        self._store.partitions.put(Partition.of(answer))
        self._tell_changes(partition, wanted)
        return None

    def _conditions(
        self, partition: Partition, pod: Pod, selection: Selection
    ) -> tuple[Condition, ...]:
        return partition_conditions(
            partition, pod, selection, now=self._now(), stale_s=self._stale_s
        )

    async def _apply(self, body: dict[str, Any]) -> Partition:
        answer = await self._kube.apply(
            HBM_PARTITIONS, body, field_manager=names.CONTROLLER_MANAGER
        )
        partition = Partition.of(answer)
        self._store.partitions.put(partition)
        self._written[partition.uid] = time.monotonic()
        return partition

    async def _delete(self, partition: Partition) -> None:
        try:
            await self._kube.delete(
                HBM_PARTITIONS, partition.name, partition.namespace, uid=partition.uid
            )
        except (NotFound, Conflict):
            pass  # gone already, or another one has its name
        self._store.partitions.remove(partition)
        self.forget(partition)

    # -- second looks ----------------------------------------------------------------------------

    async def _lives(self, pod: Pod) -> bool:
        """Its partition was deleted though the pod is known to us. If in truth it has gone, a new
        partition would be collected at once, again and again."""
        try:
            found = Pod.of(await self._kube.get(PODS, pod.name, pod.namespace))
        except NotFound:
            found = None
        if found is not None and found.uid == pod.uid:
            return True
        self._store.pods.remove(pod)
        if found is not None and found.injected:
            self._store.pods.put(found)
        self.forget_pod(pod)
        return False

    async def _look_again(self, namespace: str, name: str) -> None:
        """The partition is not what it was thought to be."""
        known = self._store.partitions.get(namespace, name)
        try:
            self._store.partitions.put(
                Partition.of(await self._kube.get(HBM_PARTITIONS, name, namespace))
            )
        except NotFound:
            if known is not None:
                self._store.partitions.remove(known)
        except KubeError:
            pass  # the resync will find it

    # -- events ----------------------------------------------------------------------------------

    def _tell_policy(self, partition: Partition, selection: Selection) -> None:
        policy = selection.policy
        if policy is None:
            self._events.record(
                partition.reference,
                Reason.NO_POLICY,
                "No HBMPolicy selects this pod; α is held where it is.",
            )
        else:
            self._events.record(
                partition.reference,
                Reason.POLICY_SELECTED,
                f"HBMPolicy {policy.metadata.name} governs this pod.",
            )

    def _tell_changes(self, partition: Partition, wanted: tuple[Condition, ...]) -> None:
        before = partition.status.conditions
        degraded = find_condition(wanted, ConditionType.DEGRADED)
        was = find_condition(before, ConditionType.DEGRADED)
        if degraded is not None and (was is None or was.reason != degraded.reason):
            if degraded.status == ConditionStatus.TRUE:
                self._events.record(
                    partition.reference, degraded.reason, degraded.message, EventType.WARNING
                )
            elif was is not None:
                self._events.record(partition.reference, degraded.reason, f"{was.reason} is over.")
        said = applied(partition)
        if said is not None and said.reason in REFUSALS:
            self._events.record(partition.reference, said.reason, said.message, EventType.WARNING)


def _says_silent(conditions: tuple[Condition, ...]) -> bool:
    degraded = find_condition(conditions, ConditionType.DEGRADED)
    return degraded is not None and degraded.reason == Reason.SIDECAR_SILENT


def _body(pod: Pod, spec: HBMPartitionSpec) -> dict[str, Any]:
    """All that the controller owns of a partition but its conditions: what an apply leaves out is
    taken away."""
    owner = {
        "apiVersion": "v1",
        "kind": "Pod",
        "name": pod.name,
        "uid": pod.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }
    return {
        "metadata": {
            "name": pod.name,
            "namespace": pod.namespace,
            "labels": dict(names.COMPONENT_LABELS),
            "ownerReferences": [owner],
        },
        "spec": spec.to_object(),
    }
