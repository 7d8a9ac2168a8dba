"""`/v1/rank` over a real socket: right answers, and a named 4xx for everything else."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hbm_pool.contracts import headers as names
from hbm_serving.config import Config
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

GOOD: dict[str, Any] = {
    "history": {"items": [1, 2, 3], "timestamps": [10, 20, 20], "actions": [0, 1, 3]},
    "candidates": [4, 5],
    "query_time": 30,
}


def changed(**change: Any) -> dict[str, Any]:
    """GOOD with `history__items=…` or `candidates=…` replaced; `...` removes a key."""
    body: dict[str, Any] = json.loads(json.dumps(GOOD))
    for path, value in change.items():
        *folders, key = path.split("__")
        target = body
        for folder in folders:
            target = target[folder]
        if value is ...:
            del target[key]
        else:
            target[key] = value
    return body


def test_scores_and_headers(client: httpx.Client, reference: Any) -> None:
    answer = client.post("/v1/rank", json=GOOD, headers={"X-User-ID": "http-1"})
    assert answer.status_code == 200
    body = answer.json()
    expected = reference.score([1, 2, 3], [10, 20, 20], [4, 5], [0, 1, 3], 30)
    np.testing.assert_allclose(body["scores"], expected, atol=1e-5)
    assert body["model"] == "hbm-tiny"
    assert answer.headers[names.HISTORY_TOKENS] == "3"
    assert answer.headers[names.CANDIDATES] == "2"
    assert answer.headers[names.ROWS_LOOKED_UP] == "10"
    for name in (
        names.KV_REUSED_TOKENS,
        names.ROWS_MISSED,
        names.SERVICE_MS,
        names.QUEUE_MS,
        names.ALPHA,
        names.MODEL_VERSION,
        names.KV_ROW_LAG_S,
    ):
        assert float(answer.headers[name]) >= 0.0


def test_optional_parts_may_be_absent(client: httpx.Client, reference: Any) -> None:
    body = changed(history__actions=..., query_time=...)
    answer = client.post("/v1/rank", json=body, headers={"X-Request-ID": "r-1"})
    expected = reference.score([1, 2, 3], [10, 20, 20], [4, 5])
    np.testing.assert_allclose(answer.json()["scores"], expected, atol=1e-5)
    assert answer.headers[names.REQUEST_ID] == "r-1"
    empty = changed(history__items=[], history__timestamps=[], history__actions=[])
    assert client.post("/v1/rank", json=empty).status_code == 200


def test_old_blocks_of_a_long_history_are_dropped(
    client: httpx.Client, config: Config, reference: Any
) -> None:
    tokens = config.model.max_sequence_tokens + 5
    items = list(range(tokens))
    body = {"history": {"items": items, "timestamps": items}, "candidates": [1]}
    answer = client.post("/v1/rank", json=body)
    np.testing.assert_allclose(
        answer.json()["scores"], reference.score(items, items, [1]), atol=1e-5
    )
    assert answer.headers[names.HISTORY_TOKENS] == str(tokens)
    assert answer.json()["history_tokens"] == tokens - config.model.drop_block_tokens


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (changed(candidates=...), "candidates"),
        (changed(candidates=[]), "candidates"),
        (changed(candidates=list(range(17))), "candidates"),
        (changed(candidates=[8000]), "candidates[0]"),
        (changed(candidates=[-1]), "candidates[0]"),
        (changed(candidates=[1, 2**70]), "candidates[1]"),
        (changed(candidates="4"), "candidates"),
        (changed(history=...), "history"),
        (changed(history=None), "history"),
        (changed(history__items=...), "history.items"),
        (changed(history__items=[1, 2, "3"]), "history.items[2]"),
        (changed(history__items=[1, 2, True]), "history.items[2]"),
        (changed(history__items=[1, 2, 3.0]), "history.items[2]"),
        (changed(history__items=[1, None, 3]), "history.items[1]"),
        (changed(history__items=[1, 2, 9999]), "history.items[2]"),
        (changed(history__items=[1, 2]), "history.timestamps"),
        (changed(history__timestamps=[10, 30, 20]), "history.timestamps[2]"),
        (changed(history__timestamps=[10, 20, -1]), "history.timestamps[2]"),
        (changed(history__timestamps=[10, 20, 2**53]), "history.timestamps[2]"),
        (changed(history__actions=[0, 1]), "history.actions"),
        (changed(history__actions=[0, 1, 4]), "history.actions[2]"),
        (changed(history__items=list(range(513))), "history.items"),
        (changed(query_time="now"), "query_time"),
        (changed(query_time=1.5), "query_time"),
        (changed(extra=1), "extra"),
        (changed(history__colour=1), "history.colour"),
        ([GOOD], "body"),
        ("text", "body"),
    ],
)
def test_bad_fields_are_named(client: httpx.Client, body: Any, field: str) -> None:
    answer = client.post("/v1/rank", json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == field
    assert answer.json()["error"]["message"]
    assert answer.json()["error"]["reason"] == "bad_request"


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"{} {}", b"nan", b"[" * 5000])
def test_bad_json_is_a_400(client: httpx.Client, raw: bytes) -> None:
    answer = client.post("/v1/rank", content=raw)
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == "body"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(client: httpx.Client, number: str) -> None:
    raw = json.dumps(GOOD).replace("30", number)
    answer = client.post("/v1/rank", content=raw)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["field"]


@pytest.mark.parametrize(
    ("header", "value", "field"),
    [
        ("X-User-ID", "", names.USER_ID),
        ("X-User-ID", "u" * 257, names.USER_ID),
        ("X-User-ID", b"\xff\xfe", names.USER_ID),
        ("X-HBM-Deadline-MS", "soon", names.DEADLINE_MS),
        ("X-HBM-Deadline-MS", "-1", names.DEADLINE_MS),
        ("X-HBM-Deadline-MS", "nan", names.DEADLINE_MS),
    ],
)
def test_bad_headers_are_a_400(
    client: httpx.Client, header: str, value: str | bytes, field: str
) -> None:
    raw = value if isinstance(value, bytes) else value.encode()
    answer = client.post("/v1/rank", json=GOOD, headers=[(header.encode(), raw)])
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == field


def test_bodies_are_bounded_before_they_are_read(
    client: httpx.Client, server: Any, config: Config
) -> None:
    limit = config.server.max_body_bytes
    with server.connect() as raw:
        raw.sendall(
            b"POST /v1/rank HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (limit + 1)
        )
        assert b" 413 " in raw.recv(65536).split(b"\r\n")[0]

    def endless() -> Any:
        for _ in range(limit // 65536 + 2):
            yield b" " * 65536

    answer = client.post("/v1/rank", content=endless())
    assert answer.status_code == 413
    assert answer.json()["error"]["field"] == "body"
    squeezed = client.post("/v1/rank", content=b"x", headers={"Content-Encoding": "gzip"})
    assert squeezed.status_code == 415


def test_a_slow_client_is_dropped_and_blocks_nobody(
    start_server: Callable[[Config], Any], config: Config
) -> None:
    hasty = config.model_copy(
        update={"server": config.server.model_copy(update={"body_timeout_s": 0.3})}
    )
    server = start_server(hasty)
    with server.connect() as slow, httpx.Client(base_url=server.url) as client:
        slow.sendall(b"POST /v1/rank HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert client.post("/v1/rank", json=GOOD).status_code == 200
        answer = b""
        while part := slow.recv(65536):  # until the server closes the connection
            answer += part
        assert b" 408 " in answer.split(b"\r\n")[0]
        assert b"1 bytes came" in answer
    server.stop()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000, 431),
        (b"GET /" + b"y" * 200_000, 431),
        (b"\x00\x01\x02 nonsense\r\n\r\n", 400),
        (b"POST /v1/rank HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n", 400),
    ],
)
def test_heads_are_bounded(server: Any, sent: bytes, status: int) -> None:
    with server.connect() as raw:
        raw.sendall(sent)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := raw.recv(65536):
                answer += part
    assert answer.split(b" ")[1] == str(status).encode()
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["field"] == "head"


def test_heads_that_never_end_are_cut(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbm_serving.connection.HEAD_S", 0.2)
    with server.connect() as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 408 ")
        assert raw.recv(65536) == b""


def test_unknown_paths_and_methods_answer_in_our_form(client: httpx.Client) -> None:
    assert client.get("/v1/nothing").json()["error"]["field"] == "path"
    wrong = client.get("/v1/rank")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["field"] == "method"


def test_clients_that_go_away_leave_the_server_working(client: httpx.Client, server: Any) -> None:
    raw = json.dumps(GOOD).encode()
    for cut in (len(raw), len(raw) // 2, 0):
        with server.connect() as gone:
            head = b"POST /v1/rank HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw)
            gone.sendall(head + raw[:cut])
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert client.post("/v1/rank", json=GOOD).status_code == 200


def test_overload_is_refused_and_what_was_accepted_is_served(
    start_server: Callable[[Config], Any], config: Config
) -> None:
    small = config.model_copy(update={"server": config.server.model_copy(update={"max_queue": 3})})
    server = start_server(small)
    with httpx.Client(base_url=server.url, timeout=30) as client, ThreadPoolExecutor(8) as threads:
        with server.held():
            waiting = [threads.submit(client.post, "/v1/rank", json=GOOD) for _ in range(3)]
            wait_until(lambda: server.engine.queue.depth == 3)
            refused = client.post("/v1/rank", json=GOOD)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.headers[names.DROPPED_REASON] == "queue_full"
            assert refused.json()["error"]["field"] == "server"
        assert [answer.result().status_code for answer in waiting] == [200] * 3
        assert b"hbm_serving_overloads_total 1.0" in client.get("/metrics").content
    server.stop()


def test_a_request_that_waits_past_its_deadline_is_refused(server: Any) -> None:
    with httpx.Client(base_url=server.url, timeout=30) as client, ThreadPoolExecutor(1) as threads:
        with server.held():
            late = threads.submit(
                client.post, "/v1/rank", json=GOOD, headers={"X-HBM-Deadline-MS": "1"}
            )
            wait_until(lambda: server.engine.queue.depth == 1)
            arrived_s = time.perf_counter()
            wait_until(lambda: time.perf_counter() > arrived_s + 0.002)
        answer = late.result()
    assert answer.status_code == 503
    assert answer.headers[names.DROPPED_REASON] == "deadline"


def test_drain_finishes_what_is_in_flight(
    start_server: Callable[[Config], Any], config: Config
) -> None:
    server = start_server(config)
    with httpx.Client(base_url=server.url, timeout=30) as client, ThreadPoolExecutor(1) as threads:
        assert client.get("/readyz").status_code == 200
        with server.held():
            waiting = threads.submit(client.post, "/v1/rank", json=GOOD)
            wait_until(lambda: server.engine.queue.depth == 1)
            server.engine.drain()
            with httpx.Client(base_url=server.url) as probe:
                not_ready = probe.get("/readyz")
                assert not_ready.status_code == 503
                assert not_ready.json()["state"] == "draining"
                assert probe.get("/healthz").status_code == 200
                assert probe.get("/v2/health/ready").status_code == 503
            stopper = threading.Thread(target=server.stop)
            stopper.start()
        assert waiting.result().status_code == 200
        stopper.join(30)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/healthz")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(raw=st.binary(max_size=200))
def test_random_bytes_never_break_it(client: httpx.Client, raw: bytes) -> None:
    answer = client.post("/v1/rank", content=raw)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["field"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["history", "items", "timestamps", "candidates", "query_time", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(body=_JSON)
def test_random_json_never_breaks_it(client: httpx.Client, body: Any) -> None:
    answer = client.post("/v1/rank", content=json.dumps(body))
    assert answer.status_code in (200, 400, 422)
    assert answer.status_code == 200 or answer.json()["error"]["message"]


def test_openapi_is_kept(server: Any) -> None:
    """Whatever the document allows or forbids, answers are the documented ones."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen: set[int] = set()

    @settings(max_examples=60, deadline=None, phases=[Phase.generate], database=None)
    @given(case=schema["/v1/rank"]["POST"].as_strategy())
    def rank(case: Any) -> None:
        answer = case.call(base_url=server.url)
        seen.add(answer.status_code)
        assert answer.status_code < 500 or answer.headers[names.DROPPED_REASON] == ["deadline"]
        case.validate_response(
            answer, checks=[response_schema_conformance, status_code_conformance]
        )

    rank()
    assert 200 in seen


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Polls; fails after `seconds`."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.002)):
        if condition():
            return
        pause.wait(0.002)
    raise AssertionError("the condition did not come true")
