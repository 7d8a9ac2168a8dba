"""A pod as the sidecar's tests need it: objects at a real API server, a sidecar, a server."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from hbm_e2e.api_server import ApiServer
from hbm_e2e.errors import ToolMissing
from hbm_e2e.kubectl import run
from hbm_e2e.toolchain import Toolchain
from hbm_operator import names

from tests.hbm_sidecar.conftest import ModelServer, Sidecar, wait_until
from tests.kube_faults import FaultProxy
from tests.residual_model import residual_model

CHART = Path(__file__).parents[2] / "charts" / "hbm-partition"
POD = "web-0"
CONTENT = residual_model()


def pod(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {"containers": [{"name": "main", "image": "none"}], "nodeName": "nowhere"},
    }


class World:
    """A namespace with one pod, rights as the chart and the controller give them, and a proxy."""

    def __init__(self, server: ApiServer, proxy: FaultProxy, folder: Path) -> None:
        self.server = server
        self.proxy = proxy
        self.folder = folder
        self.namespace = f"test-{uuid.uuid4().hex[:10]}"
        server.kubectl("create", "namespace", self.namespace)
        server.kubectl.within(self.namespace).wait_for_service_account()
        self.kubectl = server.kubectl.within(self.namespace)
        self._cluster_wide = self._rights()
        self.kubectl.apply(pod(POD))
        self.pod_uid: str = self.kubectl.get("pod", POD)["metadata"]["uid"]
        self.policies = folder / "policies"
        self.policies.mkdir()
        self.token_dir = proxy.token_dir(
            folder / "token",
            server.token("default", self.namespace, pod=(POD, self.pod_uid)),
            self.namespace,
        )

    def _rights(self) -> list[dict[str, Any]]:
        """Role and admission policy out of the chart, for this namespace alone."""
        try:
            helm = Toolchain().path("helm")
        except ToolMissing as missing:
            pytest.skip(str(missing))
        text = run(
            [
                *(str(helm), "template", self.namespace, str(CHART), "--namespace", "hbm-system"),
                *("--show-only", "templates/sidecar-rbac.yaml"),
            ]
        )
        objects = [each for each in yaml.safe_load_all(text) if each]
        (role,) = [each for each in objects if each["kind"] == "ClusterRole"]
        (binding,) = [
            each for each in objects if each["kind"] == "ValidatingAdmissionPolicyBinding"
        ]
        fullname = role["metadata"]["name"].removesuffix("-sidecar")
        self.controller = f"system:serviceaccount:hbm-system:{fullname}-controller"
        here = {"matchLabels": {"kubernetes.io/metadata.name": self.namespace}}
        binding["spec"]["matchResources"] = {"namespaceSelector": here}
        self.server.kubectl.apply(*objects)
        self.kubectl.apply(
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "RoleBinding",
                "metadata": {"name": names.SIDECAR_ROLE_BINDING},
                "roleRef": {
                    "apiGroup": "rbac.authorization.k8s.io",
                    "kind": "ClusterRole",
                    "name": role["metadata"]["name"],
                },
                "subjects": [
                    {
                        "apiGroup": "rbac.authorization.k8s.io",
                        "kind": "Group",
                        "name": f"system:serviceaccounts:{self.namespace}",
                    }
                ],
            }
        )
        return objects

    def close(self) -> None:
        for each in self._cluster_wide:
            self.server.kubectl("delete", each["kind"], each["metadata"]["name"])
        self.kubectl("delete", "pods", "--all", "--grace-period=0", "--force")
        self.server.kubectl("delete", "namespace", self.namespace, "--wait=false")

    def flags(self) -> list[str]:
        """As the webhook sets them, by environment there."""
        return [
            *("--kube-token-dir", str(self.token_dir), "--namespace", self.namespace),
            *("--pod-name", POD, "--pod-uid", self.pod_uid, "--node", self.pod_uid),
            *("--policies-dir", str(self.policies), "--heartbeat-ms", "100"),
        ]

    # -- the partition, as the controller writes it ---------------------------------------------

    def ask(self, *, uid: str | None = None, **spec: Any) -> int:
        """Create or change the partition; its generation."""
        body = {
            "apiVersion": names.API_VERSION,
            "kind": "HBMPartition",
            "metadata": {"name": POD},
            "spec": {"podRef": {"name": POD, "uid": uid or self.pod_uid}} | spec,
        }
        self.kubectl.apply(body, server_side=True)
        generation: int = self.kubectl.get("hbmp", POD)["metadata"]["generation"]
        return generation

    def fixed(self, alpha: float, **more: Any) -> int:
        return self.ask(mode="Fixed", alpha={"fixed": alpha, "min": 0.1, "max": 0.9}, **more)

    def status(self) -> dict[str, Any]:
        return self.kubectl.get("hbmp", POD).get("status", {})

    def applied(self) -> dict[str, Any]:
        conditions = self.status().get("conditions", [])
        return next((each for each in conditions if each["type"] == "Applied"), {})

    def until_applied(self, generation: int) -> dict[str, Any]:
        def done() -> dict[str, Any]:
            found = self.applied()
            now = found.get("observedGeneration") == generation and found["status"] == "True"
            return found if now else {}

        return wait_until(done, f"generation {generation} to be applied: {self.applied()}")

    def until_refused(self, reason: str) -> dict[str, Any]:
        def done() -> dict[str, Any]:
            found = self.applied()
            return found if found.get("reason") == reason else {}

        return wait_until(done, f"{reason}: {self.applied()}")


class Running(World):
    """With a sidecar and a model server that obeys it."""

    sidecar: Sidecar
    model_server: ModelServer

    def alpha(self) -> float:
        return float(self.model_server.tell()["alpha"])

    def until_alpha(self, alpha: float) -> None:
        wait_until(lambda: abs(self.alpha() - alpha) < 0.003, f"α {alpha}; it is {self.alpha()}")
