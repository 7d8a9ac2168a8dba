"""Which backends exist: names and addresses, nothing about their health or load.

`Discovery` is the seam; `StaticDiscovery` (a list on the command line) is what there is outside a
cluster. A node found in Redis is matched to a backend by its name only, never by its address.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, Protocol
from urllib.parse import urlsplit

from hbm_pool.contracts.names import check_name

MAX_BACKENDS: Final = 1024


class Backend(NamedTuple):
    """One server that requests may be sent to. In a cluster `name` is the pod uid."""

    name: str
    host: str
    port: int

    @property
    def url(self) -> str:
        """`http://host:port`, IPv6 addresses in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


class Discovery(Protocol):
    """Tells the router the backends, now and whenever they change."""

    async def start(self, changed: Callable[[tuple[Backend, ...]], None]) -> None:
        """Calls `changed` on the event loop with the full list: once before it returns, then at
        each change."""

    async def stop(self) -> None:
        """After this, `changed` is not called any more."""


class StaticDiscovery:
    """The backends of the configuration; they never change."""

    def __init__(self, backends: Iterable[Backend]) -> None:
        self._backends = tuple(backends)

    async def start(self, changed: Callable[[tuple[Backend, ...]], None]) -> None:
        changed(self._backends)

    async def stop(self) -> None:
        return


def parse_backends(text: str) -> tuple[Backend, ...]:
    """`a=http://host:port,b=…` -> backends, in the given order.

    Raises `ValueError` that names the entry and says how to write it.
    """
    backends: list[Backend] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, url = entry.partition("=")
        name, url = name.strip(), url.strip()
        if not equals or not url:
            raise ValueError(f"backend {entry!r} has no address; write NAME=http://HOST:PORT")
        try:
            check_name(name)
        except ValueError as error:
            raise ValueError(f"backend name {error}") from None
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"backend {name!r}: {url!r} is not an address ({error})") from error
        if parts.scheme != "http" or not parts.hostname or parts.netloc.endswith(":"):
            raise ValueError(f"backend {name!r}: {url!r} must look like http://HOST:PORT")
        if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username:
            raise ValueError(
                f"backend {name!r}: {url!r} carries more than a host and a port; "
                "request paths are passed through unchanged"
            )
        backends.append(Backend(name, parts.hostname, 80 if port is None else port))
    names = [backend.name for backend in backends]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"backend name {twice[0]!r} is given twice; names must differ")
    if not backends:
        raise ValueError("no backend is given; write --backends NAME=http://HOST:PORT,…")
    if len(backends) > MAX_BACKENDS:
        raise ValueError(f"{len(backends)} backends are given; at most {MAX_BACKENDS} are possible")
    return tuple(backends)
