"""Whether the webhook works, asked as the API server asks: a review over TLS."""

from __future__ import annotations

from typing import Any, Final

import aiohttp
import orjson

from hbm_operator import names
from hbm_operator.webhook.admission import POD_PATH
from hbm_operator.webhook.tls import ServingCertificate

_TIMEOUT_S: Final = 3.0
_POD: Final[dict[str, Any]] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"generateName": "self-admission-", "labels": {names.INJECT_LABEL: "true"}},
    "spec": {"containers": [{"name": "server", "image": "none"}]},
}


class NotReady(Exception):
    """The webhook could not admit a pod of its own; the text says why."""


async def admit_own_pod(
    host: str, port: int, server_name: str, certificate: ServingCertificate, uid: str
) -> None:
    """Sends a review of a small pod and expects it to come back injected.

    Args:
        host: address of this process.
        port: of the TLS server.
        server_name: the name that the certificate must have.
        certificate: says what to trust.
        uid: of the review.

    Raises:
        NotReady: no connection, a certificate that does not hold, or another answer.
    """
    review = {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": uid,
            "namespace": "self-admission",
            "operation": "CREATE",
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "object": _POD,
            "dryRun": True,
        },
    }
    try:
        context = certificate.client_context()
        # A connection of its own each time: the handshake is half of what is asked.
        connector = aiohttp.TCPConnector(ssl=context, force_close=True)
        async with (
            aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)
            ) as session,
            session.post(
                f"https://{host}:{port}{POD_PATH}",
                data=orjson.dumps(review),
                server_hostname=server_name,
            ) as response,
        ):
            answer = orjson.loads(await response.read())["response"]
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError, KeyError) as error:
        raise NotReady(f"self-admission: {error or type(error).__name__}") from error
    if not answer.get("allowed") or not answer.get("patch"):
        raise NotReady(f"self-admission: the pod came back without a sidecar ({answer})")
