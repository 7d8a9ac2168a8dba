"""A real HTTPS proxy in front of a real API server that misbehaves on request.

    with FaultProxy(api_server) as proxy:
        proxy.answer(429, method="PATCH", retry_after_s=1)    # once, instead of passing it on
        proxy.hang(path="/status$")                           # never answers
        proxy.drop(after=True)                                # done, but the answer gets lost
        proxy.silence()                                       # watches stay open and say nothing
        client = KubeClient(proxy.config())                   # cluster administrator

It runs in a thread of its own, so that tests with and without an event loop, and processes
(`proxy.kubeconfig(path)`, `proxy.environment()`), can use it. Requests that carry a token are
passed on with it, others as cluster administrator.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import ssl
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import aiohttp
from aiohttp import web
from hbm_e2e.api_server import ApiServer
from hbm_kube.config import KubeConfig

_HOP_BY_HOP = frozenset(
    ("connection", "content-length", "host", "keep-alive", "te", "transfer-encoding", "upgrade")
)


async def eventually(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    """Let the event loop run until `condition` holds."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - what is waited for is no part of this process
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"waited {timeout_s:g} s for {what}") from None


class Seen(NamedTuple):
    """One request that came by."""

    method: str
    """The HTTP method, or WATCH."""
    path: str
    query: dict[str, str]
    body: bytes
    authorization: str
    code: int
    """What was answered; 0: nothing."""


@dataclasses.dataclass
class _Fault:
    action: str
    times: int
    method: str
    path: re.Pattern[str]
    code: int = 0
    retry_after_s: float | None = None


class FaultProxy:
    """Listens on a free loopback port between `with` and its end."""

    def __init__(self, server: ApiServer) -> None:
        self.seen: list[Seen] = []
        """Every request, in the order of their answers."""
        self._server = server
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._streams: set[asyncio.Transport] = set()
        self._loud = asyncio.Event()
        self._loud.set()
        self._hanging = asyncio.Event()
        self._port = 0

    # -- faults ----------------------------------------------------------------------------------

    def answer(
        self,
        code: int,
        *,
        times: int = 1,
        method: str = "",
        path: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        """The next `times` requests that match are answered with a Status of that code.

        `method`: GET, POST, PATCH, PUT, DELETE or WATCH, empty: any. `path`: a regular expression
        that is searched in path and query.
        """
        self._add(_Fault("answer", times, method, re.compile(path), code, retry_after_s))

    def hang(self, *, times: int = 1, method: str = "", path: str = "") -> None:
        """The next that match get no answer; they are not passed on."""
        self._add(_Fault("hang", times, method, re.compile(path)))

    def drop(
        self, *, times: int = 1, method: str = "", path: str = "", after: bool = False
    ) -> None:
        """The connection of the next that match is cut, before or `after` they were passed on."""
        action = "drop-after" if after else "drop"
        self._add(_Fault(action, times, method, re.compile(path)))

    def silence(self) -> None:
        """Open and new watches say nothing until `speak`; what they missed comes then."""
        self._call(self._loud.clear)

    def speak(self) -> None:
        """End of `silence`."""
        self._call(self._loud.set)

    def cut(self) -> None:
        """Abort the connections of all open watches."""

        def abort() -> None:
            for transport in list(self._streams):
                transport.abort()

        self._call(abort)

    def clear(self) -> None:
        """No faults from here on."""
        with self._lock:
            self._faults.clear()
        self.speak()

    def count(self, method: str = "", path: str = "", code: int | None = None) -> int:
        """How many requests came by that match."""
        return sum(
            (not method or seen.method == method)
            and re.search(path, seen.path) is not None
            and (code is None or seen.code == code)
            for seen in list(self.seen)
        )

    # -- how to reach it -------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """https://127.0.0.1:PORT; its certificate is signed by the cluster's authority."""
        return f"https://127.0.0.1:{self._port}"

    def config(self, **fields: Any) -> KubeConfig:
        """A client configuration without identity of its own: cluster administrator."""
        return KubeConfig(server=self.url, ca_file=self._server.ca_certificate, **fields)

    def kubeconfig(self, path: Path) -> Path:
        """A kubeconfig file of the cluster administrator."""
        pki = self._server.control_plane.pki
        return pki.kubeconfig(path, self.url, pki.issue("admin", "/O=system:masters/CN=admin"))

    def environment(self) -> dict[str, str]:
        """What a pod finds in its environment."""
        return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self._port)}

    def token_dir(self, path: Path, token: str, namespace: str = "default") -> Path:
        """A directory as a projected volume has it: token, ca.crt, namespace."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "ca.crt").write_bytes(self._server.ca_certificate.read_bytes())
        (path / "namespace").write_text(namespace)
        (path / "token").write_text(token)
        return path

    # -- its life --------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._thread.start()
        self._await(self._start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()
        self._await(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        pki = self._server.control_plane.pki
        own = pki.issue("fault-proxy", "/CN=fault-proxy", ["IP:127.0.0.1", "DNS:localhost"])
        listening = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        listening.load_cert_chain(own.certificate, own.key)
        ca = self._server.ca_certificate
        self._as_given = ssl.create_default_context(cafile=ca)
        admin = pki.issue("admin", "/O=system:masters/CN=admin")
        self._as_admin = ssl.create_default_context(cafile=ca)
        self._as_admin.load_cert_chain(admin.certificate, admin.key)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )
        self._web = web.Server(self._handle)
        self._listener = await self._loop.create_server(
            self._web, "127.0.0.1", 0, ssl=listening, backlog=1024
        )
        self._port = self._listener.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._hanging.set()
        self._listener.close()
        for transport in list(self._streams):
            transport.abort()
        await self._web.shutdown(timeout=1.0)
        await self._session.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _await(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def _call(self, action: Any) -> None:
        async def do() -> None:
            action()

        self._await(do())

    def _add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _next_fault(self, method: str, target: str) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.method in ("", method) and fault.path.search(target):
                    fault.times -= 1
                    if fault.times <= 0:
                        self._faults.remove(fault)
                    return fault
        return None

    # -- one request -----------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        method = "WATCH" if request.query.get("watch") in ("true", "1") else request.method
        body = await request.read()
        seen = Seen(
            method,
            request.path,
            dict(request.query),
            body,
            request.headers.get("Authorization", ""),
            0,
        )
        fault = self._next_fault(method, request.path_qs)
        if fault is not None and fault.action != "drop-after":
            return await self._misbehave(request, fault, seen)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP}
        try:
            async with self._session.request(
                request.method,
                self._server.url + request.raw_path,
                headers=headers,
                data=body or None,
                ssl=self._as_given if "Authorization" in request.headers else self._as_admin,
                allow_redirects=False,
            ) as upstream:
                if fault is not None:
                    await upstream.read()
                    return self._abort(request, seen)
                self.seen.append(seen._replace(code=upstream.status))
                return await self._pass_on(request, upstream, streams=method == "WATCH")
        except aiohttp.ClientError:
            return self._abort(request, seen)  # the API server is away, and so are we

    async def _misbehave(
        self, request: web.BaseRequest, fault: _Fault, seen: Seen
    ) -> web.StreamResponse:
        if fault.action == "answer":
            self.seen.append(seen._replace(code=fault.code))
            status = {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "message": f"injected {fault.code}",
                "code": fault.code,
            }
            headers = (
                {} if fault.retry_after_s is None else {"Retry-After": f"{fault.retry_after_s:g}"}
            )
            return web.json_response(status, status=fault.code, headers=headers)
        if fault.action == "hang":
            self.seen.append(seen)
            await self._hanging.wait()
        return self._abort(request, seen, note=fault.action != "hang")

    def _abort(self, request: web.BaseRequest, seen: Seen, note: bool = True) -> web.Response:
        if note:
            self.seen.append(seen)
        if request.transport is not None:
            request.transport.abort()  # type: ignore[attr-defined]
        return web.Response(status=502)

    async def _pass_on(
        self, request: web.BaseRequest, upstream: aiohttp.ClientResponse, streams: bool
    ) -> web.StreamResponse:
        headers = {k: v for k, v in upstream.headers.items() if k.lower() not in _HOP_BY_HOP}
        if not streams:
            content = await upstream.read()
            return web.Response(status=upstream.status, headers=headers, body=content)
        response = web.StreamResponse(status=upstream.status, headers=headers)
        transport = request.transport
        assert isinstance(transport, asyncio.Transport)
        self._streams.add(transport)
        try:
            await response.prepare(request)
            async for chunk in upstream.content.iter_any():
                await self._loud.wait()
                await response.write(chunk)
        except ConnectionError:
            pass  # the client has gone
        finally:
            self._streams.discard(transport)
        return response
