"""What the documents say about Kubernetes is what the software says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from hbm_e2e.api_server import ApiServer
from hbm_operator import names
from hbm_operator.injector import SkipReason
from hbm_operator.models.partition import ConditionType, Reason
from hbm_operator.models.policy import HBMPolicy

from tests.chart.conftest import Render
from tests.chart.rendered import CHART, ROOT

WALK = (ROOT / "docs" / "kubernetes.md").read_text()
EXAMPLES = ROOT / "docs" / "examples"


def commands() -> str:
    """The shell commands of the walk-through, in order."""
    return "\n".join(re.findall(r"^```sh\n(.*?)^```", WALK, flags=re.MULTILINE | re.DOTALL))


def test_the_commands_are_shell_and_name_files_that_exist() -> None:
    done = subprocess.run(
        ["bash", "-n"], input=commands(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    files = re.findall(r"-f (\S+)", commands())
    assert len(files) >= 4
    for name in files:
        assert (ROOT / name).is_file(), name


def test_every_label_annotation_and_reason_is_explained() -> None:
    for key in (names.INJECT_LABEL, names.NAMESPACE_LABEL, *names.INPUT_ANNOTATIONS):
        assert f"`{key}`" in WALK, key
    for reason in SkipReason:
        assert f"`{reason}`" in WALK, reason
    for condition in ConditionType:
        assert f"`{condition}`" in WALK, condition
    said_by_nothing_wrong = {Reason.AS_EXPECTED, Reason.READY, Reason.NOT_APPLIED}
    for reason in set(Reason) - said_by_nothing_wrong:
        assert f"`{reason}`" in WALK, reason


def test_the_example_policy_is_one() -> None:
    policy = HBMPolicy.model_validate(yaml.safe_load((EXAMPLES / "policy.yaml").read_text()))
    server, service = yaml.safe_load_all((EXAMPLES / "server.yaml").read_text())
    labels = server["spec"]["template"]["metadata"]["labels"]
    assert policy.spec.selector.matches(labels)
    assert service["spec"]["selector"].items() <= labels.items()
    assert labels[names.INJECT_LABEL] == "true"


@pytest.mark.helm
def test_the_example_route_leads_to_the_example_server(render: Render) -> None:
    arguments = render(EXAMPLES / "routes.yaml").arguments("hbm-router-rank")
    _, service = yaml.safe_load_all((EXAMPLES / "server.yaml").read_text())
    assert f"--service={service['metadata']['name']}" in arguments
    assert f"--service-port={service['spec']['ports'][0]['name']}" in arguments
    assert f"http://hbm-router-rank.{'models'}" in WALK


@pytest.mark.apiserver
def test_the_examples_are_taken_where_only_restricted_pods_are(
    api_server: ApiServer, namespace: str
) -> None:
    kubectl = api_server.kubectl.within(namespace)
    kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/warn=restricted")
    # A warning of Pod Security would come back on standard error: as errors with this flag.
    kubectl("apply", "--warnings-as-errors", "-f", str(EXAMPLES / "server.yaml"))


def test_the_chart_is_of_the_version_that_the_documents_name() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    images = re.findall(r"hbm-partition/(?:\{[\w,]+\}|server):([\w.]+)", WALK + _example())
    assert set(images) == {chart["appVersion"]} == {"0.1.0"}


def _example() -> str:
    return Path(EXAMPLES / "server.yaml").read_text()
