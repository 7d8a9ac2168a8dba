"""A list that stays up to date: list, watch, and whatever it takes to go on.

The stream of one watch ends all the time: the server closes it every few minutes, connections are
cut or fall silent, old versions are compacted away (410). None of that reaches the caller, who sees
one endless sequence of events in which nothing is missing.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final

import aiohttp
import orjson

from hbm_kube.client import KubeClient, WatchEvent, plain, selection
from hbm_kube.errors import Gone, KubeError, Unavailable, from_answer, from_status
from hbm_kube.resources import Resource

SERVER_TIMEOUT_S: Final = (240, 360)
"""The server ends each stream after a random time in between, so that not all come back at once."""
BACKOFF_S: Final = (0.2, 30.0)
"""First and last upper end of the wait after a failure; full jitter."""
PROVEN_S: Final = 30.0
"""A stream that lived so long has worked, even if nothing happened."""
RELIST_AFTER: Final = 3
"""Streams failed in a row until the version itself is distrusted: a server that was set back to an
older state waits in silence for a version that will not come."""
_TYPES: Final = ("ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR")
_REMEMBERED: Final = ("name", "namespace", "uid", "labels", "ownerReferences")


class Watcher:
    """The state between two streams: which objects are known, and up to which version."""

    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        self._known: dict[str, tuple[str, dict[str, Any]]] = {}
        """Version and some metadata by uid: what comes back under the same name is another one."""
        self.version = ""
        """Where the next stream begins; empty: list first."""
        self.heard = 0
        """Lines of streams so far."""

    def relisted(self, items: list[dict[str, Any]], version: str) -> list[WatchEvent]:
        """What a list says that was not known; the vanished first, `SYNCED` last."""
        uids = {item["metadata"]["uid"] for item in items}
        events = [
            WatchEvent("DELETED", self._forget(uid)) for uid in list(self._known) if uid not in uids
        ]
        for item in items:
            metadata = item["metadata"]
            uid = metadata["uid"]
            if uid not in self._known:
                events.append(WatchEvent("ADDED", item))
            elif self._known[uid][0] != metadata["resourceVersion"]:
                events.append(WatchEvent("MODIFIED", item))
            self._remember(item)
        self.version = version
        events.append(WatchEvent("SYNCED", {"metadata": {"resourceVersion": version}}))
        return events

    def streamed(self, line: bytes, what: str) -> WatchEvent:
        """One line of a stream. Raises what an ERROR event means (`Gone`: list again)."""
        try:
            event = orjson.loads(line)
            kind, item = event["type"], event["object"]
            if kind not in _TYPES:
                raise KeyError(kind)
            if kind == "ERROR":
                raise from_status(item, 500, what)
            self.version = item["metadata"]["resourceVersion"]
            self.heard += 1
            if kind == "BOOKMARK":
                return WatchEvent(kind, item)
            item = plain(self.resource, item)
            if kind == "DELETED":
                self._known.pop(item["metadata"]["uid"], None)
            else:
                self._remember(item)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise Unavailable(f"{what}: a line that is no event ({error!r})") from error
        return WatchEvent(kind, item)

    def _remember(self, item: dict[str, Any]) -> None:
        metadata = item["metadata"]
        kept = {key: metadata[key] for key in _REMEMBERED if key in metadata}
        self._known[metadata["uid"]] = metadata["resourceVersion"], kept

    def _forget(self, uid: str) -> dict[str, Any]:
        return {
            "apiVersion": self.resource.api_version,
            "kind": self.resource.kind,
            "metadata": self._known.pop(uid)[1],
        }


async def watch(
    client: KubeClient,
    resource: Resource,
    namespace: str | None,
    label_selector: str,
    field_selector: str,
    *,
    inactivity_s: float,
    on_failure: Callable[[KubeError], None] | None,
) -> AsyncGenerator[WatchEvent, None]:
    """Events of a selection, for ever.

    `SYNCED` ends each list: from then on the caller has seen all there is. An object that vanished
    unseen comes as DELETED with metadata only (name, namespace, uid, labels, ownerReferences).
    BOOKMARK says that the stream lives; there is one after each (re)connection as well.

    Args:
        client: opened.
        resource: what to watch.
        namespace: None: all of them.
        label_selector: as the API writes it.
        field_selector: likewise.
        inactivity_s: a stream without any event (bookmarks come once a minute) for so long is dead.
        on_failure: told of each failure before the back-off, whatever its kind (no connection,
            403, no such resource); may raise to end the watch.
    """
    watcher = Watcher(resource)
    path = resource.path(namespace)
    selected = selection(label_selector, field_selector)
    failures = 0
    while True:
        began, heard, resumes = time.monotonic(), watcher.heard, bool(watcher.version)
        try:
            if not resumes:
                found = await client.list(resource, namespace, label_selector, field_selector)
                for event in watcher.relisted(found.items, found.resource_version):
                    yield event
            stream = _stream(client, watcher, path, selected, inactivity_s)
            async with aclosing(stream):
                async for event in stream:
                    yield event
            # Ended in order. Many watchers must not come back within the same millisecond.
            await asyncio.sleep(random.uniform(0.0, 1.0))
            failures = 0
        except KubeError as error:
            worked = watcher.heard > heard or time.monotonic() - began > PROVEN_S
            failures = 1 if worked else failures + 1
            if isinstance(error, Gone) or failures % RELIST_AFTER == 0:
                watcher.version = ""
            if isinstance(error, Gone) and resumes:
                continue  # time has passed, that is all
            if on_failure is not None:
                on_failure(error)
            await asyncio.sleep(_pause_s(failures, error))


def _pause_s(failures: int, error: KubeError) -> float:
    first, last = BACKOFF_S
    jittered = random.uniform(0.0, min(first * 2.0 ** min(failures, 16), last))
    return min((error.retry_after_s or 0.0) + jittered, last)


async def _stream(
    client: KubeClient,
    watcher: Watcher,
    path: str,
    selected: dict[str, str],
    inactivity_s: float,
) -> AsyncGenerator[WatchEvent, None]:
    """One stream, from `watcher.version` to its end. Raises `KubeError`."""
    what = f"watch {path}"
    query = selected | {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": watcher.version,
        "timeoutSeconds": str(random.randint(*SERVER_TIMEOUT_S)),
    }
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=inactivity_s)
    began, code = time.monotonic(), 0
    try:
        async with client.open("GET", path, query, timeout=timeout) as response:
            code = response.status
            client.tell("watch", watcher.resource, code, time.monotonic() - began)
            if code != 200:
                if code == 401:
                    client.token_refused()
                body = await response.read()
                raise from_answer(code, body, what, response.headers.get("Retry-After"))
            yield WatchEvent("BOOKMARK", {"metadata": {"resourceVersion": watcher.version}})
            rest = b""
            # By chunks: aiohttp's own lines are limited in length, objects are not.
            async for chunk in response.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line:
                        yield watcher.streamed(line, what)
    except TimeoutError as error:
        text = f"silent for {inactivity_s:g} s" if code else "no answer in time"
        raise Unavailable(f"{what}: {text}") from error
    except (aiohttp.ClientError, OSError) as error:
        raise Unavailable(f"{what}: {error or type(error).__name__}") from error
    finally:
        if code == 0:
            client.tell("watch", watcher.resource, 0, time.monotonic() - began)
