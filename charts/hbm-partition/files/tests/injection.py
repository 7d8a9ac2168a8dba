"""Asks the webhook to admit a pod, trusting what the API server trusts, and expects the sidecar."""

import base64
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
REVIEW = {
    "apiVersion": "admission.k8s.io/v1",
    "kind": "AdmissionReview",
    "request": {
        "uid": "helm-test",
        "kind": {"group": "", "version": "v1", "kind": "Pod"},
        "resource": {"group": "", "version": "v1", "resource": "pods"},
        "operation": "CREATE",
        "namespace": "default",
        "dryRun": True,
        "userInfo": {"username": "helm-test"},
        "object": {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "generateName": "helm-test-",
                "labels": {"hbm-partition.io/inject": "true"},
            },
            "spec": {"containers": [{"name": "server", "image": "example.com/server:1"}]},
        },
    },
}


def trusted_authorities() -> str:
    """The CA that the API server checks the webhook with, as PEM."""
    with open(f"{ACCOUNT}/token") as file:
        token = file.read()
    path = "apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"
    request = urllib.request.Request(
        f"https://kubernetes.default.svc/{path}/{os.environ['CONFIGURATION']}",
        headers={"Authorization": f"Bearer {token}"},
    )
    context = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
        hooks = json.load(answer)["webhooks"]
    bundles = {hook["clientConfig"].get("caBundle", "") for hook in hooks}
    if len(bundles) != 1 or "" in bundles:
        raise LookupError("the caBundle of the webhook configuration is not there yet")
    return base64.b64decode(bundles.pop()).decode()


def inject() -> None:
    context = ssl.create_default_context(cadata=trusted_authorities())
    request = urllib.request.Request(
        os.environ["WEBHOOK"],
        data=json.dumps(REVIEW).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
        response = json.load(answer)["response"]
    if not response["allowed"]:
        raise LookupError(f"the pod was refused: {response}")
    patch = base64.b64decode(response.get("patch", "")).decode()
    if "hbm-sidecar" not in patch:
        raise LookupError(f"the pod came back without the sidecar: {patch or response}")


deadline = time.monotonic() + 90
while True:
    try:
        inject()
    except (OSError, LookupError) as error:
        if time.monotonic() > deadline:
            sys.exit(f"{os.environ['WEBHOOK']}: {error}")
        print(f"waiting: {error}")
        time.sleep(2)
    else:
        print("the webhook injects the sidecar, and the API server can trust it")
        break
