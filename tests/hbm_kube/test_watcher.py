"""What a watch remembers between two streams, without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hbm_kube.client import WatchEvent
from hbm_kube.errors import Gone, KubeError, Unavailable, from_answer
from hbm_kube.resources import CONFIGMAPS
from hbm_kube.watch import Watcher
from hypothesis import given
from hypothesis import strategies as st


def item(uid: str, version: int) -> dict[str, Any]:
    return {"metadata": {"name": f"n-{uid}", "uid": uid, "resourceVersion": str(version)}}


def line(kind: str, found: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": found}).encode()


class View:
    """What a caller knows who believes every event."""

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}

    def take(self, event: WatchEvent) -> None:
        metadata = event.object["metadata"]
        match event.type:
            case "ADDED":
                assert metadata["uid"] not in self.versions
                self.versions[metadata["uid"]] = metadata["resourceVersion"]
            case "MODIFIED":
                assert self.versions[metadata["uid"]] != metadata["resourceVersion"]
                self.versions[metadata["uid"]] = metadata["resourceVersion"]
            case "DELETED":
                del self.versions[metadata["uid"]]


steps = st.lists(
    st.tuples(st.sampled_from(["change", "delete", "miss", "list"]), st.sampled_from("abcde")),
    max_size=60,
)


@given(steps)
def test_whatever_is_missed_the_next_list_makes_up_for_it(steps: list[tuple[str, str]]) -> None:
    """`miss`: the stream is cut; until the next list nothing of what happens is heard."""
    watcher, view, hears = Watcher(CONFIGMAPS), View(), True
    there: dict[str, str] = {}
    for version, (what, uid) in enumerate(steps, start=1):
        if what == "list":
            items = [item(each, int(seen)) for each, seen in there.items()]
            for event in watcher.relisted(items, str(version)):
                view.take(event)
            hears = True
            assert view.versions == there
        elif what == "miss":
            hears = False
        elif what == "delete":
            if uid in there:
                del there[uid]
                if hears:
                    view.take(watcher.streamed(line("DELETED", item(uid, version)), "w"))
        else:
            kind = "MODIFIED" if uid in there else "ADDED"
            there[uid] = str(version)
            if hears:
                view.take(watcher.streamed(line(kind, item(uid, version)), "w"))
        if hears:
            assert view.versions == there


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "object", "metadata", "uid"]), inner, max_size=3)
    ),
)


@given(st.binary(max_size=60) | anything.map(lambda value: json.dumps(value).encode()))
def test_any_line_is_an_event_or_a_failure(garbage: bytes) -> None:
    watcher, said = Watcher(CONFIGMAPS), ""
    try:
        said = watcher.streamed(garbage, "watch x").type
    except KubeError as error:
        said = str(error)
    assert said in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK") or said.startswith("watch x: ")


@pytest.mark.parametrize(("code", "kind"), [(410, Gone), (500, Unavailable), (504, Unavailable)])
def test_an_error_of_the_stream_says_what_it_means(code: int, kind: type[KubeError]) -> None:
    error = line("ERROR", {"kind": "Status", "code": code, "message": "too old"})
    with pytest.raises(kind, match="too old") as caught:
        Watcher(CONFIGMAPS).streamed(error, "watch x")
    assert caught.value.code == code


@given(st.integers(400, 599), st.binary(max_size=80), st.none() | st.text(max_size=8))
def test_any_answer_is_an_error_with_its_code(
    code: int, body: bytes, retry_after: str | None
) -> None:
    error = from_answer(code, body, "get x", retry_after)
    assert str(error).startswith("get x: ")
    assert error.retry_after_s is None or 0.0 <= error.retry_after_s < float("inf")
