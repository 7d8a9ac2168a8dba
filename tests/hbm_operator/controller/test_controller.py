"""What users see of the controller: partitions, conditions, counts, events, rights."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hbm_e2e.api_server import ApiServer
from hbm_e2e.waiting import wait_for
from hbm_kube.errors import NotFound
from hbm_kube.resources import EVENTS, HBM_PARTITIONS, HBM_POLICIES, ROLE_BINDINGS
from hbm_operator import names
from hbm_operator.models.crd import definitions

from tests.hbm_operator.controller.conftest import (
    ControllerProcess,
    Tenant,
    condition,
    current,
    eventually,
)
from tests.kube_faults import FaultProxy

pytestmark = pytest.mark.apiserver
Start = Callable[..., ControllerProcess]


async def reasons(tenant: Tenant) -> set[tuple[str, str]]:
    events = (await tenant.kube.list(EVENTS, tenant.namespace)).items
    return {(event["involvedObject"]["kind"], event["reason"]) for event in events}


async def test_from_an_injected_pod_to_ready_and_back(tenant: Tenant, controller: Start) -> None:
    process = controller()
    pod = await tenant.pod("ranker-0")

    # Label first: without a policy α is held.
    held = await tenant.until("ranker-0", lambda p: True, "a partition")
    assert held["spec"]["mode"] == "Hold"
    assert held["spec"]["podRef"] == {"name": "ranker-0", "uid": pod["metadata"]["uid"]}
    assert held["spec"]["nodeName"] == "gpu-1"
    assert held["spec"]["container"] == "model"
    assert held["metadata"]["ownerReferences"][0]["uid"] == pod["metadata"]["uid"]
    await tenant.acknowledge("ranker-0")
    await tenant.until(
        "ranker-0", lambda p: current(p, "Ready") == ("False", "NoPolicy"), "NoPolicy"
    )

    # A policy governs it, and its sidecar follows.
    await tenant.policy(mode="Auto", alpha={"min": 0.2, "max": 0.6})
    governed = await tenant.until("ranker-0", lambda p: p["spec"]["mode"] == "Auto", "the policy")
    assert governed["spec"]["alpha"] == {"min": 0.2, "max": 0.6}
    assert governed["spec"]["policyRef"]["name"] == "p"
    await tenant.until_policy("p", lambda s: condition(s, "Progressing")[0] == "True", "progress")
    await tenant.acknowledge("ranker-0")
    ready = await tenant.until(
        "ranker-0", lambda p: current(p, "Ready") == ("True", "Ready"), "Ready"
    )
    assert current(ready, "Admitted") == ("True", "PolicySelected")
    assert current(ready, "Degraded") == ("False", "AsExpected")
    status = await tenant.until_policy("p", lambda s: s["applied"] == 1, "the count")
    assert (status["selected"], status["failed"], status["notInjected"]) == (1, 0, 0)

    # An edit arrives; a refusal is told.
    await tenant.policy(mode="Fixed", alpha={"min": 0.2, "max": 0.6, "fixed": 0.3})
    await tenant.until("ranker-0", lambda p: p["spec"]["mode"] == "Fixed", "the edit")
    await tenant.acknowledge("ranker-0", "False", "SpecRefused", "two batches do not fit")
    refused = await tenant.until(
        "ranker-0", lambda p: current(p, "Ready")[0] == "False", "the refusal"
    )
    assert condition(refused, "Ready") == ("False", "NotApplied")
    status = await tenant.until_policy("p", lambda s: s["failed"] == 1, "the refusal's count")
    assert condition(status, "Degraded") == ("True", "SidecarsRefuse")

    # Without the policy α is held, within the bounds it had.
    await tenant.kube.delete(HBM_POLICIES, "p", tenant.namespace)
    held = await tenant.until("ranker-0", lambda p: p["spec"]["mode"] == "Hold", "Hold")
    assert held["spec"]["alpha"]["max"] == 0.6
    assert "policyRef" not in held["spec"]

    # It goes with its pod.
    await tenant.delete_pod("ranker-0")
    await tenant.gone("ranker-0")

    assert {
        ("Pod", "Injected"),
        ("HBMPartition", "PolicySelected"),
        ("HBMPartition", "NoPolicy"),
        ("HBMPartition", "SpecRefused"),
    } <= await reasons(tenant)
    assert process.metric("hbm_operator_reconcile_total", kind="partition", result="error") == 0
    assert process.end(signal.SIGTERM) == 0


async def test_policy_first_works_as_well(tenant: Tenant, controller: Start) -> None:
    await tenant.policy(mode="Recommend")
    controller()
    await tenant.pod("ranker-0")
    made = await tenant.until("ranker-0", lambda p: True, "a partition")
    assert made["spec"]["mode"] == "Recommend"
    assert made["metadata"]["generation"] == 1


async def test_of_two_policies_the_higher_priority_governs_and_all_say_so(
    tenant: Tenant, controller: Start
) -> None:
    controller()
    await tenant.policy("low", priority=1)
    await tenant.policy("high", priority=2, mode="Recommend")
    await tenant.pod("ranker-0")
    await tenant.until("ranker-0", lambda p: p["spec"]["mode"] == "Recommend", "the policy")
    await tenant.acknowledge("ranker-0")
    judged = await tenant.until("ranker-0", lambda p: current(p, "Ready")[0] == "True", "Ready")
    admitted = next(c for c in judged["status"]["conditions"] if c["type"] == "Admitted")
    assert admitted["message"].endswith("Overruled, though they match too: low.")
    low = await tenant.until_policy(
        "low", lambda s: "comes before" in json.dumps(s), "the overruled policy's word"
    )
    assert low["selected"] == 0


def selecting(app: str) -> dict[str, Any]:
    return {"matchLabels": {"app": app}}


async def test_a_policy_takes_and_leaves_pods_as_its_selector_says(
    tenant: Tenant, controller: Start
) -> None:
    """And nobody looks at pods that an edit is not about."""
    process = controller()
    await tenant.policy("taken", selector=selecting("taken"))
    await tenant.policy("others", selector=selecting("others"))
    await tenant.pod("taken-0", app="taken")
    others = [f"others-{number}" for number in range(20)]
    for name in others:
        await tenant.pod(name, app="others")
    for name in ("taken-0", *others):
        await tenant.until(name, lambda p: p["spec"]["mode"] == "Auto", "a governed partition")
        await tenant.acknowledge(name)
        await tenant.until(name, lambda p: current(p, "Ready")[0] == "True", "Ready")
    await tenant.until_policy("others", lambda s: s["applied"] == 20, "the counts")
    before = process.metric("hbm_operator_reconcile_total", kind="partition")

    await tenant.policy("taken", selector=selecting("taken"), mode="Recommend")
    await tenant.until("taken-0", lambda p: p["spec"]["mode"] == "Recommend", "the edit")
    await tenant.acknowledge("taken-0")
    await tenant.until("taken-0", lambda p: current(p, "Ready")[0] == "True", "Ready again")
    looked = process.metric("hbm_operator_reconcile_total", kind="partition") - before
    assert looked < len(others)

    await tenant.policy("taken", selector=selecting("nobody"), mode="Recommend")
    await tenant.until("taken-0", lambda p: p["spec"]["mode"] == "Hold", "it to be let go")
    await tenant.until_policy("taken", lambda s: s["selected"] == 0, "the count to fall")
    labelled = {"matchExpressions": [{"key": "app", "operator": "Exists"}]}
    await tenant.policy("others", selector=labelled, mode="Recommend")
    await tenant.until("taken-0", lambda p: p["spec"]["mode"] == "Recommend", "the other policy")
    await tenant.until_policy("others", lambda s: s["selected"] == 21, "the count to grow")


async def test_what_is_said_is_said_once_and_the_log_is_json(
    tenant: Tenant, controller: Start
) -> None:
    """Also by a controller that was killed meanwhile."""
    process = controller("--log-level", "info")
    await tenant.policy()
    await tenant.pod("ranker-0")
    await tenant.until("ranker-0", lambda p: True, "a partition")

    async def refuse() -> None:
        await tenant.acknowledge("ranker-0")
        await tenant.until("ranker-0", lambda p: current(p, "Ready")[0] == "True", "Ready")
        await tenant.acknowledge("ranker-0", "False", "SpecRefused", "two batches do not fit")
        await tenant.until("ranker-0", lambda p: current(p, "Ready")[0] == "False", "the refusal")

    async def refusals() -> int:
        events = (await tenant.kube.list(EVENTS, tenant.namespace)).items
        return sum(event["reason"] == "SpecRefused" for event in events)

    await refuse()

    async def told() -> bool:
        return await refusals() == 1

    await eventually(told, "the event")
    for _ in range(2):
        await refuse()
        await eventually(
            lambda: process.metric("hbm_operator_events_total", result="repeated") > 0,
            "the repetition to be noticed",
        )
        process.kill()
        process.start()
    assert await refusals() == 1
    lines = [json.loads(line) for line in process.log.read_text().splitlines()]
    assert all({"event", "level", "timestamp"} <= line.keys() for line in lines)
    assert "controller works" in {line["event"] for line in lines}


async def test_a_pod_that_comes_back_under_the_same_name_gets_a_partition_of_its_own(
    tenant: Tenant, controller: Start
) -> None:
    controller()
    await tenant.policy()
    await tenant.pod("ranker-0")
    first = await tenant.until("ranker-0", lambda p: True, "a partition")
    await tenant.acknowledge("ranker-0")
    await tenant.delete_pod("ranker-0")
    pod = await tenant.pod("ranker-0")
    second = await tenant.until(
        "ranker-0",
        lambda p: p["spec"]["podRef"]["uid"] == pod["metadata"]["uid"],
        "the new pod's partition",
    )
    assert second["metadata"]["uid"] != first["metadata"]["uid"]
    assert "alpha" not in second.get("status", {}), "what the predecessor measured is not kept"


async def test_a_finished_pod_has_no_partition(tenant: Tenant, controller: Start) -> None:
    controller()
    await tenant.pod("job-0")
    await tenant.until("job-0", lambda p: True, "a partition")
    await tenant.phase("job-0", "Succeeded")
    await tenant.gone("job-0")


async def test_a_silent_sidecar_is_named_and_forgiven(tenant: Tenant, controller: Start) -> None:
    process = controller("--stale-s", "2", "--sweep-s", "0.3")
    await tenant.policy()
    await tenant.pod("ranker-0")
    silent = await tenant.until(
        "ranker-0", lambda p: condition(p, "Degraded") == ("True", "SidecarSilent"), "silence"
    )
    assert condition(silent, "Ready")[0] == "Unknown"
    assert process.metric("hbm_operator_partitions_degraded", reason="SidecarSilent") == 1
    await tenant.acknowledge("ranker-0")
    await tenant.until(
        "ranker-0", lambda p: condition(p, "Degraded")[0] == "False", "the end of the silence"
    )
    assert ("HBMPartition", "SidecarSilent") in await reasons(tenant)


async def test_pods_that_were_not_injected_are_counted_and_told(
    tenant: Tenant, controller: Start
) -> None:
    process = controller()
    await tenant.policy()
    await tenant.pod("missed-0", injected=False)
    await tenant.pod("other-0", injected=False, **{names.INJECT_LABEL: "false"})
    status = await tenant.until_policy("p", lambda s: s["notInjected"] == 1, "the count")
    assert condition(status, "Degraded") == ("True", "PodsNotInjected")
    assert process.metric("hbm_operator_not_injected_pods", reason="webhook-missed") == 1
    assert process.metric("hbm_operator_not_injected_pods") == 1

    async def told() -> bool:
        return ("Pod", "InjectionSkipped") in await reasons(tenant)

    await eventually(told, "the event")
    await tenant.delete_pod("missed-0")
    await tenant.until_policy("p", lambda s: s["notInjected"] == 0, "the count to fall")


async def test_gpu_pods_of_a_namespace_that_asks_are_counted_too(
    tenant: Tenant, crds: ApiServer, controller: Start
) -> None:
    process = controller()
    kubectl = crds.kubectl
    kubectl("label", "namespace", tenant.namespace, f"{names.NAMESPACE_LABEL}=enabled")
    within = kubectl.within(tenant.namespace)
    gpu = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
    for name, container in (("gpu-pod", gpu), ("cpu-pod", {})):
        within.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name},
                "spec": {"containers": [{"name": "model", "image": "model", **container}]},
            }
        )
    await eventually(
        lambda: process.metric("hbm_operator_not_injected_pods") == 1, "the count to be 1"
    )
    kubectl("label", "namespace", tenant.namespace, f"{names.NAMESPACE_LABEL}-")
    await eventually(
        lambda: process.metric("hbm_operator_not_injected_pods") == 0, "the count to be 0"
    )


async def test_sidecars_of_a_namespace_get_their_rights_again_if_bound_elsewhere(
    tenant: Tenant, controller: Start
) -> None:
    foreign = {
        "metadata": {"name": names.SIDECAR_ROLE_BINDING, "namespace": tenant.namespace},
        "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": "ClusterRole",
            "name": "of-an-earlier-release",
        },
    }
    await tenant.kube.apply(ROLE_BINDINGS, foreign, field_manager="somebody")
    controller("--sidecar-cluster-role", "hbm-sidecar")
    await tenant.pod("ranker-0")
    found: dict[str, Any] = {}

    async def bound() -> bool:
        nonlocal found
        try:
            found = await tenant.kube.get(
                ROLE_BINDINGS, names.SIDECAR_ROLE_BINDING, tenant.namespace
            )
        except NotFound:
            return False
        return bool(found["roleRef"]["name"] == "hbm-sidecar")

    await eventually(bound, "the binding to be ours")
    assert [(subject["kind"], subject["name"]) for subject in found["subjects"]] == [
        ("Group", f"system:serviceaccounts:{tenant.namespace}")
    ]


async def test_a_restart_writes_nothing(
    tenant: Tenant, controller: Start, proxy: FaultProxy
) -> None:
    process = controller(through=proxy)
    await tenant.policy()
    for number in range(5):
        await tenant.pod(f"ranker-{number}")
        await tenant.until(
            f"ranker-{number}", lambda p: p["spec"].get("policyRef"), "a governed partition"
        )
        await tenant.acknowledge(f"ranker-{number}")
    for number in range(5):
        await tenant.until(f"ranker-{number}", lambda p: current(p, "Ready")[0] == "True", "Ready")
    await tenant.until_policy(
        "p", lambda s: s["applied"] == 5 and condition(s, "Ready")[0] == "True", "the counts"
    )
    assert process.end() == 0
    before = len(proxy.seen)
    process.start()
    await eventually(
        lambda: (
            process.metric("hbm_operator_reconcile_total", kind="partition", result="ok") >= 5
            and process.metric("hbm_operator_queue_depth") == 0
        ),
        "everything to be looked at",
    )
    writes = [seen for seen in proxy.seen[before:] if seen.method not in ("GET", "WATCH")]
    assert writes == []


async def test_what_was_deleted_by_hand_is_made_again(tenant: Tenant, controller: Start) -> None:
    controller()
    await tenant.pod("ranker-0")
    first = await tenant.until("ranker-0", lambda p: True, "a partition")
    await tenant.kube.delete(HBM_PARTITIONS, "ranker-0", tenant.namespace)
    uid = first["metadata"]["uid"]
    await tenant.until("ranker-0", lambda p: p["metadata"]["uid"] != uid, "another partition")


async def test_missing_resources_end_it_with_one_line(tmp_path: Path) -> None:
    with ApiServer(tmp_path / "k8s", controllers=False) as bare:
        process = ControllerProcess(tmp_path, bare.kubeconfig, "--crd-wait-s", "0.5")
        process.start(wait=False)
        assert process.wait() == 1
        last = process.log.read_text().splitlines()[-1]
        assert last.startswith("hbm operator controller: ")
        assert "install the CRDs" in last


async def test_resources_that_come_late_are_waited_for(tmp_path: Path) -> None:
    with ApiServer(tmp_path / "k8s", controllers=False) as bare:
        process = ControllerProcess(tmp_path, bare.kubeconfig)
        process.start(wait=False)
        wait_for(
            lambda: "cannot be listed yet" in process.log.read_text(), 30, "it to find nothing"
        )
        bare.kubectl.apply(*definitions().values(), server_side=True)
        wait_for(process.works, 60, "the controller to work", because=process.log.read_text)
        assert process.get("/readyz") == (200, "ok\n")
        process.kill()
