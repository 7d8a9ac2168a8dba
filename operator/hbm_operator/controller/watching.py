"""kopf as the source of events, and of nothing else: no handler of it writes, waits or retries.

Each event is taken over into the store and names keys; kopf keeps its hands off the objects (no
finalizers, no annotations, no events of its own).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import aiohttp
import kopf
from hbm_kube.config import KubeConfig
from hbm_kube.credentials import Credentials
from hbm_kube.resources import HBM_PARTITIONS, HBM_POLICIES, NAMESPACES, PODS, Resource
from kopf._core.reactor import inventory

from hbm_operator import names

OnEvent = Callable[[Resource, str, dict[str, Any]], None]
"""(resource, event type or "" for a first listing, object)."""

WATCHED: Final = (PODS, HBM_POLICIES, HBM_PARTITIONS, NAMESPACES)
INJECTED: Final = f"{names.INJECTED}=true"


class Patience:
    """Waits between tries of kopf's requests: for ever, up to half a minute each. What never
    answers is seen by the probes."""

    def __iter__(self) -> Iterator[float]:
        wait_s = 0.5
        while True:
            yield wait_s
            wait_s = min(30.0, wait_s * 2)


class _Forgetful(inventory.ResourceMemories):  # type: ignore[misc]
    """kopf keeps some 8 kB per object for handlers that wait and retry; ours do neither."""

    async def recall(self, *args: Any, **kwargs: Any) -> Any:
        return await super().recall(*args, **kwargs | {"ephemeral": True})


def settings() -> kopf.OperatorSettings:
    """kopf's settings (reference: kopf docs/configuration.rst)."""
    made = kopf.OperatorSettings()
    made.watching.server_timeout = 600
    made.watching.client_timeout = 660
    made.watching.connect_timeout = 10
    made.watching.reconnect_backoff = 1
    made.watching.chunk_size = 500
    made.watching.label_selectors["v1/pods"] = INJECTED
    made.networking.request_timeout = 30
    made.networking.error_backoffs = Patience()
    # Each object that an event is about has a task for so long: short, as there are thousands.
    made.queueing.idle_timeout = 0.2
    made.posting.enabled = False
    made.posting.level = logging.WARNING
    made.scanning.disabled = True
    made.peering.standalone = True
    made.persistence.finalizer = f"{names.GROUP}/never-set"
    made.persistence.progress_storage = kopf.AnnotationsProgressStorage(
        prefix=names.GROUP, v1=False
    )
    made.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(
        prefix=names.GROUP, v1=False
    )
    return made


def registry(config: KubeConfig, on_event: OnEvent, heard: Callable[[str], None]) -> Any:
    """Handlers of a controller of their own.

    Args:
        config: server and identity.
        on_event: takes each event over, at once.
        heard: told the plural of a resource whenever its watch says anything, bookmarks included.
    """
    made = kopf.OperatorRegistry()

    def watch(resource: Resource) -> None:
        async def handler(event: dict[str, Any], **_: Any) -> None:
            on_event(resource, event["type"] or "", dict(event["object"]))

        kopf.on.event(
            resource.group, resource.version, resource.plural, id=resource.plural, registry=made
        )(handler)

    for resource in WATCHED:
        watch(resource)

    @kopf.on.login(id="login", registry=made)  # type: ignore[untyped-decorator]
    async def login(**_: Any) -> kopf.AiohttpSession:
        # Asked again when the server refuses a token: by then the file holds the next one.
        credentials = Credentials(config)
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=credentials.tls()),
            headers={"User-Agent": "hbm-controller", **credentials.headers()},
            response_class=_observed(heard),
        )
        return kopf.AiohttpSession(server=config.server, aiohttp_session=session)

    return made


class _ObservedContent:
    """Content of a response whose arrival is told."""

    def __init__(self, content: aiohttp.StreamReader, told: Callable[[], None]) -> None:
        self._content = content
        self._told = told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, size: int) -> Any:
        async for chunk in self._content.iter_chunked(size):
            self._told()
            yield chunk


def _observed(heard: Callable[[str], None]) -> type[aiohttp.ClientResponse]:
    """kopf keeps bookmarks to itself; they are seen on their way to it."""

    class ObservedResponse(aiohttp.ClientResponse):
        async def start(self, connection: Any) -> aiohttp.ClientResponse:
            response = await super().start(connection)
            plural = self.url.path.rsplit("/", 1)[-1]
            if self.status == 200:
                heard(plural)
                if "watch" in self.url.query:
                    self.content = _ObservedContent(  # type: ignore[assignment]
                        self.content, lambda: heard(plural)
                    )
            return response

    return ObservedResponse


class Watching:
    """kopf in a thread and event loop of its own: it ends all tasks that were begun after its own.

    Args:
        config: server and identity.
        namespaces: to watch; empty: all.
        on_event: called in the event loop that `run` runs in.
        heard: called from kopf's thread.
    """

    def __init__(
        self,
        config: KubeConfig,
        namespaces: tuple[str, ...],
        on_event: OnEvent,
        heard: Callable[[str], None],
    ) -> None:
        self._config = config
        self._where: dict[str, Any] = (
            {"namespaces": namespaces} if namespaces else {"clusterwide": True}
        )
        self._on_event = on_event
        self._heard = heard
        self._stop = threading.Event()

    async def run(self) -> None:
        """Bring events until cancelled. Raises `WatchEnded` when the API server says something
        after which nothing can be watched, such as that a resource is gone."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[BaseException | None] = loop.create_future()

        def hand_over(resource: Resource, kind: str, item: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(self._on_event, resource, kind, item)

        def watch() -> None:
            error: BaseException | None = None

            def tell() -> None:
                if not ended.done():
                    ended.set_result(error)

            try:
                kopf.run(
                    registry=registry(self._config, hand_over, self._heard),
                    settings=settings(),
                    memories=_Forgetful(),
                    stop_flag=self._stop,
                    **self._where,
                )
            except BaseException as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop has gone before us
                loop.call_soon_threadsafe(tell)

        threading.Thread(target=watch, name="kopf", daemon=True).start()
        try:
            error = await ended
        finally:
            self._stop.set()
        raise WatchEnded(f"the watches have ended: {error or 'without an error'}") from error


class WatchEnded(Exception):
    """Nothing can be watched any more; start anew."""
