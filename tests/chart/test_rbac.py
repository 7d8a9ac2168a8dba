"""Who may do what: nothing that is not named here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chart.conftest import Render
from tests.chart.rendered import CHART, VALUES, Object, Rendered

pytestmark = pytest.mark.helm


def rights(role: Object) -> set[tuple[str, str, str]]:
    """(resource, verb, name) of each right; the name is empty where it is not limited to one."""
    return {
        (f"{resource}.{group}".rstrip("."), verb, name)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames", [""])
    }


def every(resource: str, verbs: str, name: str = "") -> set[tuple[str, str, str]]:
    return {(resource, verb, name) for verb in verbs.split()}


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.name)
def test_no_right_is_a_wildcard_and_no_secret_can_be_listed(render: Render, values: Path) -> None:
    for role in render(values).of_kind("Role", "ClusterRole"):
        for resource, verb, name in rights(role):
            assert "*" not in resource + verb, role["metadata"]["name"]
            if resource == "secrets":
                assert verb == "create" or (verb in ("get", "patch") and name), (
                    role["metadata"]["name"],
                    verb,
                )


def test_what_the_controller_may_do(render: Render) -> None:
    rendered = render()
    assert rights(rendered.one("ClusterRole", "hbm-controller")) == (
        every("pods", "get list watch")
        | every("hbmpolicies.hbm-partition.io", "get list watch")
        | every("hbmpolicies/status.hbm-partition.io", "patch")
        | every("hbmpartitions.hbm-partition.io", "get list watch create patch delete")
        | every("hbmpartitions/status.hbm-partition.io", "patch")
        | every("events", "create")
        | every("rolebindings.rbac.authorization.k8s.io", "create")
        | every(
            "rolebindings.rbac.authorization.k8s.io", "get patch delete", "hbm-partition-sidecar"
        )
        | every("clusterroles.rbac.authorization.k8s.io", "bind", "hbm-sidecar")
        | every("secrets", "create")
        | every("secrets", "get patch", "hbm-redis")
    )
    assert rights(rendered.one("ClusterRole", "hbm-controller-cluster")) == (
        every("namespaces", "list watch")
        | every(
            "mutatingwebhookconfigurations.admissionregistration.k8s.io",
            "get patch",
            "hbm-webhook",
        )
    )
    assert rights(rendered.one("Role", "hbm-controller")) == (
        every("pods", "list")
        | every("services", "get", "hbm-webhook")
        | every("secrets", "create")
        | every("secrets", "get patch", "hbm-redis-admin")
        | every("secrets", "get patch", "hbm-webhook-tls")
    )


def test_what_a_sidecar_may_do(render: Render) -> None:
    assert rights(render().one("ClusterRole", "hbm-sidecar")) == (
        every("hbmpartitions.hbm-partition.io", "get list watch")
        | every("hbmpartitions/status.hbm-partition.io", "patch")
    )


def test_the_webhook_and_redis_have_no_rights(render: Render) -> None:
    holders = {
        subject["name"]
        for binding in render().of_kind("RoleBinding", "ClusterRoleBinding")
        for subject in binding["subjects"]
    }
    assert holders == {"hbm-controller", "hbm-test"}


def test_watched_namespaces_limit_the_controller_to_them(render: Render) -> None:
    rendered = render(CHART / "ci" / "external-values.yaml")
    everywhere = {each["roleRef"]["name"] for each in rendered.of_kind("ClusterRoleBinding")}
    assert everywhere == {"pool-controller-cluster"}
    bound = {
        each["metadata"]["namespace"]
        for each in rendered.of_kind("RoleBinding")
        if each["roleRef"] == {**each["roleRef"], "kind": "ClusterRole", "name": "pool-controller"}
    }
    assert bound == {"team-a", "team-b"}
    assert rights(rendered.one("ClusterRole", "pool-controller-cluster")) == every(
        "namespaces", "list watch"
    )
    assert ("secrets", "get", "redis-account") in rights(rendered.one("Role", "pool-controller"))


def test_only_the_controller_is_exempt_from_the_guard_of_statuses(render: Render) -> None:
    rendered = render(release="prod", namespace="ops")
    policy = rendered.one("ValidatingAdmissionPolicy", "prod-hbm-status-writer")["spec"]
    assert policy["failurePolicy"] == "Fail"
    (condition,) = policy["matchConditions"]
    assert condition["expression"] == (
        'request.userInfo.username != "system:serviceaccount:ops:prod-hbm-controller"'
    )
    binding = rendered.one("ValidatingAdmissionPolicyBinding", "prod-hbm-status-writer")["spec"]
    assert binding == {
        "policyName": "prod-hbm-status-writer",
        "validationActions": ["Deny"],
    }


def test_users_of_a_namespace_get_policies_by_their_usual_roles(render: Render) -> None:
    rendered = render()
    edit = rendered.one("ClusterRole", "hbm-edit")
    assert edit["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-edit"] == "true"
    assert {resource for resource, _, _ in rights(edit)} == {"hbmpolicies.hbm-partition.io"}
    assert {verb for _, verb, _ in rights(rendered.one("ClusterRole", "hbm-view"))} == {
        "get",
        "list",
        "watch",
    }


def test_tokens_are_mounted_only_where_they_are_used(render: Render) -> None:
    rendered: Rendered = render(CHART / "ci" / "full-values.yaml")
    mounted = {name: pod["spec"]["automountServiceAccountToken"] for name, pod in rendered.pods()}
    assert mounted == {
        "hbm-controller": True,
        "hbm-webhook": True,
        "hbm-redis": False,
        "hbm-router-rank": True,
        "hbm-router-feed": True,
        "hbm-test-injection": True,
        "hbm-test-answers": False,
    }
    for account in rendered.of_kind("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
