"""The chart in a real API server: what it takes, what it refuses, what stays.

No nodes: Deployments make pods, which the admission of Pod Security sees, and which stay pending.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hbm_e2e.api_server import PROGRAMS, ApiServer
from hbm_e2e.kubectl import CommandFailed, Helm, Kubectl
from hbm_e2e.toolchain import Toolchain
from hbm_e2e.waiting import wait_for

from tests.chart.rendered import CHART

pytestmark = [pytest.mark.helm, pytest.mark.apiserver]

NAMESPACES = ("hbm-system", "models", "feeds", "monitoring", "gpu-system")
# Definitions of the Prometheus Operator are not there.
VALUES = (
    *("--values", str(CHART / "ci" / "full-values.yaml")),
    *("--set", "monitoring.podMonitor.enabled=false,monitoring.rules.enabled=false"),
)
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A server of its own: definitions and admission policies are for the whole cluster."""
    missing = Toolchain().missing(PROGRAMS)
    if missing:
        pytest.skip(f"not built: {', '.join(missing)}")
    with ApiServer(tmp_path_factory.mktemp("k8s"), controllers=True) as running:
        running.kubectl.apply(
            *(
                {
                    "apiVersion": "v1",
                    "kind": "Namespace",
                    "metadata": {"name": name, "labels": RESTRICTED},
                }
                for name in NAMESPACES
            )
        )
        for name in NAMESPACES:
            running.kubectl.within(name).wait_for_service_account()
        yield running


@pytest.fixture(scope="module")
def helm_in(server: ApiServer, helm: Path, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(helm, server.kubeconfig, tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="module")
def installed(server: ApiServer, helm_in: Helm) -> ApiServer:
    helm_in("install", "hbm", str(CHART), "-n", "hbm-system", *VALUES)
    return server


def deployments(kubectl: Kubectl) -> list[dict[str, Any]]:
    return kubectl.items("deployments", "-A", "-l", "app.kubernetes.io/part-of=hbm-partition")


def test_every_pod_is_admitted_where_only_restricted_ones_are(installed: ApiServer) -> None:
    kubectl = installed.kubectl

    def made() -> bool:
        return all(
            each["status"].get("updatedReplicas") == each["spec"]["replicas"]
            for each in deployments(kubectl)
        )

    wait_for(made, 60, "the pods of all Deployments")
    assert len(deployments(kubectl)) == 5


def test_the_policy_of_statuses_has_no_type_errors(installed: ApiServer) -> None:
    def checked() -> dict[str, Any] | None:
        policy = installed.kubectl.get("validatingadmissionpolicy", "hbm-status-writer")
        found: dict[str, Any] | None = policy.get("status", {}).get("typeChecking")
        return {"checked": found} if found is not None else None

    assert wait_for(checked, 30, "the check of the policy's types") == {"checked": {}}


@pytest.fixture(scope="module")
def governed(installed: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The real controller with the pod's arguments and the rights of its own account, until it has
    done all that it does. Returns its metrics."""
    folder = tmp_path_factory.mktemp("controller")
    kubectl, feeds = installed.kubectl, installed.kubectl.within("feeds")
    kubeconfig = json.loads(installed.kubeconfig.read_text())
    token = installed.token("hbm-controller", "hbm-system")
    kubeconfig["users"][0]["user"] = {"token": token}
    (folder / "kubeconfig").write_text(json.dumps(kubeconfig))
    deployment = kubectl.within("hbm-system").get("deployment", "hbm-controller")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    arguments = [each for each in container["args"] if "--redis-address" not in each]
    here = {
        "--kubeconfig": folder / "kubeconfig",
        "--ready-file": folder / "ready",
        "--host": "127.0.0.1",
        "--admin-port": 0,
        "--redis-address": "127.0.0.1:1",  # Secrets are written though it does not answer
    }
    arguments += [f"{flag}={value}" for flag, value in here.items()]
    feeds.apply(_pod("injected", {"hbm-partition.io/injected": "true"}, node="nowhere"))
    feeds.apply(_policy("all", "Recommend"))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "hbm_cli.main", *arguments], stdout=log, stderr=log
        )
    try:

        def done() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            configuration = kubectl.get("mutatingwebhookconfiguration", "hbm-webhook")
            return (
                bool(feeds("get", "hbmpartition/injected", "--ignore-not-found", "-o", "name"))
                and bool(feeds("get", "secret/hbm-redis", "--ignore-not-found", "-o", "name"))
                and _condition(feeds.get("hbmpartition", "injected"), "Admitted") == "True"
                and feeds.get("hbmpolicy", "all").get("status", {}).get("selected") == 1
                and all("caBundle" in each["clientConfig"] for each in configuration["webhooks"])
                and bool(feeds.items("events", "--field-selector", "reason=Injected"))
            )

        wait_for(done, 90, "the controller to have done everything")
        port = json.loads((folder / "ready").read_text())["admin_port"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        process.terminate()
        process.wait(30)
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("hbm_operator_")
    }


def test_the_controller_has_all_the_rights_that_it_needs(
    installed: ApiServer, governed: dict[str, float]
) -> None:
    requests = {name: n for name, n in governed.items() if "api_requests_total" in name}
    assert requests
    assert not [name for name in requests if 'code="403"' in name]
    binding = installed.kubectl.within("feeds").get("rolebinding", "hbm-partition-sidecar")
    assert binding["roleRef"]["name"] == "hbm-sidecar"
    system = installed.kubectl.within("hbm-system")
    assert system.get("secret", "hbm-webhook-tls")["type"] == "kubernetes.io/tls"
    assert "users.acl" in system.get("secret", "hbm-redis-admin")["data"]


def test_a_second_upgrade_changes_nothing_and_leaves_what_others_wrote(
    installed: ApiServer, helm_in: Helm, governed: dict[str, float]
) -> None:
    kubectl = installed.kubectl

    def state() -> dict[str, Any]:
        configuration = kubectl.get("mutatingwebhookconfiguration", "hbm-webhook")
        secrets = kubectl.within("hbm-system").items("secrets")
        return {
            "generations": {
                each["metadata"]["name"]: each["metadata"]["generation"]
                for each in [*deployments(kubectl), *kubectl.items("crds")]
            },
            "bundles": [each["clientConfig"]["caBundle"] for each in configuration["webhooks"]],
            "secrets": {
                each["metadata"]["name"]: each["data"]
                for each in secrets
                if "helm" not in each["type"]
            },
        }

    before = state()
    assert before["secrets"].keys() == {"hbm-webhook-tls", "hbm-redis-admin"}
    helm_in("upgrade", "hbm", str(CHART), "-n", "hbm-system", *VALUES)
    assert state() == before


CONTROLLER = "system:serviceaccount:hbm-system:hbm-controller"


@pytest.mark.parametrize(
    ("allowed", "request_"),
    [
        (True, ("patch", "hbmpartitions/x", "--subresource=status", "-n", "feeds")),
        (True, ("get", "secrets/hbm-redis", "-n", "feeds")),
        (True, ("bind", "clusterroles/hbm-sidecar")),
        (False, ("get", "secrets/other", "-n", "feeds")),
        (False, ("list", "secrets", "-n", "hbm-system")),
        (False, ("bind", "clusterroles/cluster-admin")),
        (False, ("patch", "pods", "-n", "feeds")),
        (False, ("delete", "pods", "-n", "feeds")),
        (False, ("patch", "hbmpolicies/x", "-n", "feeds")),
        (False, ("patch", "mutatingwebhookconfigurations/other")),
    ],
)
def test_what_the_api_server_lets_the_controller_do(
    installed: ApiServer, allowed: bool, request_: tuple[str, ...]
) -> None:
    try:
        answer = installed.kubectl("auth", "can-i", *request_, "--as", CONTROLLER)
    except CommandFailed as refused:
        answer = refused.output
    assert answer.strip().startswith("yes") is allowed


def test_the_controller_can_bind_no_other_role(installed: ApiServer) -> None:
    kubectl = installed.kubectl.within("feeds")
    words = ("create", "rolebinding", "x", "--group=system:serviceaccounts:feeds", "--as")
    with pytest.raises(CommandFailed, match="forbidden"):
        kubectl(*words, CONTROLLER, "--clusterrole=cluster-admin")
    kubectl(*words, CONTROLLER, "--clusterrole=hbm-sidecar")


@pytest.fixture(scope="module")
def pods(installed: ApiServer) -> dict[str, str]:
    """Two pods of one service account, the partition of the first: their uids by name."""
    kubectl = installed.kubectl.within("models")
    for name in ("mine", "other"):
        kubectl.apply(_pod(name))
    uids = {name: kubectl.get("pod", name)["metadata"]["uid"] for name in ("mine", "other")}
    kubectl.apply(
        {
            "apiVersion": "hbm-partition.io/v1alpha1",
            "kind": "HBMPartition",
            "metadata": {"name": "mine"},
            "spec": {"podRef": {"name": "mine", "uid": uids["mine"]}},
        }
    )
    kubectl(
        *("create", "rolebinding", "hbm-partition-sidecar", "--clusterrole=hbm-sidecar"),
        *("--group=system:serviceaccounts:models", "--as", CONTROLLER),
    )
    return uids


def write_status(server: ApiServer, token: str, folder: Path, name: str = "mine") -> None:
    """Write a status as sidecars do, with nothing but this token."""
    nobody = folder / "kubeconfig"
    nobody.write_text("{apiVersion: v1, kind: Config}\n")
    status = {
        "apiVersion": "hbm-partition.io/v1alpha1",
        "kind": "HBMPartition",
        "metadata": {"name": name},
        "status": {"alpha": 0.5},
    }
    Kubectl(Toolchain().path("kubectl"), nobody, "models")(
        *("apply", "--server-side", "--subresource=status", "--field-manager=hbm-sidecar"),
        *("--validate=false", "-f", "-"),
        *("--server", server.url, "--certificate-authority", str(server.ca_certificate)),
        *("--token", token),
        given=json.dumps(status),
    )


def test_a_status_is_written_by_the_pod_itself(
    installed: ApiServer, pods: dict[str, str], tmp_path: Path
) -> None:
    token = installed.token("default", "models", pod=("mine", pods["mine"]))
    write_status(installed, token, tmp_path)
    partition = installed.kubectl.within("models").get("hbmpartition", "mine")
    assert partition["status"]["alpha"] == 0.5


def test_a_status_is_not_written_by_another_pod_of_the_account(
    installed: ApiServer, pods: dict[str, str], tmp_path: Path
) -> None:
    token = installed.token("default", "models", pod=("other", pods["other"]))
    with pytest.raises(CommandFailed, match=f"belongs to the pod with uid {pods['other']}"):
        write_status(installed, token, tmp_path)


def test_a_status_is_not_written_with_a_token_bound_to_no_pod(
    installed: ApiServer, pods: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(CommandFailed, match="names no pod"):
        write_status(installed, installed.token("default", "models"), tmp_path)


def test_a_status_is_not_written_by_a_predecessor_of_the_same_name(
    installed: ApiServer, pods: dict[str, str], tmp_path: Path
) -> None:
    kubectl = installed.kubectl.within("models")
    kubectl.apply(_pod("again"))
    first = kubectl.get("pod", "again")["metadata"]["uid"]
    token = installed.token("default", "models", pod=("again", first))
    kubectl("delete", "pod", "again", "--grace-period=0", "--force")
    kubectl.apply(_pod("again"))
    second = kubectl.get("pod", "again")["metadata"]["uid"]
    kubectl.apply(
        {
            "apiVersion": "hbm-partition.io/v1alpha1",
            "kind": "HBMPartition",
            "metadata": {"name": "again"},
            "spec": {"podRef": {"name": "again", "uid": second}},
        }
    )
    # The API server itself voids tokens of pods that are gone, after a moment in its cache:
    # refused by the one or by the other.
    with pytest.raises(CommandFailed, match=r"Unauthorized|logged in|belongs to the pod"):
        write_status(installed, token, tmp_path, "again")


def test_a_status_is_not_written_by_an_administrator(
    installed: ApiServer, pods: dict[str, str]
) -> None:
    with pytest.raises(CommandFailed, match="names no pod"):
        installed.kubectl.within("models")(
            *("patch", "hbmpartition", "mine", "--subresource=status", "--type=merge"),
            *("-p", '{"status": {"alpha": 0.1}}'),
        )


def test_definitions_and_policies_outlive_the_release_and_change_hands(
    installed: ApiServer, helm_in: Helm
) -> None:
    kubectl = installed.kubectl
    kubectl.within("models").apply(_policy("kept", "Recommend"))
    helm_in("uninstall", "hbm", "-n", "hbm-system", "--wait")
    assert not deployments(kubectl)
    assert kubectl.within("models").get("hbmpolicy", "kept")["spec"]["mode"] == "Recommend"
    install = ("install", "pools", str(CHART), "-n", "gpu-system", *VALUES)
    with pytest.raises(CommandFailed, match="ownership"):
        helm_in(*install)
    helm_in("uninstall", "pools", "-n", "gpu-system", "--ignore-not-found", "--wait")
    helm_in(*install, "--take-ownership")
    assert kubectl.within("models").get("hbmpolicy", "kept")
    assert {each["metadata"]["name"] for each in deployments(kubectl)} >= {
        "pools-hbm-controller",
        "pools-hbm-webhook",
    }


def _condition(item: dict[str, Any], type_: str) -> str:
    """Status of a condition; empty while it is not there."""
    conditions = item.get("status", {}).get("conditions", [])
    return next((str(each["status"]) for each in conditions if each["type"] == type_), "")


def _policy(name: str, mode: str) -> dict[str, Any]:
    return {
        "apiVersion": "hbm-partition.io/v1alpha1",
        "kind": "HBMPolicy",
        "metadata": {"name": name},
        "spec": {"mode": mode},
    }


def _pod(name: str, labels: dict[str, str] | None = None, node: str = "") -> dict[str, Any]:
    container = {
        "name": "server",
        "image": "none",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {
            **({"nodeName": node} if node else {}),
            "securityContext": {
                "runAsNonRoot": True,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
        },
    }
