"""What a namespace with injected pods needs: its sidecars' rights, and its Redis user."""

from __future__ import annotations

from typing import Any

from hbm_kube.client import KubeClient
from hbm_kube.errors import Conflict, Forbidden, NotFound
from hbm_kube.resources import ROLE_BINDINGS

from hbm_operator import names
from hbm_operator.controller.queue import Key
from hbm_operator.controller.redis_tenants import RedisTenants
from hbm_operator.controller.store import Store


class NamespaceReconciler:
    """Looks at one key. Nothing is taken away again while the namespace lives: pods come back."""

    def __init__(
        self,
        kube: KubeClient,
        store: Store,
        redis: RedisTenants,
        *,
        sidecar_cluster_role: str,
        route_namespaces: tuple[str, ...],
    ) -> None:
        self._kube = kube
        self._store = store
        self._redis = redis
        self._role = sidecar_cluster_role
        self._routed = frozenset(route_namespaces)

    def wanted(self) -> set[str]:
        """Namespaces that need something."""
        return set(self._store.pods.namespaces()) | self._routed

    async def reconcile(self, key: Key) -> float | None:
        """Returns None; raises what is to be tried again."""
        namespace = key.namespace
        if self._store.terminating(namespace):
            return None
        try:
            if self._store.pods.within(namespace):
                await self._bind(namespace)
            if namespace in self.wanted():
                await self._redis.ensure(namespace)
        except NotFound:
            if namespace in self._routed:
                raise  # a route may be written before its namespace
            return None  # the namespace is gone
        except Forbidden as error:
            if "being terminated" in str(error):
                return None
            raise
        return None

    async def _bind(self, namespace: str) -> None:
        wanted = self._binding(namespace)
        try:
            found = await self._kube.get(ROLE_BINDINGS, names.SIDECAR_ROLE_BINDING, namespace)
        except NotFound:
            found = None
        if found is not None and found.get("roleRef") != wanted["roleRef"]:
            # A role reference never changes; this one is of an earlier installation.
            try:
                await self._kube.delete(
                    ROLE_BINDINGS,
                    names.SIDECAR_ROLE_BINDING,
                    namespace,
                    uid=found["metadata"]["uid"],
                )
            except (NotFound, Conflict):
                pass
            found = None
        if found is None or found.get("subjects") != wanted["subjects"]:
            await self._kube.apply(ROLE_BINDINGS, wanted, field_manager=names.CONTROLLER_MANAGER)

    def _binding(self, namespace: str) -> dict[str, Any]:
        group = "rbac.authorization.k8s.io"
        return {
            "metadata": {
                "name": names.SIDECAR_ROLE_BINDING,
                "namespace": namespace,
                "labels": dict(names.COMPONENT_LABELS),
            },
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": self._role},
            "subjects": [
                {
                    "apiGroup": group,
                    "kind": "Group",
                    "name": f"system:serviceaccounts:{namespace}",
                }
            ],
        }
