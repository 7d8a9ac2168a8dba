"""The shape of what is installed, for each file of values that the chart is delivered with."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.chart.conftest import Render
from tests.chart.rendered import CHART, ROOT, VALUES, Rendered

pytestmark = pytest.mark.helm

RECOMMENDED = {
    f"app.kubernetes.io/{name}"
    for name in ("name", "instance", "component", "version", "part-of", "managed-by")
}


@pytest.fixture(scope="module", params=VALUES, ids=lambda path: path.name)
def rendered(request: pytest.FixtureRequest, render: Render) -> Rendered:
    return render(request.param)


@pytest.fixture(scope="module")
def full(render: Render) -> Rendered:
    return render(CHART / "ci" / "full-values.yaml")


def test_two_renders_are_equal(render: Render, render_anew: Render) -> None:
    for values in VALUES:
        assert render(values).text == render_anew(values).text


def test_every_object_carries_the_recommended_labels(rendered: Rendered) -> None:
    for each in rendered.objects:
        assert set(each["metadata"]["labels"]) >= RECOMMENDED, each["metadata"]["name"]
    for name, pod in rendered.pods():
        assert set(pod["metadata"]["labels"]) >= RECOMMENDED, name


def test_no_object_is_there_twice(rendered: Rendered) -> None:
    names = [
        (each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"])
        for each in rendered.objects
    ]
    assert len(names) == len(set(names))


def test_nothing_of_ours_but_definitions_and_no_secret(rendered: Rendered) -> None:
    groups = {each["apiVersion"] for each in rendered.objects}
    assert not any(group.startswith("hbm-partition.io/") for group in groups)
    assert not rendered.of_kind("Secret")


def test_every_pod_is_restricted(rendered: Rendered) -> None:
    for name, pod in rendered.pods():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), name
            assert "memory" in resources["limits"], name


def test_environment_of_services_does_not_reach_our_settings(rendered: Rendered) -> None:
    # Kubernetes would add HBM_REDIS_PORT=tcp://... for a Service called hbm-redis.
    for name, pod in rendered.pods():
        assert pod["spec"]["enableServiceLinks"] is False, name


def test_images_have_a_version_and_no_host_by_default(render: Render) -> None:
    images = {
        container["image"] for _, pod in render().pods() for container in pod["spec"]["containers"]
    }
    assert images == {"hbm-partition/operator:0.1.0", "hbm-partition/redis:0.1.0"}


def test_a_registry_and_a_digest_reach_every_image(render: Render, full: Rendered) -> None:
    for _, pod in full.pods():
        for container in pod["spec"]["containers"]:
            assert container["image"].startswith("registry.example.com/mirror/hbm-partition/")
        assert pod["spec"]["imagePullSecrets"] == [{"name": "mirror"}]
    (sidecar,) = [
        each for each in full.arguments("hbm-webhook") if each.startswith("--sidecar-image=")
    ]
    assert sidecar.endswith("=registry.example.com/mirror/hbm-partition/sidecar:0.1.0")
    pinned = render(CHART / "ci" / "external-values.yaml").one("Deployment", "pool-controller")
    (container,) = pinned["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith("hbm-partition/operator@sha256:")


def test_one_controller_that_leaves_a_lost_node_soon(render: Render) -> None:
    spec = render().one("Deployment", "hbm-controller")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    seconds = {
        each["key"]: each["tolerationSeconds"] for each in spec["template"]["spec"]["tolerations"]
    }
    assert seconds == {
        "node.kubernetes.io/not-ready": 10,
        "node.kubernetes.io/unreachable": 10,
    }


@pytest.mark.parametrize(
    ("name", "namespace"),
    [("hbm-webhook", "hbm-ns"), ("hbm-router-rank", "models"), ("hbm-router-feed", "feeds")],
)
def test_what_is_in_the_way_of_requests_is_replicated(
    full: Rendered, name: str, namespace: str
) -> None:
    deployment = full.one("Deployment", name, namespace)["spec"]
    assert deployment["replicas"] >= 2
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    selector = deployment["selector"]
    spread = deployment["template"]["spec"]["topologySpreadConstraints"]
    assert {each["topologyKey"] for each in spread} == {
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    }
    assert all(each["labelSelector"] == selector for each in spread)
    budget = full.one("PodDisruptionBudget", name, namespace)["spec"]
    assert budget == {"maxUnavailable": 1, "selector": selector}
    assert full.one("Service", name, namespace)["spec"]["selector"] == selector["matchLabels"]


def test_selectors_match_the_pods_and_nothing_else(full: Rendered) -> None:
    deployments = full.of_kind("Deployment")
    for each in deployments:
        selector = each["spec"]["selector"]["matchLabels"].items()
        chosen = [
            other["metadata"]["name"]
            for other in deployments
            if selector <= other["spec"]["template"]["metadata"]["labels"].items()
        ]
        assert chosen == [each["metadata"]["name"]]


def test_names_and_selectors_stay_the_same_whatever_is_upgraded(render: Render) -> None:
    def identity(rendered: Rendered) -> dict[tuple[str, str], object]:
        return {
            (each["kind"], each["metadata"]["name"]): each["spec"].get("selector")
            if each["kind"] in ("Deployment", "Service", "PodDisruptionBudget")
            else None
            for each in rendered.objects
        }

    values = CHART / "ci" / "full-values.yaml"
    changed = render(
        values,
        "image.tag=0.2.0",
        "webhook.replicas=5",
        "commonLabels.team=other",
        "controller.podLabels.tier=back",
        "routes[0].replicas=7",
    )
    assert identity(changed) == identity(render(values))


def test_a_new_chart_alone_restarts_nothing(full: Rendered) -> None:
    for name, pod in full.pods():
        if "helm.sh/hook" not in pod["metadata"].get("annotations", {}):
            assert "helm.sh/chart" not in pod["metadata"]["labels"], name


def test_the_names_that_the_parts_expect_of_each_other(render: Render) -> None:
    rendered = render()
    controller = rendered.arguments("hbm-controller")
    for expected in (
        "--namespace=hbm-ns",
        "--sidecar-cluster-role=hbm-sidecar",
        "--redis-secret=hbm-redis-admin",
        "--redis-address=hbm-redis.hbm-ns.svc:6379",
        "--certs=self-signed",
        "--tls-secret=hbm-webhook-tls",
        "--webhook-service=hbm-webhook",
        "--webhook-configuration=hbm-webhook",
    ):
        assert expected in controller
    rendered.one("ClusterRole", "hbm-sidecar")
    rendered.one("MutatingWebhookConfiguration", "hbm-webhook")
    (port,) = rendered.one("Service", "hbm-webhook")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (443, "webhook")
    redis = rendered.one("Deployment", "hbm-redis")["spec"]["template"]["spec"]
    (secret,) = [each["secret"] for each in redis["volumes"] if "secret" in each]
    assert secret["secretName"] == "hbm-redis-admin"
    assert "optional" not in secret


def test_a_release_of_another_name_has_its_name_in_all_objects(render: Render) -> None:
    rendered = render(release="prod", namespace="other")
    for each in rendered.objects:
        if each["kind"] != "CustomResourceDefinition":
            assert each["metadata"]["name"].startswith("prod-hbm-"), each["metadata"]["name"]
            assert each["metadata"].get("namespace") in (None, "other")


def test_long_names_stay_valid(render: Render) -> None:
    rendered = render(
        None,
        "routes[0].name=" + "r" * 25,
        "routes[0].namespace=n,routes[0].service=s,routes[0].port=1",
        release="a" * 53,
    )
    assert max(len(each["metadata"]["name"]) for each in rendered.of_kind("Service")) <= 63


@pytest.mark.parametrize(
    ("mode", "bundle", "secret"),
    [
        ("default", False, "hbm-webhook-tls"),
        ("cert-manager", False, "hbm-webhook-tls"),
        ("external", True, "webhook-certificate"),
    ],
)
def test_who_brings_the_certificate(render: Render, mode: str, bundle: bool, secret: str) -> None:
    rendered = render(CHART / "ci" / f"{mode}-values.yaml")
    (configuration,) = rendered.of_kind("MutatingWebhookConfiguration")
    for hook in configuration["webhooks"]:
        assert ("caBundle" in hook["clientConfig"]) is bundle
    annotations = configuration["metadata"].get("annotations", {})
    assert ("cert-manager.io/inject-ca-from" in annotations) is (mode == "cert-manager")
    (deployment,) = [
        each for each in rendered.of_kind("Deployment") if "webhook" in each["metadata"]["name"]
    ]
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    assert [each["secret"]["secretName"] for each in volumes if "secret" in each] == [secret]


def test_cert_manager_is_asked_for_the_name_of_the_service(render: Render) -> None:
    rendered = render(CHART / "ci" / "cert-manager-values.yaml")
    certificate = rendered.one("Certificate", "hbm-webhook")["spec"]
    assert "hbm-webhook.hbm-ns.svc" in certificate["dnsNames"]
    assert certificate["secretName"] == "hbm-webhook-tls"
    assert certificate["issuerRef"]["kind"] == "ClusterIssuer"
    assert not rendered.of_kind("Issuer")
    own = render(None, "webhook.certificates.mode=certManager")
    assert own.one("Issuer", "hbm-webhook")["spec"] == {"selfSigned": {}}


def test_which_pods_the_api_server_asks_about(render: Render) -> None:
    configuration = render().one("MutatingWebhookConfiguration", "hbm-webhook")
    pod, namespace = configuration["webhooks"]
    for hook in (pod, namespace):
        assert hook["failurePolicy"] == "Ignore"
        assert hook["reinvocationPolicy"] == "IfNeeded"
        assert hook["sideEffects"] == "None"
        assert hook["timeoutSeconds"] == 5
        assert hook["rules"] == [
            {
                "apiGroups": [""],
                "apiVersions": ["v1"],
                "operations": ["CREATE"],
                "resources": ["pods"],
                "scope": "Namespaced",
            }
        ]
        left_out = hook["namespaceSelector"]["matchExpressions"][0]
        assert left_out["operator"] == "NotIn"
        assert set(left_out["values"]) == {"kube-system", "kube-node-lease", "hbm-ns"}
    assert pod["clientConfig"]["service"]["path"] == "/mutate"
    assert pod["objectSelector"]["matchExpressions"] == [
        {"key": "hbm-partition.io/inject", "operator": "Exists"},
        {"key": "hbm-partition.io/inject", "operator": "NotIn", "values": ["false"]},
    ]
    assert pod["namespaceSelector"]["matchExpressions"][1]["values"] == ["disabled"]
    assert namespace["clientConfig"]["service"]["path"] == "/mutate/namespace"
    assert namespace["objectSelector"]["matchExpressions"] == [
        {"key": "hbm-partition.io/inject", "operator": "DoesNotExist"}
    ]
    assert namespace["namespaceSelector"]["matchExpressions"][1]["values"] == ["enabled"]


def test_a_router_knows_its_own_namespace_only(full: Rendered) -> None:
    role = full.one("Role", "hbm-router-rank", "models")
    assert role["rules"] == [
        {
            "apiGroups": ["discovery.k8s.io"],
            "resources": ["endpointslices"],
            "verbs": ["get", "list", "watch"],
        }
    ]
    arguments = full.arguments("hbm-router-rank")
    assert "--service=rank" in arguments
    assert "--service-port=http" in arguments
    assert {"--service-namespace=models", "--namespace=models"} <= set(arguments)
    volumes = full.one("Deployment", "hbm-router-rank")["spec"]["template"]["spec"]["volumes"]
    assert {"secretName": "hbm-redis", "optional": True, "defaultMode": 0o440} in [
        each.get("secret") for each in volumes
    ]


def test_a_route_overrides_the_defaults_of_routers(full: Rendered) -> None:
    arguments = full.arguments("hbm-router-feed")
    assert "--policy=chwbl" in arguments
    assert arguments[-1] == "--max-queue-ms=200"
    assert full.one("Service", "hbm-router-feed")["spec"]["type"] == "LoadBalancer"
    assert "--policy=cost_ms" in full.arguments("hbm-router-rank")


def test_the_definitions_are_those_of_the_project(render: Render) -> None:
    rendered = {
        each["metadata"]["name"]: each for each in render().of_kind("CustomResourceDefinition")
    }
    sources = sorted((ROOT / "crds").glob("*.yaml"))
    assert len(sources) == len(rendered) == 2
    for path in sources:
        assert (CHART / "files" / "crds" / path.name).read_text() == path.read_text(), (
            f"cp {path.relative_to(ROOT)} charts/hbm-partition/files/crds/"
        )
        source = yaml.safe_load(path.read_text())
        crd = rendered[source["metadata"]["name"]]
        assert crd["spec"] == source["spec"]
        assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert not render(None, "crds.install=false").of_kind("CustomResourceDefinition")


def test_dashboards_go_where_grafana_looks(full: Rendered) -> None:
    maps = full.of_kind("ConfigMap")
    assert {name for each in maps for name in each["data"]} == {
        "fleet.json",
        "partition.json",
        "router.json",
    }
    for each in maps:
        assert each["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert each["metadata"]["namespace"] == "monitoring"
        assert each["metadata"]["annotations"] == {"grafana_folder": "HBM Partition"}


def test_notes_say_how_to_look(helm: Path) -> None:
    from hbm_e2e.kubectl import run

    text = run([str(helm), "install", "hbm", str(CHART), "-n", "hbm-ns", "--dry-run=client"])
    notes = text[text.index("NOTES:") :]
    assert "helm test hbm -n hbm-ns" in notes
    assert "kubectl get hbmp -A" in notes
