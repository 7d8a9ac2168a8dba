"""The API server that other rooms test against."""

import json

import pytest
from hbm_e2e.api_server import ApiServer

pytestmark = pytest.mark.apiserver


def pod(name: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {"containers": [{"name": "main", "image": "example.invalid/image:1"}]},
    }


def test_serves_the_pinned_version(api_server: ApiServer) -> None:
    version = json.loads(api_server.kubectl("version", "-o", "json"))
    assert version["serverVersion"]["gitVersion"].startswith("v1.35.")
    assert version["clientVersion"]["gitVersion"] == version["serverVersion"]["gitVersion"]


def test_owned_objects_are_collected(api_server: ApiServer, namespace: str) -> None:
    kubectl = api_server.kubectl.within(namespace)
    kubectl.apply(pod("owner"))
    uid = kubectl.get("pod", "owner")["metadata"]["uid"]
    kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": "owned",
                "ownerReferences": [
                    {"apiVersion": "v1", "kind": "Pod", "name": "owner", "uid": uid}
                ],
            },
        }
    )
    kubectl("delete", "pod", "owner")
    kubectl.wait_gone("configmap", "owned")


def test_a_bound_token_names_its_pod(api_server: ApiServer, namespace: str) -> None:
    kubectl = api_server.kubectl.within(namespace)
    kubectl.apply(pod("holder"))
    uid = kubectl.get("pod", "holder")["metadata"]["uid"]
    token = api_server.token("default", namespace, pod=("holder", uid))
    review = json.loads(
        kubectl(
            *("create", "-o", "json", "-f", "-"),
            given=json.dumps(
                {
                    "apiVersion": "authentication.k8s.io/v1",
                    "kind": "TokenReview",
                    "spec": {"token": token},
                }
            ),
        )
    )
    user = review["status"]["user"]
    assert user["username"] == f"system:serviceaccount:{namespace}:default"
    assert user["extra"]["authentication.kubernetes.io/pod-uid"] == [uid]


def test_objects_outlive_an_outage(api_server: ApiServer, namespace: str) -> None:
    kubectl = api_server.kubectl.within(namespace)
    kubectl("create", "configmap", "kept", "--from-literal=a=b")
    api_server.kill_api()
    assert not kubectl.ready()
    api_server.restore_api()
    assert kubectl.get("configmap", "kept")["data"] == {"a": "b"}
