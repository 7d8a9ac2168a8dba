"""The definitions as files, and as the API server enforces them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hbm_e2e.api_server import ApiServer
from hbm_e2e.kubectl import CommandFailed
from hbm_operator import names
from hbm_operator.models.crd import definitions, to_yaml
from hbm_operator.models.partition import HBMPartition
from hbm_operator.models.policy import HBMPolicy, HBMPolicySpec

CRDS = Path(__file__).parents[3] / "crds"


def test_the_committed_files_are_what_the_models_say() -> None:
    made = {name: to_yaml(definition) for name, definition in definitions().items()}
    found = {path.name: path.read_text(encoding="utf-8") for path in CRDS.glob("*.yaml")}
    assert found == made, "write them anew: hbm operator crds --out crds"


def fields(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in schema.get("properties", {}).items():
        yield f"{path}.{name}", field
        yield from fields(field, f"{path}.{name}")
    for inside in ("items", "additionalProperties"):
        if isinstance(schema.get(inside), dict):
            yield f"{path}[]", schema[inside]
            yield from fields(schema[inside], f"{path}[]")


ALL_FIELDS = [
    pytest.param(field, id=f"{name.split('_')[1].split('.')[0]}{path}")
    for name, definition in definitions().items()
    for path, field in fields(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    if path not in (".metadata", ".apiVersion", ".kind")
]


@pytest.mark.parametrize("field", ALL_FIELDS)
def test_every_field_is_bounded(field: dict[str, Any]) -> None:
    match field.get("type"):
        case "string":
            assert "maxLength" in field or "enum" in field
        case "array":
            assert "maxItems" in field
            assert "x-kubernetes-list-type" in field
        case "object":
            assert "properties" in field or "maxProperties" in field


@pytest.mark.parametrize("definition", definitions().values(), ids=definitions().keys())
def test_every_field_is_described(definition: dict[str, Any]) -> None:
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    bare = [
        path
        for path, field in fields(schema)
        if not path.endswith("[]") and path != ".metadata" and not field.get("description")
    ]
    assert bare == []


def policy(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": names.API_VERSION,
        "kind": "HBMPolicy",
        "metadata": {"name": "p"},
        "spec": spec,
    }


def partition(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": names.API_VERSION,
        "kind": "HBMPartition",
        "metadata": {"name": "pod-0"},
        "spec": {"podRef": {"name": "pod-0", "uid": "u-1"}, **spec},
    }


HASH = "0" * 64
INVALID_POLICIES = {
    "bounds-out-of-order": (
        {"alpha": {"min": 0.8, "max": 0.2}},
        "alpha.min (0.1 unless given) must not be above",
    ),
    "min-above-the-default-max": (
        {"alpha": {"min": 0.95}},
        "(0.9 unless given)",
    ),
    "alpha-above-one": ({"alpha": {"max": 1.5}}, "less than or equal to 1"),
    "alpha-below-zero": ({"alpha": {"min": -0.1}}, "greater than or equal to 0"),
    "fixed-out-of-bounds": (
        {"mode": "Fixed", "alpha": {"fixed": 0.95}},
        "alpha.fixed must lie between",
    ),
    "initial-out-of-bounds": ({"alpha": {"initial": 0.05}}, "alpha.initial must lie between"),
    "fixed-without-a-value": ({"mode": "Fixed"}, "mode Fixed needs alpha.fixed"),
    "unknown-mode": ({"mode": "Hold"}, 'supported values: "Auto", "Recommend", "Fixed"'),
    "unknown-field": ({"alhpa": {"min": 0.2}}, 'unknown field "spec.alhpa"'),
    "latency-of-zero": ({"slo": {"latencyMs": 0}}, "greater than 0"),
    "slo-without-latency": ({"slo": {}}, "latencyMs: Required value"),
    "budget-is-no-quantity": (
        {"refill": {"maxBytesPerSecond": "fast"}},
        "should match",
    ),
    "budget-below-zero": ({"refill": {"maxBytesPerSecond": -1}}, "must not be negative"),
    "tick-too-short": ({"tickMilliseconds": 5}, "greater than or equal to 20"),
    "fraction-of-zero": ({"moves": {"fraction": 0}}, "greater than 0"),
    "artefact-without-hash": ({"artefact": {"key": "a.onnx"}}, "sha256: Required value"),
    "artefact-hash-too-short": ({"artefact": {"key": "a.onnx", "sha256": "ab"}}, "sha256"),
    "artefact-key-is-a-path": ({"artefact": {"key": "../a", "sha256": HASH}}, "artefact.key"),
    "priority-too-high": ({"priority": 1001}, "less than or equal to 1000"),
    "in-without-values": (
        {"selector": {"matchExpressions": [{"key": "app", "operator": "In"}]}},
        "In and NotIn need at least one value",
    ),
    "exists-with-values": (
        {"selector": {"matchExpressions": [{"key": "app", "operator": "Exists", "values": ["a"]}]}},
        "Exists and DoesNotExist take none",
    ),
    "unknown-operator": (
        {"selector": {"matchExpressions": [{"key": "app", "operator": "Like", "values": ["a"]}]}},
        "supported values",
    ),
    "too-many-expressions": (
        {"selector": {"matchExpressions": [{"key": "app", "operator": "Exists"}] * 17}},
        "must have at most 16 items",
    ),
}


def refusal(server: ApiServer, namespace: str, plural: str, body: dict[str, Any]) -> str:
    """What the server itself says; kubectl would refuse some of these before it is asked."""
    path = f"/apis/{names.API_VERSION}/namespaces/{namespace}/{plural}?fieldValidation=Strict"
    with pytest.raises(CommandFailed) as refused:
        server.kubectl("create", "--raw", path, "-f", "-", given=json.dumps(body))
    return refused.value.output


@pytest.mark.apiserver
@pytest.mark.parametrize(("spec", "why"), INVALID_POLICIES.values(), ids=INVALID_POLICIES.keys())
def test_the_api_server_refuses_an_invalid_policy(
    crds: ApiServer, namespace: str, spec: dict[str, Any], why: str
) -> None:
    assert why.lower() in refusal(crds, namespace, "hbmpolicies", policy(**spec)).lower()


@pytest.mark.apiserver
def test_an_empty_policy_gets_all_defaults_and_reads_as_the_model(
    crds: ApiServer, namespace: str
) -> None:
    kubectl = crds.kubectl.within(namespace)
    bare = policy()
    del bare["spec"]
    kubectl.apply(bare)
    stored = kubectl.get("hbmpol", "p")
    assert HBMPolicy.model_validate(stored).spec == HBMPolicySpec()
    # What the API stores is the whole of what the model writes: nothing is filled in elsewhere.
    assert stored["spec"].keys() == HBMPolicySpec().to_object().keys() - {"selector"}


@pytest.mark.apiserver
def test_a_refill_budget_may_be_a_number(crds: ApiServer, namespace: str) -> None:
    kubectl = crds.kubectl.within(namespace)
    kubectl.apply(policy(refill={"maxBytesPerSecond": 0}))
    read = HBMPolicy.model_validate(kubectl.get("hbmpol", "p"))
    assert read.spec.refill.max_bytes_per_second == "0"


@pytest.mark.apiserver
@pytest.mark.parametrize(
    ("spec", "why"),
    [
        pytest.param({"podRef": {"name": "pod-0"}}, "podRef.uid: Required value", id="no-uid"),
        pytest.param({"mode": "Fixed"}, "mode Fixed needs alpha.fixed", id="fixed"),
        pytest.param({"policyRef": {"name": "p"}}, "policyRef.uid: Required", id="policy-ref"),
    ],
)
def test_the_api_server_refuses_an_invalid_partition(
    crds: ApiServer, namespace: str, spec: dict[str, Any], why: str
) -> None:
    assert why.lower() in refusal(crds, namespace, "hbmpartitions", partition(**spec)).lower()


@pytest.mark.apiserver
def test_the_pod_of_a_partition_never_changes(crds: ApiServer, namespace: str) -> None:
    kubectl = crds.kubectl.within(namespace)
    kubectl.apply(partition())
    with pytest.raises(CommandFailed, match="podRef is immutable"):
        kubectl.apply(partition(podRef={"name": "pod-0", "uid": "u-2"}))
    kubectl.apply(partition(mode="Auto"))  # the rest may change


def condition(type_: str, status: str) -> dict[str, Any]:
    return {
        "type": type_,
        "status": status,
        "reason": type_,
        "message": "",
        "observedGeneration": 1,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }


@pytest.mark.apiserver
def test_sidecar_and_controller_write_one_status_side_by_side(
    crds: ApiServer, namespace: str
) -> None:
    kubectl = crds.kubectl.within(namespace)
    kubectl.apply(partition())

    def write(manager: str, status: dict[str, Any]) -> None:
        body = {**partition(), "status": status}
        del body["spec"]
        kubectl(
            "apply",
            "--server-side",
            "--subresource=status",
            f"--field-manager={manager}",
            "-f",
            "-",
            given=to_yaml(body),
        )

    write(names.SIDECAR_MANAGER, {"alpha": 0.5, "conditions": [condition("Applied", "True")]})
    write(names.CONTROLLER_MANAGER, {"conditions": [condition("Ready", "True")]})
    write(names.SIDECAR_MANAGER, {"alpha": 0.25, "conditions": [condition("Applied", "False")]})

    status = HBMPartition.model_validate(kubectl.get("hbmp", "pod-0")).status
    assert status.alpha == 0.25
    assert {found.type: found.status.value for found in status.conditions} == {
        "Applied": "False",
        "Ready": "True",
    }


@pytest.mark.apiserver
def test_partitions_are_found_by_node_and_pod_uid(crds: ApiServer, namespace: str) -> None:
    kubectl = crds.kubectl.within(namespace)
    other = copy.deepcopy(partition(nodeName="n-2"))
    other["metadata"]["name"] = "pod-1"
    other["spec"]["podRef"]["uid"] = "u-2"
    kubectl.apply(partition(nodeName="n-1"), other)
    by_node = kubectl.items("hbmp", "--field-selector=spec.nodeName=n-1")
    by_uid = kubectl.items("hbmp", "--field-selector=spec.podRef.uid=u-2")
    assert [found["metadata"]["name"] for found in by_node] == ["pod-0"]
    assert [found["metadata"]["name"] for found in by_uid] == ["pod-1"]


@pytest.mark.apiserver
def test_the_columns_are_those_of_the_documentation(crds: ApiServer, namespace: str) -> None:
    kubectl = crds.kubectl.within(namespace)
    kubectl.apply(partition(), policy())
    partitions = kubectl("get", "hbmp").splitlines()[0].split()
    policies = kubectl("get", "hbmpol").splitlines()[0].split()
    described = "NAME READY POLICY NODE ALPHA TARGET KV-HIT EMB-HIT P99 APPLIED AGE"
    assert partitions == described.split(" ")
    assert policies == ["NAME", "READY", "MODE", "SELECTED", "APPLIED", "FAILED", "PRIORITY", "AGE"]
    # The category lists both kinds.
    listed = kubectl("get", "hbm", "-o", "name").split()
    assert {name.split(".")[0] for name in listed} == {"hbmpolicy", "hbmpartition"}
