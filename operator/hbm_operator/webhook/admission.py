"""POST /mutate and POST /mutate/namespace: from the body of a request to the body of an answer.

Nothing here waits: no API, no disk. What goes wrong on our side lets the pod through without a
sidecar and says so in it; only what is no AdmissionReview at all is answered with 400.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog
from aiohttp import web

from hbm_operator.injector import (
    Injection,
    InjectionSettings,
    NamespaceFacts,
    Outcome,
    SkipReason,
    failed,
    inject,
)
from hbm_operator.webhook.metrics import WebhookMetrics
from hbm_operator.webhook.review import BadReview, Review, allow, answer, read_review

POD_PATH: Final = "/mutate"
"""Pods that have the label `hbm-partition.io/inject`."""
NAMESPACE_PATH: Final = "/mutate/namespace"
"""Pods without it, in namespaces that have `hbm-partition.io/injection: enabled`."""
MAX_BODY_BYTES: Final = 4 * 1024 * 1024
"""The API server takes no request of more than 3 MiB; the review wraps it."""


class Admission:
    """Answers the API server.

    Args:
        settings: of the injection.
        metrics: where pods and requests are counted.
        own_uid: uid of our own self-admissions, which are not counted.
    """

    def __init__(self, settings: InjectionSettings, metrics: WebhookMetrics, own_uid: str) -> None:
        self._settings = settings
        self._metrics = metrics
        self._own_uid = own_uid
        self._log = structlog.get_logger()
        self.draining = False
        """Whether clients are told to go elsewhere with their next request."""

    def app(self) -> web.Application:
        """The HTTP application of the TLS port."""
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post(POD_PATH, self._handler(opted_in=False))
        app.router.add_post(NAMESPACE_PATH, self._handler(opted_in=True))
        return app

    def _handler(self, *, opted_in: bool) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            began = asyncio.get_running_loop().time()
            uid = ""
            try:
                body = await request.read()
                review = read_review(body)
                uid = review.uid
                response = web.Response(
                    body=self.review(review, opted_in=opted_in), content_type="application/json"
                )
            except web.HTTPRequestEntityTooLarge:
                response = web.Response(
                    status=413, text=f"the body has more than {MAX_BODY_BYTES} bytes\n"
                )
            except BadReview as error:
                response = web.Response(status=400, text=f"{error}\n")
            if uid != self._own_uid:
                self._metrics.requests.labels(str(response.status)).inc()
                self._metrics.duration.observe(asyncio.get_running_loop().time() - began)
            if self.draining:
                response.force_close()
            return response

        return handle

    def review(self, review: Review, *, opted_in: bool) -> bytes:
        """The body of the answer.

        Args:
            review: what the API server asks.
            opted_in: the namespace asks for the sidecar, and the pod says nothing.
        """
        if review.pod is None:
            return allow(review)
        injection = self._inject(review, NamespaceFacts(review.namespace, opted_in))
        if review.uid != self._own_uid:
            self._metrics.count_pod(
                review.namespace, str(injection.outcome), str(injection.skip_reason or "")
            )
        return answer(review, injection)

    def _inject(self, review: Review, namespace: NamespaceFacts) -> Injection:
        pod: dict[str, Any] = review.pod or {}
        where = {"namespace": review.namespace, "pod": review.name}
        try:
            injection = inject(pod, namespace, self._settings)
        except Exception:
            # Whatever it is: a pod without the sidecar is better than none.
            self._log.exception("injection failed", **where)
            return failed(pod)
        if injection.skip_reason not in (None, SkipReason.ALREADY_INJECTED):
            self._log.warning(
                "not injected", reason=str(injection.skip_reason), why=injection.warnings, **where
            )
        elif injection.outcome is Outcome.DENIED:
            self._log.warning("denied", why=injection.denied, **where)
        else:
            self._log.debug("admitted", outcome=str(injection.outcome), **where)
        return injection
