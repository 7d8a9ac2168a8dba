"""Injection as a real API server sees it: what it sends, what it accepts, what it makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hbm_e2e.api_server import ApiServer
from hbm_e2e.kubectl import CommandFailed, Kubectl
from hbm_e2e.waiting import wait_for
from hbm_operator import names

from tests.hbm_operator.mounted import mount_pair
from tests.hbm_operator.webhook.configuration import configuration
from tests.hbm_operator.webhook.running import new_pair

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(600)]

GOLDEN = Path(__file__).parents[1] / "injector" / "golden"
COMMAND = (sys.executable, "-c", "from hbm_operator.cli import app; app()", "webhook")
RESTRICTED: dict[str, Any] = {
    "securityContext": {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
}
SERVER: dict[str, Any] = {
    "name": "server",
    "image": "ranker:1",
    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    "resources": {
        "requests": {"cpu": "1", "memory": "1Gi"},
        "limits": {"memory": "1Gi", "nvidia.com/gpu": 1},
    },
}


def _template(**labels: str) -> dict[str, Any]:
    return {"metadata": {"labels": labels}, "spec": {**RESTRICTED, "containers": [SERVER]}}


@pytest.fixture
def webhook(api_server: ApiServer, namespace: str, tmp_path: Path) -> Iterator[Kubectl]:
    """kubectl in a namespace whose pods go through a webhook in a process of its own."""
    pair = new_pair()
    mount_pair(tmp_path / "tls", pair)
    ready = tmp_path / "ready.json"
    process = subprocess.Popen(
        [
            *COMMAND,
            "--host=127.0.0.1",
            "--port=0",
            "--admin-port=0",
            "--drain-s=0",
            f"--tls-dir={tmp_path / 'tls'}",
            f"--ready-file={ready}",
            "--sidecar-image=hbm-partition/sidecar:0.1.0",
        ]
    )
    kubectl = api_server.kubectl
    name = f"hbm-webhook-{namespace}"
    try:
        wait_for(lambda: ready.exists() and ready.read_text(), 60, "the webhook")
        address = f"https://127.0.0.1:{json.loads(ready.read_text())['port']}"
        kubectl.apply(configuration(name, address, [namespace], pair.authority))
        own = kubectl.within(namespace)
        _wait_until_called(own)
        yield own
    finally:
        kubectl("delete", "mutatingwebhookconfiguration", name, "--ignore-not-found")
        process.terminate()
        process.wait(60)


def _wait_until_called(kubectl: Kubectl) -> None:
    probe = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe", "labels": {names.INJECT_LABEL: "true"}},
        "spec": {"containers": [{"name": "c", "image": "c:1"}]},
    }

    def called() -> bool:
        text = kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", given=_text(probe))
        return names.INJECTED in json.loads(text)["metadata"]["labels"]

    wait_for(called, 60, "the API server to call the webhook")


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest)


def _pods(kubectl: Kubectl, label: str) -> list[dict[str, Any]]:
    return wait_for(lambda: kubectl.items("pods", "-l", label), 60, f"pods with {label}")


def _injected(pod: dict[str, Any]) -> bool:
    first = (pod["spec"].get("initContainers") or [{}])[0]
    return (
        first.get("name") == names.SIDECAR_CONTAINER
        and first.get("restartPolicy") == "Always"
        and pod["metadata"]["labels"].get(names.INJECTED) == "true"
    )


def _dry_run(kubectl: Kubectl, pod: dict[str, Any]) -> dict[str, Any]:
    text = kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", given=_text(pod))
    created: dict[str, Any] = json.loads(text)
    return created


def test_golden_pods_are_accepted_and_keep_their_qos_class(
    api_server: ApiServer, namespace: str
) -> None:
    """Without a webhook: the API server's own verdict on pods as the injector makes them.

    What Pod Security "restricted" lets in without the sidecar it lets in with it.
    """
    restricted = f"{namespace}-restricted"
    api_server.kubectl("create", "namespace", restricted)
    api_server.kubectl(
        "label", "namespace", restricted, "pod-security.kubernetes.io/enforce=restricted"
    )
    try:
        kubectls = [api_server.kubectl.within(one) for one in (namespace, restricted)]
        for kubectl in kubectls:
            kubectl.wait_for_service_account()
            kubectl("create", "serviceaccount", "ranker")
        seen, restricted_seen = set(), 0
        for folder in sorted(GOLDEN.iterdir()):
            expected = yaml.safe_load((folder / "expected.yaml").read_text())
            if expected["outcome"] != "injected":
                continue
            given = yaml.safe_load((folder / "pod.yaml").read_text())
            before = _dry_run(kubectls[0], given)
            after = _dry_run(kubectls[0], expected["pod"])
            assert after["status"]["qosClass"] == before["status"]["qosClass"], folder.name
            seen.add(after["status"]["qosClass"])
            try:
                _dry_run(kubectls[1], given)
            except CommandFailed:
                continue
            restricted_seen += 1
            _dry_run(kubectls[1], expected["pod"])
        assert seen == {"Guaranteed", "Burstable", "BestEffort"}
        assert restricted_seen >= 1
    finally:
        api_server.kubectl("delete", "namespace", restricted, "--wait=false")


def test_pods_of_all_workloads_are_injected(webhook: Kubectl) -> None:
    label = {names.INJECT_LABEL: "true"}
    webhook(
        "label", "namespace", _namespace(webhook), "pod-security.kubernetes.io/enforce=restricted"
    )
    webhook.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "d"},
            "spec": {
                "replicas": 2,
                "selector": {"matchLabels": {"app": "d"}},
                "template": _template(app="d", **label),
            },
        },
        {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": {"name": "s"},
            "spec": {
                "serviceName": "s",
                "selector": {"matchLabels": {"app": "s"}},
                "template": _template(app="s", **label),
            },
        },
        {
            "apiVersion": "batch/v1",
            "kind": "CronJob",
            "metadata": {"name": "c"},
            "spec": {
                "schedule": "0 0 1 1 *",
                "jobTemplate": {"spec": {"template": _job_template(app="c", **label)}},
            },
        },
    )
    webhook("create", "job", "c-now", "--from=cronjob/c")
    for app, count in (("d", 2), ("s", 1), ("c", 1)):
        pods = wait_for(
            lambda app=app, count=count: (  # type: ignore[misc]
                (found := _pods(webhook, f"app={app}")) and len(found) == count and found
            ),
            60,
            f"{count} pods of {app}",
        )
        for pod in pods:
            assert _injected(pod), pod["metadata"]
            assert pod["status"]["qosClass"] == "Burstable"
            stamp = json.loads(pod["metadata"]["annotations"][names.STATUS])
            assert stamp["container"] == "server"


def _job_template(**labels: str) -> dict[str, Any]:
    template = _template(**labels)
    return {**template, "spec": {**template["spec"], "restartPolicy": "Never"}}


def _namespace(kubectl: Kubectl) -> str:
    words = kubectl.command()
    return words[words.index("--namespace") + 1]


def test_namespace_asks_for_its_gpu_pods_and_a_pod_may_refuse(webhook: Kubectl) -> None:
    namespace = _namespace(webhook)

    def pod(name: str, spec: dict[str, Any], **labels: str) -> dict[str, Any]:
        metadata = {"name": name, "labels": labels}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}

    gpu = {"containers": [SERVER]}
    plain = {"containers": [{"name": "web", "image": "web:1"}]}
    assert not _injected(_dry_run(webhook, pod("gpu", gpu)))

    webhook("label", "namespace", namespace, f"{names.NAMESPACE_LABEL}=enabled")
    wait_for(lambda: _injected(_dry_run(webhook, pod("gpu", gpu))), 30, "the namespace's wish")
    assert not _injected(_dry_run(webhook, pod("web", plain)))
    assert not _injected(_dry_run(webhook, pod("no", gpu, **{names.INJECT_LABEL: "false"})))
    assert _injected(_dry_run(webhook, pod("yes", plain, **{names.INJECT_LABEL: "true"})))

    webhook("label", "namespace", namespace, "--overwrite", f"{names.NAMESPACE_LABEL}=disabled")
    wait_for(
        lambda: not _injected(_dry_run(webhook, pod("yes", gpu, **{names.INJECT_LABEL: "true"}))),
        30,
        "the namespace's refusal",
    )


def test_people_are_told_by_kubectl(webhook: Kubectl) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "p",
            "labels": {names.INJECT_LABEL: "true"},
            "annotations": {f"{names.GROUP}/sidecar-memroy": "1Gi"},
        },
        "spec": {"containers": [SERVER]},
    }
    done = subprocess.run(
        webhook.command("create", "--dry-run=server", "-f", "-"),
        input=_text(pod),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert f"Warning: annotation {names.GROUP}/sidecar-memroy is unknown" in done.stderr
    assert f"did you mean {names.MEMORY}?" in done.stderr

    pod["metadata"] = {
        "name": "p",
        "labels": {names.INJECT_LABEL: "true", names.INJECTED: "true"},
    }
    with pytest.raises(CommandFailed, match="only the webhook writes this"):
        _dry_run(webhook, pod)


def test_limit_ranges_and_quotas_let_injected_pods_in(webhook: Kubectl) -> None:
    """Defaults of a LimitRange are in before the injection; a quota on CPU limits asks for one."""
    webhook.apply(
        {
            "apiVersion": "v1",
            "kind": "LimitRange",
            "metadata": {"name": "defaults"},
            "spec": {
                "limits": [
                    {
                        "type": "Container",
                        "default": {"cpu": "500m", "memory": "512Mi"},
                        "defaultRequest": {"cpu": "250m", "memory": "256Mi"},
                        "min": {"cpu": "50m", "memory": "64Mi"},
                        "max": {"cpu": "4", "memory": "8Gi"},
                    }
                ]
            },
        }
    )
    bare = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "labels": {names.INJECT_LABEL: "true"}},
        "spec": {"containers": [{"name": "server", "image": "ranker:1"}]},
    }
    wait_for(
        lambda: _dry_run(webhook, bare)["spec"]["containers"][0].get("resources"),
        30,
        "the LimitRange",
    )
    pod = _dry_run(webhook, bare)
    assert _injected(pod)
    assert pod["status"]["qosClass"] == "Burstable"
    assert pod["spec"]["initContainers"][0]["resources"] == {
        "requests": {"cpu": "100m", "memory": "400Mi"},
        "limits": {"cpu": "500m", "memory": "400Mi"},
    }

    webhook("delete", "limitrange", "defaults")
    hard = {"requests.cpu": "4", "requests.memory": "8Gi", "limits.memory": "8Gi"}
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "q"},
        "spec": {"hard": hard},
    }
    webhook.apply(quota)
    sized: dict[str, Any] = json.loads(_text(bare))
    server = sized["spec"]["containers"][0]
    server["resources"] = {
        "requests": {"cpu": "1", "memory": "1Gi"},
        "limits": {"cpu": "2", "memory": "1Gi"},
    }
    assert _injected(_when_quota_is_counted(webhook, "requests.cpu", sized))

    hard["limits.cpu"] = "4"
    webhook.apply(quota)
    wait_for(
        lambda: "limits.cpu" in webhook.get("resourcequota", "q").get("status", {}).get("hard", {}),
        60,
        "the larger quota",
    )
    with pytest.raises(CommandFailed, match=r"must specify limits.cpu for: hbm-sidecar"):
        _dry_run(webhook, sized)
    sized["metadata"]["annotations"] = {names.CPU_LIMIT: "500m"}
    assert _injected(_dry_run(webhook, sized))


def _when_quota_is_counted(kubectl: Kubectl, key: str, pod: dict[str, Any]) -> dict[str, Any]:
    wait_for(
        lambda: key in kubectl.get("resourcequota", "q").get("status", {}).get("hard", {}),
        60,
        "the quota",
    )
    return _dry_run(kubectl, pod)
