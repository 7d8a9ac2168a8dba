"""Backends in a cluster: the endpoints of one Service, followed by its EndpointSlices.

A backend's name is the uid of its pod, as the sidecar there publishes it; addresses come and go.
Ready endpoints get requests. One that terminates leaves the list at once: what is in flight on it
goes on, new requests go elsewhere. Only where none is ready, those that terminate and still serve
stand in (as kube-proxy does). An outage of the API leaves the list as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from enum import IntEnum
from typing import Any, Final, NamedTuple

import structlog
from hbm_kube.client import KubeClient
from hbm_kube.config import KubeConfig
from hbm_kube.errors import KubeError
from hbm_kube.resources import ENDPOINT_SLICES

from hbm_router.discovery import MAX_BACKENDS, Backend
from hbm_router.metrics import RouterMetrics

SERVICE_LABEL: Final = "kubernetes.io/service-name"
FIRST_LIST_S: Final = 5.0
"""The router starts without backends when the API has not answered by then."""
_FAMILIES: Final = ("IPv4", "IPv6")


class State(IntEnum):
    """What an endpoint is good for, worst first."""

    NOT_READY = 0
    DRAINING = 1
    """It terminates and still serves."""
    READY = 2


class Endpoint(NamedTuple):
    """One pod behind the Service."""

    backend: Backend
    state: State
    family: str


def port_of(slice_ports: Iterable[Mapping[str, Any]] | None, wanted: str) -> int | None:
    """The port on the pods: by name, or by number.

    A number that no port of the slice has is that of the Service, if there is only one port.
    """
    ports = [
        port
        for port in slice_ports or ()
        if port.get("protocol", "TCP") == "TCP" and port.get("port")
    ]
    if not wanted.isdigit():
        named = [int(port["port"]) for port in ports if port.get("name") == wanted]
        return named[0] if named else None
    number = int(wanted)
    if not ports or any(port["port"] == number for port in ports):
        return number
    return int(ports[0]["port"]) if len(ports) == 1 else None


def endpoints_of(found: Mapping[str, Any], wanted_port: str) -> list[Endpoint]:
    """The endpoints of one EndpointSlice that can be named and addressed."""
    family = found.get("addressType", "")
    port = port_of(found.get("ports"), wanted_port)
    if family not in _FAMILIES or port is None:
        return []
    endpoints = []
    for entry in found.get("endpoints") or ():
        addresses = entry.get("addresses") or ()
        if not addresses:
            continue
        # Where the API says nothing it means ready (discovery.k8s.io/v1).
        conditions = entry.get("conditions") or {}
        ready = conditions.get("ready") is not False
        serving = conditions.get("serving")
        if conditions.get("terminating"):
            still = ready if serving is None else serving
            state = State.DRAINING if still else State.NOT_READY
        else:
            state = State.READY if ready else State.NOT_READY
        uid = (entry.get("targetRef") or {}).get("uid")
        name = uid or addresses[0].replace(":", "-")
        endpoints.append(Endpoint(Backend(name, addresses[0], port), state, family))
    return endpoints


def merged(endpoints: Iterable[Endpoint]) -> list[Endpoint]:
    """One endpoint per pod, by name. A pod stands in a slice of each family, and for a moment in
    two of one family: its best state counts, then IPv4."""
    best: dict[str, Endpoint] = {}
    for endpoint in endpoints:
        known = best.get(endpoint.backend.name)
        if known is None or _rank(endpoint) > _rank(known):
            best[endpoint.backend.name] = endpoint
    return [best[name] for name in sorted(best)]


def _rank(endpoint: Endpoint) -> tuple[int, int]:
    return endpoint.state, -_FAMILIES.index(endpoint.family)


def usable(endpoints: Iterable[Endpoint]) -> tuple[Backend, ...]:
    """Those that may get requests."""
    listed = list(endpoints)
    for state in (State.READY, State.DRAINING):
        chosen = tuple(each.backend for each in listed if each.state is state)
        if chosen:
            return chosen
    return ()


class EndpointSliceDiscovery:
    """A `Discovery` by a watch of EndpointSlices.

    Args:
        config: the API server and our identity.
        service: name of the Service.
        namespace: of the Service.
        port: name or number of the port on the pods.
        metrics: counted into.
        ended: gets the watching task when it ends, which it should only do by `stop`.
    """

    def __init__(
        self,
        config: KubeConfig,
        service: str,
        namespace: str,
        port: str,
        metrics: RouterMetrics,
        ended: Callable[[asyncio.Task[None]], None],
    ) -> None:
        self._config = config
        self._service = service
        self._namespace = namespace
        self._port = port
        self._metrics = metrics
        self._ended = ended
        self._log = structlog.get_logger("hbm_router").bind(service=f"{namespace}/{service}")
        self._slices: dict[str, list[Endpoint]] = {}
        """By uid of the slice."""
        self._changed: Callable[[tuple[Backend, ...]], None] | None = None
        self._told: tuple[Backend, ...] | None = None
        self._synced = asyncio.Event()
        self._due = False
        self._failures = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self, changed: Callable[[tuple[Backend, ...]], None]) -> None:
        """Returns after the first list, or without it after a few seconds."""
        self._changed = changed
        self._task = asyncio.create_task(self._follow())
        self._task.add_done_callback(self._ended)
        waiting = asyncio.create_task(self._synced.wait())
        await asyncio.wait(
            {waiting, self._task}, timeout=FIRST_LIST_S, return_when=asyncio.FIRST_COMPLETED
        )
        waiting.cancel()
        if self._synced.is_set():
            self._tell()
            return
        self._log.warning("no list of endpoints yet; serving none until there is one")
        self._told = ()
        changed(())

    async def stop(self) -> None:
        """End the watch."""
        self._changed = None
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _follow(self) -> None:
        async with KubeClient(
            self._config, on_request=self._count, user_agent="hbm-router"
        ) as kube:
            events = kube.watch(
                ENDPOINT_SLICES,
                self._namespace,
                label_selector=f"{SERVICE_LABEL}={self._service}",
                on_failure=self._failed,
            )
            async with aclosing(events):
                async for event in events:
                    self._works()
                    if event.type == "SYNCED":
                        self._synced.set()
                    elif event.type != "BOOKMARK":
                        uid = event.object["metadata"]["uid"]
                        self._slices.pop(uid, None)
                        if event.type != "DELETED":
                            self._slices[uid] = endpoints_of(event.object, self._port)
                    self._tell_soon()

    def _tell_soon(self) -> None:
        """Once for all events that come at the same moment: a list is not told bit by bit."""
        if self._synced.is_set() and not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._due = False
        endpoints = merged(each for found in self._slices.values() for each in found)
        for state in State:
            count = sum(each.state is state for each in endpoints)
            self._metrics.endpoints.labels(state.name.lower()).set(count)
        backends = usable(endpoints)
        if len(backends) > MAX_BACKENDS:
            self._log.warning("too many endpoints", found=len(backends), used=MAX_BACKENDS)
            backends = backends[:MAX_BACKENDS]
        if backends != self._told and self._changed is not None:
            self._told = backends
            self._changed(backends)

    def _failed(self, error: KubeError) -> None:
        self._failures += 1
        self._metrics.discovery_up.set(0)
        self._metrics.discovery_failures.inc()
        if self._failures == 1:
            self._log.warning("endpoints cannot be watched; the last list stays", why=str(error))

    def _works(self) -> None:
        if self._failures:
            self._log.info("endpoints are watched again", failures=self._failures)
        self._failures = 0
        self._metrics.discovery_up.set(1)

    def _count(self, verb: str, _: Any, code: int, __: float) -> None:
        self._metrics.kube_requests.labels(verb, str(code)).inc()
