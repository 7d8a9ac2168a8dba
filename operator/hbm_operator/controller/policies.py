"""The status of one HBMPolicy: what became of it, written at most once a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

from hbm_kube.client import KubeClient
from hbm_kube.errors import Conflict, NotFound
from hbm_kube.resources import HBM_POLICIES

from hbm_operator import names
from hbm_operator.conditions import Counts, differing, outcome, policy_conditions
from hbm_operator.controller.queue import Key
from hbm_operator.controller.store import Store
from hbm_operator.models.base import ConditionStatus
from hbm_operator.models.policy import HBMPolicy
from hbm_operator.planner import matches

MIN_INTERVAL_S: Final = 1.0


def count(store: Store, policy: HBMPolicy) -> Counts:
    """What became of the policy, from what was seen of its namespace."""
    namespace = policy.metadata.namespace
    selected = applied = failed = overruled = 0
    partitions = store.partitions.within(namespace)
    for partition in partitions.values():
        reference = partition.spec.policy_ref if partition.spec is not None else None
        if reference is None or reference.uid != policy.metadata.uid:
            pod = store.pods.get(namespace, partition.name)
            overruled += reference is not None and pod is not None and matches(policy, pod)
            continue
        selected += 1
        match outcome(partition, policy):
            case ConditionStatus.TRUE:
                applied += 1
            case ConditionStatus.FALSE:
                failed += 1
            case _:
                pass
    # Their container is not known: nobody looked for it.
    by_labels = policy.model_copy(
        update={"spec": policy.spec.model_copy(update={"container": None})}
    )
    not_injected = sum(
        matches(by_labels, pod) for pod in store.uninjected.within(namespace).values()
    )
    return Counts(selected, applied, failed, not_injected, overruled)


class PolicyReconciler:
    """Looks at one key."""

    def __init__(self, kube: KubeClient, store: Store, *, now: Callable[[], datetime]) -> None:
        self._kube = kube
        self._store = store
        self._now = now
        self._looked: dict[Key, float] = {}

    async def reconcile(self, key: Key) -> float | None:
        """Returns after how many seconds to look again, or None."""
        policy = self._store.policies.get(key.namespace, key.name)
        if policy is None:
            self._looked.pop(key, None)
            return None
        since = time.monotonic() - self._looked.get(key, float("-inf"))
        if since < MIN_INTERVAL_S:
            return MIN_INTERVAL_S - since
        self._looked[key] = time.monotonic()
        counts = count(self._store, policy)
        conditions = policy_conditions(policy, counts, self._now())
        status: dict[str, Any] = {
            "observedGeneration": policy.metadata.generation,
            "selected": counts.selected,
            "applied": counts.applied,
            "failed": counts.failed,
            "notInjected": counts.not_injected,
        }
        if not differing(conditions, policy.status.conditions) and _counts(policy) == status:
            return None
        status["conditions"] = [condition.to_object() for condition in conditions]
        metadata = policy.metadata
        try:
            answer = await self._kube.apply(
                HBM_POLICIES,
                {
                    "metadata": {
                        "name": metadata.name,
                        "namespace": metadata.namespace,
                        "uid": metadata.uid,
                    },
                    "status": status,
                },
                field_manager=names.CONTROLLER_MANAGER,
                subresource="status",
            )
        except NotFound:
            return None  # deleted; the watch says so too
        except Conflict:
            # Deleted, or come back as another, which the watch is about to say.
            await self._look_again(metadata.namespace, metadata.name)
            raise
        self._store.policies.put(HBMPolicy.model_validate(answer))
        return None

    async def _look_again(self, namespace: str, name: str) -> None:
        known = self._store.policies.get(namespace, name)
        try:
            found = HBMPolicy.model_validate(await self._kube.get(HBM_POLICIES, name, namespace))
        except NotFound:
            if known is not None:
                self._store.policies.remove(known)
            return
        self._store.policies.put(found)


def _counts(policy: HBMPolicy) -> dict[str, Any]:
    status = policy.status
    return {
        "observedGeneration": status.observed_generation,
        "selected": status.selected,
        "applied": status.applied,
        "failed": status.failed,
        "notInjected": status.not_injected,
    }
