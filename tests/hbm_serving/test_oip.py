"""Open Inference Protocol v2: metadata, JSON tensors, binary tensors, errors as one string."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

INFER = "/v2/models/hbm-tiny/infer"
HEADER_LENGTH = "inference-header-content-length"


def tensor(name: str, values: list[int], **change: Any) -> dict[str, Any]:
    return {
        "name": name,
        "shape": [len(values)],
        "datatype": "INT64",
        "data": values,
    } | change


def body(**change: Any) -> dict[str, Any]:
    inputs = {
        "history_items": tensor("history_items", [1, 2, 3]),
        "history_timestamps": tensor("history_timestamps", [10, 20, 20]),
        "history_actions": tensor("history_actions", [0, 1, 3]),
        "candidates": tensor("candidates", [4, 5]),
        "query_time": tensor("query_time", [30]),
    } | change
    return {"id": "7", "inputs": [value for value in inputs.values() if value is not None]}


@pytest.fixture(scope="module")
def expected(reference: Any) -> np.ndarray:
    scores: np.ndarray = reference.score([1, 2, 3], [10, 20, 20], [4, 5], [0, 1, 3], 30)
    return scores


def test_health_and_metadata(client: httpx.Client) -> None:
    assert client.get("/v2/health/live").status_code == 200
    assert client.get("/v2/health/ready").status_code == 200
    assert "binary_tensor_data" in client.get("/v2").json()["extensions"]
    model = client.get("/v2/models/hbm-tiny").json()
    assert [entry["name"] for entry in model["outputs"]] == ["scores"]
    assert {"history_items", "history_timestamps", "candidates"} <= {
        entry["name"] for entry in model["inputs"]
    }
    assert client.get("/v2/models/hbm-tiny/ready").status_code == 200
    version = model["versions"][0]
    assert client.get(f"/v2/models/hbm-tiny/versions/{version}/ready").status_code == 200
    for path in ("/v2/models/other", "/v2/models/hbm-tiny/versions/99", "/v2/nothing"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert isinstance(answer.json()["error"], str)


@pytest.mark.parametrize("nested", [False, True])
def test_json_tensors(client: httpx.Client, expected: np.ndarray, nested: bool) -> None:
    sent = body()
    if nested:
        for entry in sent["inputs"]:
            entry["shape"], entry["data"] = [1, *entry["shape"]], [entry["data"]]
    answer = client.post(INFER, json=sent, headers={"X-User-ID": "oip-1"}).json()
    assert answer["id"] == "7"
    assert answer["model_name"] == "hbm-tiny"
    (output,) = answer["outputs"]
    assert output["datatype"] == "FP32"
    assert output["shape"] == ([1, 2] if nested else [2])
    np.testing.assert_allclose(np.ravel(output["data"]), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["<i8", "<i4"])
def test_binary_tensors_in_and_out(client: httpx.Client, expected: np.ndarray, dtype: str) -> None:
    sent, blob = body(), b""
    for entry in sent["inputs"]:
        raw = np.array(entry.pop("data"), dtype=dtype).tobytes()
        entry["datatype"] = "INT64" if dtype == "<i8" else "INT32"
        entry["parameters"] = {"binary_data_size": len(raw)}
        blob += raw
    sent["outputs"] = [{"name": "scores", "parameters": {"binary_data": True}}]
    head = json.dumps(sent).encode()
    answer = client.post(INFER, content=head + blob, headers={HEADER_LENGTH: str(len(head))})
    assert answer.status_code == 200
    split = int(answer.headers[HEADER_LENGTH])
    (output,) = json.loads(answer.content[:split])["outputs"]
    assert output["parameters"]["binary_data_size"] == len(answer.content) - split
    scores = np.frombuffer(answer.content[split:], dtype="<f4")
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (body(candidates=None), "candidates is missing"),
        (body(history_items=None), "history_items is missing"),
        (body(candidates=tensor("candidates", [])), "candidates"),
        (body(candidates=tensor("candidates", list(range(17)))), "candidates"),
        (body(candidates=tensor("candidates", [8000])), "candidates[0]"),
        (body(candidates=tensor("candidates", [4], data=["4"])), "inputs[3].data"),
        (body(candidates=tensor("candidates", [4], data=[True])), "inputs[3].data"),
        (body(candidates=tensor("candidates", [4], data=[4.0])), "inputs[3].data"),
        (body(candidates=tensor("candidates", [4], data=[2**64])), "inputs[3].data"),
        (body(candidates=tensor("candidates", [4], data=None)), "inputs[3].data"),
        (body(candidates=tensor("candidates", [4], data=[[[4]]])), "inputs[3].data"),
        (body(candidates=tensor("candidates", [4], shape=[2])), "inputs[3].data"),
        (body(candidates=tensor("candidates", [4], shape=[2, 1])), "inputs[3].shape"),
        (body(candidates=tensor("candidates", [4], shape=[-1])), "inputs[3].shape"),
        (body(candidates=tensor("candidates", [4], datatype="FP32")), "inputs[3].datatype"),
        (body(query_time=tensor("query_time", [1, 2])), "query_time"),
        (body(other=tensor("other", [1])), "inputs[5].name"),
        (body(other=tensor("candidates", [1])), "inputs[5].name"),
        (body(history_timestamps=tensor("history_timestamps", [1])), "history_timestamps"),
        (body() | {"outputs": [{"name": "other"}]}, "outputs[0].name"),
        ({"inputs": []}, "inputs"),
        ({}, "inputs"),
        ([], "body"),
    ],
)
def test_errors_are_one_string_that_names_the_field(
    client: httpx.Client, sent: Any, said: str
) -> None:
    answer = client.post(INFER, json=sent)
    assert 400 <= answer.status_code < 500
    assert said in answer.json()["error"]


@pytest.mark.parametrize("length", ["-1", "x", "99999", "9" * 40])
def test_wrong_header_lengths(client: httpx.Client, length: str) -> None:
    answer = client.post(INFER, json=body(), headers={HEADER_LENGTH: length})
    assert answer.status_code == 400
    assert HEADER_LENGTH in answer.json()["error"]


def test_left_over_and_missing_binary_bytes(client: httpx.Client) -> None:
    head = json.dumps(body()).encode()
    answer = client.post(INFER, content=head + b"12", headers={HEADER_LENGTH: str(len(head))})
    assert answer.status_code == 400
    assert "2 binary bytes" in answer.json()["error"]
    short = tensor("candidates", [4], data=None, parameters={"binary_data_size": 8})
    answer = client.post(INFER, json=body(candidates=short))
    assert answer.status_code == 400
    assert "8 binary bytes expected, 0 are left" in answer.json()["error"]


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=120), split=st.integers(0, 140))
def test_random_bytes_never_break_it(client: httpx.Client, raw: bytes, split: int) -> None:
    answer = client.post(INFER, content=raw, headers={HEADER_LENGTH: str(split)})
    assert answer.status_code == 400
    assert answer.json()["error"]


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)
_CHANGES = st.dictionaries(
    st.sampled_from(["name", "shape", "datatype", "data", "parameters", "colour"]),
    _ANY
    | st.fixed_dictionaries({"binary_data_size": st.integers(-4, 40) | st.none()})
    | st.sampled_from(["INT32", "INT64", "FP32", "BYTES", [1], [2, 1], [1, 3], [0], [3, -1]]),
    max_size=2,
)
_INPUTS = st.sampled_from(
    ["history_items", "history_timestamps", "history_actions", "candidates", "query_time"]
)


@settings(max_examples=300, deadline=None)
@given(
    changes=st.dictionaries(_INPUTS, _CHANGES | st.none(), max_size=3),
    tail=st.binary(max_size=40),
    top=st.dictionaries(st.sampled_from(["id", "outputs", "parameters", "x"]), _ANY, max_size=2),
)
def test_changed_tensors_never_break_it(
    client: httpx.Client, changes: dict[str, Any], tail: bytes, top: dict[str, Any]
) -> None:
    """Past the JSON: any field of any tensor may be anything, with or without bytes behind it."""
    sent = body()
    inputs = {each["name"]: each for each in sent["inputs"]}
    for name, change in changes.items():
        inputs[name] = None if change is None else inputs[name] | change
    sent = sent | {"inputs": [each for each in inputs.values() if each is not None]} | top
    head = json.dumps(sent).encode()
    answer = client.post(INFER, content=head + tail, headers={HEADER_LENGTH: str(len(head))})
    assert answer.status_code < 500
    if answer.status_code != 200:
        assert isinstance(answer.json()["error"], str)
        assert answer.json()["error"]
