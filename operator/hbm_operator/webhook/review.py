"""AdmissionReview (admission.k8s.io/v1): what is asked, and the answer."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Final

import orjson

from hbm_operator.injector import Injection, Outcome, json_patch

_API_VERSION: Final = "admission.k8s.io/v1"
_MAX_WARNING: Final = 256
"""Characters; the API server may cut longer ones."""
_MAX_WARNINGS: Final = 15
"""Of 256 characters each: beyond 4,096 in all the API server drops them."""


class BadReview(ValueError):
    """The body is no AdmissionReview; the text says why."""


@dataclass(frozen=True)
class Review:
    """One question of the API server."""

    uid: str
    namespace: str
    name: str
    """Name of the pod, or what a name will be generated from."""
    pod: dict[str, Any] | None
    """None where it is not about the creation of a pod."""


def read_review(body: bytes) -> Review:
    """Reads the body of a request.

    Raises:
        BadReview: it is not what an API server sends.
    """
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadReview(f"the body is no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("kind") != "AdmissionReview":
        raise BadReview("the body is no AdmissionReview")
    if content.get("apiVersion") != _API_VERSION:
        raise BadReview(f"apiVersion {content.get('apiVersion')!r} is not {_API_VERSION!r}")
    request = content.get("request")
    if not isinstance(request, dict) or not isinstance(request.get("uid"), str):
        raise BadReview("request.uid is missing")
    pod = request.get("object")
    resource = request.get("resource")
    about_a_pod = (
        isinstance(resource, dict)
        and (resource.get("group", ""), resource.get("resource")) == ("", "pods")
        and request.get("operation") == "CREATE"
        and not request.get("subResource")
        and isinstance(pod, dict)
    )
    metadata = pod.get("metadata") if isinstance(pod, dict) else None
    metadata = metadata if isinstance(metadata, dict) else {}
    return Review(
        uid=request["uid"],
        namespace=str(request.get("namespace") or ""),
        name=str(metadata.get("name") or metadata.get("generateName") or ""),
        pod=pod if about_a_pod else None,
    )


def allow(review: Review) -> bytes:
    """The answer to what is none of our business."""
    return _answer({"uid": review.uid, "allowed": True})


def answer(review: Review, injection: Injection) -> bytes:
    """The answer for a pod: the patch, the warnings, and what was done for the audit log."""
    response: dict[str, Any] = {
        "uid": review.uid,
        "allowed": injection.outcome is not Outcome.DENIED,
        "auditAnnotations": {"outcome": str(injection.outcome)},
    }
    if injection.skip_reason is not None:
        response["auditAnnotations"]["skip-reason"] = str(injection.skip_reason)
    if injection.warnings:
        response["warnings"] = [
            warning[:_MAX_WARNING] for warning in injection.warnings[:_MAX_WARNINGS]
        ]
    if injection.outcome is Outcome.DENIED:
        response["status"] = {"code": 403, "reason": "Forbidden", "message": injection.denied}
    else:
        patch = json_patch(review.pod, injection.pod)
        if patch:
            response["patchType"] = "JSONPatch"
            response["patch"] = base64.b64encode(orjson.dumps(patch)).decode()
    return _answer(response)


def _answer(response: dict[str, Any]) -> bytes:
    return orjson.dumps(
        {"apiVersion": _API_VERSION, "kind": "AdmissionReview", "response": response}
    )
