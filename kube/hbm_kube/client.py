"""One request to the Kubernetes API at a time: bounded retries, bounded concurrency.

What is retried: an answer that says nothing was done (429) always; no connection always; an answer
that leaves it open (5xx, timeout, cut short) only where asking twice is the same as asking once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import aiohttp
import orjson
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from hbm_kube.config import KubeConfig
from hbm_kube.credentials import Credentials
from hbm_kube.errors import Gone, KubeError, TooManyRequests, Unavailable, from_answer
from hbm_kube.resources import Resource

PAGE: Final = 500
MAX_WAIT_S: Final = 30.0
"""No retry waits longer, whatever Retry-After says."""
RELISTS: Final = 3
"""How often a list starts again whose next page is gone."""

OnRequest = Callable[[str, Resource, int, float], None]
"""(verb, resource, HTTP status or 0 where no answer came, seconds), after each attempt."""


class ObjectList(NamedTuple):
    """A whole list, all pages."""

    items: list[dict[str, Any]]
    resource_version: str


class WatchEvent(NamedTuple):
    """One event of `KubeClient.watch`."""

    type: str
    """SYNCED, ADDED, MODIFIED, DELETED or BOOKMARK."""
    object: dict[str, Any]


class _NotSent(Unavailable):
    """No connection: the server has seen nothing of it."""


class KubeClient:
    """The API by verbs. Use as an asynchronous context manager; objects are plain dicts.

    Every method raises a `KubeError` of the kinds in `errors`.

    Args:
        config: server and identity.
        on_request: told of each attempt, for metrics.
        concurrency: requests in flight at most; watches do not count.
        timeout_s: limit of one attempt.
        attempts: tries of one request, the first one included.
        backoff_s: upper end of the first wait; doubles, with full jitter.
        user_agent: as the server logs it.
    """

    def __init__(
        self,
        config: KubeConfig,
        *,
        on_request: OnRequest | None = None,
        concurrency: int = 32,
        timeout_s: float = 30.0,
        attempts: int = 5,
        backoff_s: float = 0.5,
        user_agent: str = "hbm-partition",
    ) -> None:
        self.config = config
        self._credentials = Credentials(config)
        self._on_request = on_request
        self._slots = asyncio.Semaphore(concurrency)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._attempts = attempts
        self._wait = wait_random_exponential(multiplier=backoff_s, max=MAX_WAIT_S)
        self._user_agent = user_agent
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            # Watches hold a connection each; requests are bounded by `concurrency`.
            connector=aiohttp.TCPConnector(limit=0),
            headers={"User-Agent": self._user_agent, "Accept": "application/json"},
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    # -- verbs -----------------------------------------------------------------------------------

    async def get(
        self, resource: Resource, name: str, namespace: str | None = None
    ) -> dict[str, Any]:
        """One object."""
        return await self._request("get", "GET", resource, resource.path(namespace, name))

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
    ) -> ObjectList:
        """All objects (of a namespace), paged. Each has its `apiVersion` and `kind`, none its
        `managedFields`."""
        path = resource.path(namespace)
        query = selection(label_selector, field_selector) | {"limit": str(PAGE)}
        for attempt in range(RELISTS):
            try:
                return await self._pages(resource, path, query)
            except Gone:
                if attempt == RELISTS - 1:
                    raise
        raise AssertionError("unreachable")

    async def create(
        self,
        resource: Resource,
        body: Mapping[str, Any],
        namespace: str | None = None,
        *,
        name: str = "",
        subresource: str = "",
    ) -> dict[str, Any]:
        """Make an object; with `name` and `subresource` post to it (TokenRequest, Eviction).

        Not sent again after an unclear failure (`Unavailable`): it may exist by then.
        """
        path = resource.path(namespace, name, subresource)
        return await self._request("create", "POST", resource, path, body=body, repeatable=False)

    async def apply(
        self,
        resource: Resource,
        body: Mapping[str, Any],
        *,
        field_manager: str,
        force: bool = True,
        subresource: str = "",
    ) -> dict[str, Any]:
        """Server-side apply: the fields in `body` become ours, those left out no longer are."""
        metadata = body["metadata"]
        path = resource.path(metadata.get("namespace"), metadata["name"], subresource)
        return await self._request(
            "apply",
            "PATCH",
            resource,
            path,
            query={"fieldManager": field_manager, "force": "true" if force else "false"},
            body={"apiVersion": resource.api_version, "kind": resource.kind, **body},
            content_type="application/apply-patch+yaml",
        )

    async def patch(
        self,
        resource: Resource,
        name: str,
        namespace: str | None,
        patch: Mapping[str, Any] | Sequence[Any],
        *,
        subresource: str = "",
    ) -> dict[str, Any]:
        """A mapping is a merge patch; a sequence a JSON patch, sent again only if unseen."""
        merge = isinstance(patch, Mapping)
        return await self._request(
            "patch",
            "PATCH",
            resource,
            resource.path(namespace, name, subresource),
            body=patch,
            content_type=f"application/{'merge' if merge else 'json'}-patch+json",
            repeatable=merge,
        )

    async def delete(
        self, resource: Resource, name: str, namespace: str | None = None, *, uid: str | None = None
    ) -> dict[str, Any]:
        """Delete; with `uid` only the object that has it, else `Conflict`.

        After a retry `NotFound` may mean that the first try did it.
        """
        options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        path = resource.path(namespace, name)
        return await self._request("delete", "DELETE", resource, path, body=options)

    def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        name: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
        *,
        inactivity_s: float = 70.0,
        on_failure: Callable[[KubeError], None] | None = None,
    ) -> AsyncGenerator[WatchEvent, None]:
        """Lists, then watches, for ever; see `watch.watch`. Close it with `contextlib.aclosing`."""
        from hbm_kube.watch import watch

        if name is not None:
            own = f"metadata.name={name}"
            field_selector = f"{field_selector},{own}" if field_selector else own
        return watch(
            self,
            resource,
            namespace,
            label_selector,
            field_selector,
            inactivity_s=inactivity_s,
            on_failure=on_failure,
        )

    # -- one request -----------------------------------------------------------------------------

    async def _pages(self, resource: Resource, path: str, query: Mapping[str, str]) -> ObjectList:
        items: list[dict[str, Any]] = []
        token = ""
        while True:
            page_query = {**query, "continue": token} if token else query
            page = await self._request("list", "GET", resource, path, query=page_query)
            for item in page.get("items") or ():
                items.append(plain(resource, item))
            metadata = page.get("metadata") or {}
            token = metadata.get("continue") or ""
            if not token:
                return ObjectList(items, metadata.get("resourceVersion") or "")

    async def _request(
        self,
        verb: str,
        method: str,
        resource: Resource,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        repeatable: bool = True,
    ) -> dict[str, Any]:
        data = None if body is None else orjson.dumps(body)
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._attempts),
            wait=self._pause,
            retry=retry_if_exception(lambda error: _worth_a_retry(error, repeatable)),
            reraise=True,
        )
        answer: dict[str, Any] = {}
        async for attempt in retrying:
            with attempt:
                answer = await self._attempt(
                    verb, method, resource, path, query, data, content_type
                )
        return answer

    async def _attempt(
        self,
        verb: str,
        method: str,
        resource: Resource,
        path: str,
        query: Mapping[str, str] | None,
        data: bytes | None,
        content_type: str,
    ) -> dict[str, Any]:
        what = f"{verb} {path}"
        async with self._slots:
            try:
                code, body, retry_after = await self._exchange(
                    verb, method, resource, path, query, data, content_type
                )
                if code == 401 and self.token_refused():
                    code, body, retry_after = await self._exchange(
                        verb, method, resource, path, query, data, content_type
                    )
            except aiohttp.ClientConnectorError as error:
                raise _NotSent(f"{what}: no connection ({error})") from error
            except TimeoutError as error:
                seconds = self._timeout.total
                raise Unavailable(f"{what}: no answer within {seconds:g} s") from error
            except (aiohttp.ClientError, OSError) as error:
                raise Unavailable(f"{what}: {error or type(error).__name__}") from error
        if code >= 400:
            raise from_answer(code, body, what, retry_after)
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise Unavailable(f"{what}: the answer is no JSON ({error})") from error
        if not isinstance(answer, dict):
            raise Unavailable(f"{what}: the answer is no object")
        return answer

    async def _exchange(
        self,
        verb: str,
        method: str,
        resource: Resource,
        path: str,
        query: Mapping[str, str] | None,
        data: bytes | None,
        content_type: str,
    ) -> tuple[int, bytes, str | None]:
        """Send once. Returns (HTTP status, body, Retry-After)."""
        began, code = time.monotonic(), 0
        try:
            headers = {"Content-Type": content_type} if data is not None else {}
            async with self.open(
                method, path, query, timeout=self._timeout, data=data, headers=headers
            ) as response:
                body = await response.read()
                code = response.status
                return code, body, response.headers.get("Retry-After")
        finally:
            self.tell(verb, resource, code, time.monotonic() - began)

    def open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        *,
        timeout: aiohttp.ClientTimeout,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """An authenticated exchange whose body the caller reads; `aiohttp` errors come through."""
        if self._session is None:
            raise RuntimeError("use KubeClient as an asynchronous context manager")
        return self._session.request(
            method,
            self.config.server + path,
            params=query,
            data=data,
            headers={**(headers or {}), **self._credentials.headers()},
            ssl=self._credentials.tls(),
            server_hostname=self.config.tls_server_name,
            timeout=timeout,
            allow_redirects=False,
        )

    def tell(self, verb: str, resource: Resource, code: int, seconds: float) -> None:
        """Pass one attempt on to `on_request`."""
        if self._on_request is not None:
            self._on_request(verb, resource, code, seconds)

    def token_refused(self) -> bool:
        """Note a 401; True where the token file holds another token by now."""
        return self._credentials.refused()

    def _pause(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.retry_after_s if isinstance(error, KubeError) else None
        jittered = self._wait(state)
        return jittered if asked is None else min(asked + jittered, MAX_WAIT_S)


def selection(label_selector: str, field_selector: str) -> dict[str, str]:
    """Query parameters of a list or watch."""
    given = {"labelSelector": label_selector, "fieldSelector": field_selector}
    return {key: value for key, value in given.items() if value}


def plain(resource: Resource, item: dict[str, Any]) -> dict[str, Any]:
    """An object of a list or watch with its type and without the bookkeeping of field owners,
    which is often the larger part of it."""
    metadata = item.get("metadata")
    if isinstance(metadata, dict):
        metadata.pop("managedFields", None)
    return {"apiVersion": resource.api_version, "kind": resource.kind, **item}


def _worth_a_retry(error: BaseException, repeatable: bool) -> bool:
    if isinstance(error, TooManyRequests | _NotSent):
        return True
    return repeatable and isinstance(error, Unavailable)
