"""What the API server is answered, over TLS as it asks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hbm_operator import names
from hbm_operator.injector import InjectionSettings
from hbm_operator.webhook.admission import MAX_BODY_BYTES, Admission
from hbm_operator.webhook.metrics import MAX_NAMESPACES, WebhookMetrics
from hbm_operator.webhook.review import BadReview, read_review
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hbm_operator.mounted import mount_pair
from tests.hbm_operator.webhook.running import new_pair, patched, review, running, webhook_settings

POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "ranker", "labels": {names.INJECT_LABEL: "true"}},
    "spec": {"containers": [{"name": "server", "image": "ranker:1"}]},
}


def _pod(**metadata: Any) -> dict[str, Any]:
    pod = copy.deepcopy(POD)
    pod["metadata"].update(metadata)
    return pod


def _sidecars(pod: dict[str, Any]) -> list[str]:
    return [one["name"] for one in pod["spec"].get("initContainers", ())]


async def test_pods_are_answered_each_in_its_way(tmp_path: Path) -> None:
    pair = new_pair()
    mount_pair(tmp_path / "tls", pair)
    gpu_pod = _pod(labels={})
    gpu_pod["spec"]["containers"][0]["resources"] = {"limits": {"nvidia.com/gpu": 1}}
    async with running(webhook_settings(tmp_path)) as webhook:

        async def admit(pod: dict[str, Any], path: str = "/mutate", **request: Any) -> Any:
            status, response = await webhook.admit(pair, review(pod, **request), path)
            assert status == 200
            return response

        asked = await admit(POD, uid="a-b-c")
        assert asked["uid"] == "a-b-c"
        assert asked["allowed"] is True
        assert _sidecars(patched(POD, asked)) == [names.SIDECAR_CONTAINER]
        assert asked["auditAnnotations"] == {"outcome": "injected"}

        again = await admit(patched(POD, asked))
        assert again["allowed"] is True
        assert "patch" not in again

        by_namespace = await admit(gpu_pod, "/mutate/namespace")
        assert _sidecars(patched(gpu_pod, by_namespace)) == [names.SIDECAR_CONTAINER]
        no_gpu = await admit(_pod(labels={}), "/mutate/namespace")
        assert "patch" not in no_gpu

        skipped = await admit(_pod(annotations={names.PORT: "80"}))
        assert skipped["allowed"] is True
        [warning] = skipped["warnings"]
        assert "invalid-annotation" in warning
        assert "'80'" in warning
        marked = patched(_pod(annotations={names.PORT: "80"}), skipped)
        assert marked["metadata"]["annotations"][names.SKIP_REASON] == "invalid-annotation"

        forged = await admit(_pod(annotations={names.STATUS: "{}"}))
        assert forged["allowed"] is False
        assert forged["status"]["code"] == 403
        assert names.STATUS in forged["status"]["message"]

        for other in (
            {"operation": "UPDATE"},
            {"subResource": "ephemeralcontainers"},
            {"resource": {"group": "", "version": "v1", "resource": "services"}},
            {"object": None, "operation": "DELETE"},
        ):
            response = await admit(POD, **other)
            assert response == {"uid": "u1", "allowed": True}

        _, text = await webhook.admin("/metrics")
        for line in (
            'hbm_webhook_requests_total{code="200"} 10.0',
            'hbm_webhook_injections_total{namespace="shop",reason="",result="injected"} 2.0',
            'hbm_webhook_injections_total{namespace="shop",reason="already-injected",'
            'result="skipped"} 1.0',
            'hbm_webhook_injections_total{namespace="shop",reason="invalid-annotation",'
            'result="skipped"} 1.0',
            'hbm_webhook_injections_total{namespace="shop",reason="",result="denied"} 1.0',
            "hbm_webhook_request_duration_seconds_count 10.0",
        ):
            assert line in text


async def test_an_error_of_our_own_lets_the_pod_through_and_marks_it(tmp_path: Path) -> None:
    pair = new_pair()
    mount_pair(tmp_path / "tls", pair)
    broken = _pod()
    broken["spec"]["containers"][0]["resources"] = {"limits": {"cpu": "plenty"}}
    async with running(webhook_settings(tmp_path)) as webhook:
        status, response = await webhook.admit(pair, review(broken))
        assert status == 200
        assert isinstance(response, dict)
        assert response["allowed"] is True
        pod = patched(broken, response)
        assert pod["metadata"]["annotations"] == {
            names.SKIP_REASON: "internal-error",
            names.SKIP_MESSAGE: "see the log of the webhook",
        }
        assert pod["spec"] == broken["spec"]
        _, text = await webhook.admin("/metrics")
        assert 'reason="internal-error",result="skipped"} 1.0' in text


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "no JSON"),
        (b"{", 400, "no JSON"),
        (b"[]", 400, "no AdmissionReview"),
        (b'{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1beta1"}', 400, "v1beta1"),
        (
            b'{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{}}',
            400,
            "request.uid",
        ),
        (b" " * (MAX_BODY_BYTES + 1), 413, str(MAX_BODY_BYTES)),
    ],
)
async def test_what_is_no_review_is_refused(
    tmp_path: Path, body: bytes, status: int, words: str
) -> None:
    pair = new_pair()
    mount_pair(tmp_path / "tls", pair)
    async with running(webhook_settings(tmp_path)) as webhook:
        answered, text = await webhook.admit(pair, body)
        assert answered == status
        assert words in text
        _, metrics = await webhook.admin("/metrics")
        assert f'hbm_webhook_requests_total{{code="{status}"}} 1.0' in metrics


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 9999), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [
                    *("metadata", "spec", "labels", "annotations", "containers", "name", "env"),
                    *("resources", "limits", "cpu", "ports", "volumes"),
                    *(names.INJECT_LABEL, names.STATUS),
                ]
            ),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=20,
)
pods = st.one_of(
    json_values,
    st.builds(
        lambda spec, annotations: {
            "metadata": {"labels": {names.INJECT_LABEL: "true"}, "annotations": annotations},
            "spec": spec,
        },
        json_values,
        json_values,
    ),
)


@settings(deadline=None)  # each error of our own is logged with its traceback
@given(pods, st.booleans())
def test_no_pod_however_broken_is_denied_by_accident(pod: Any, opted_in: bool) -> None:
    admission = Admission(
        InjectionSettings(image="sidecar:1", version="0.1.0"), WebhookMetrics(), "own"
    )
    asked = read_review(json.dumps(review(pod)).encode())
    response = json.loads(admission.review(asked, opted_in=opted_in))["response"]
    assert response["uid"] == "u1"
    if not response["allowed"]:
        assert "only the webhook writes this" in response["status"]["message"]
    elif isinstance(pod, dict):
        patched(pod, response)


@given(st.one_of(st.binary(max_size=64), json_values.map(lambda value: json.dumps(value).encode())))
def test_any_bytes_are_a_review_or_refused(body: bytes) -> None:
    with pytest.raises(BadReview):
        read_review(body)


def test_namespaces_beyond_the_bound_share_one_series() -> None:
    metrics = WebhookMetrics()
    for number in range(MAX_NAMESPACES + 50):
        metrics.count_pod(f"ns-{number}", "injected", "")
    metrics.count_pod("ns-0", "injected", "")
    samples = {
        sample.labels["namespace"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "hbm_webhook_injections_total"
    }
    assert len(samples) == MAX_NAMESPACES + 1
    assert samples["other"] == 50
    assert samples["ns-0"] == 2
