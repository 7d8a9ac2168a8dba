"""Open Inference Protocol v2 over HTTP: health, metadata, infer (JSON and binary tensors).

Protocol: github.com/kserve/open-inference-protocol (rest spec); binary tensors as in Triton's
extension `binary_tensor_data`. One user per request: leading dimensions of size 1 are accepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hbm_serving.engine import Engine
from hbm_serving.errors import RequestError
from hbm_serving.features import Ints, RankRequest
from hbm_serving.http import (
    Answering,
    deadline_of,
    json_response,
    oip_error_body,
    read_body,
    result_headers,
    user_of,
)
from hbm_serving.schema import MAX_TIMESTAMP, RequestParser, location

HEADER_LENGTH = "inference-header-content-length"
_INTEGERS: dict[str, np.dtype[Any]] = {"INT64": np.dtype("<i8"), "INT32": np.dtype("<i4")}


class Tensor(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    name: str
    shape: list[int] = Field(min_length=1, max_length=8)
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class RequestedOutput(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    name: str
    parameters: dict[str, Any] | None = None


class InferRequest(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    id: str | None = None
    inputs: list[Tensor] = Field(min_length=1, max_length=16)
    outputs: list[RequestedOutput] | None = Field(None, max_length=16)
    parameters: dict[str, Any] | None = None


def _array(tensor: Tensor, where: str, blob: memoryview) -> tuple[Ints, int]:
    """Values of one input as flat int64, and how many bytes of `blob` they took."""
    dtype = _INTEGERS.get(tensor.datatype)
    if dtype is None:
        raise RequestError(
            f"{where}.datatype", f"{tensor.datatype!r} is not read; use INT64 or INT32", 400
        )
    if any(length < 0 for length in tensor.shape):
        raise RequestError(f"{where}.shape", f"{tensor.shape} has a negative length", 400)
    if any(length != 1 for length in tensor.shape[:-1]):
        raise RequestError(
            f"{where}.shape", f"{tensor.shape}: one user per request; use [n] or [1, n]", 400
        )
    count = math.prod(tensor.shape)
    size = (tensor.parameters or {}).get("binary_data_size")
    if size is not None:
        if not isinstance(size, int) or isinstance(size, bool) or size != count * dtype.itemsize:
            raise RequestError(
                f"{where}.parameters.binary_data_size",
                f"is {size!r}; shape and datatype need {count * dtype.itemsize}",
                400,
            )
        if len(blob) < size:
            raise RequestError(where, f"{size} binary bytes expected, {len(blob)} are left", 400)
        return np.frombuffer(blob[:size], dtype=dtype).astype(np.int64), size
    if tensor.data is None:
        raise RequestError(f"{where}.data", "is missing (and no binary_data_size is given)", 400)
    flat: Sequence[Any] = tensor.data
    for _ in tensor.shape[1:]:  # OIP allows nested as well as flat data
        if len(flat) == 1 and isinstance(flat[0], list):
            flat = flat[0]
    if set(map(type, flat)) - {int}:
        raise RequestError(f"{where}.data", "holds something that is not an integer", 400)
    if len(flat) != count:
        raise RequestError(f"{where}.data", f"has {len(flat)} values, shape says {count}", 400)
    try:
        return np.array(flat, dtype=np.int64), 0
    except OverflowError:
        raise RequestError(f"{where}.data", "holds an integer beyond 64 bits", 400) from None


class InferParser:
    """Body of an infer request -> `RankRequest` and how the answer is wanted."""

    def __init__(self, parser: RequestParser) -> None:
        self._parser = parser
        model = parser.model
        self.inputs: dict[str, tuple[int, int]] = {  # name -> (largest length, value limit)
            "history_items": (model.max_request_history_tokens, model.items),
            "history_timestamps": (model.max_request_history_tokens, MAX_TIMESTAMP + 1),
            "candidates": (model.max_candidates, model.items),
            "query_time": (1, MAX_TIMESTAMP + 1),
        }
        if model.actions:
            self.inputs["history_actions"] = (model.max_request_history_tokens, model.actions)

    def parse(
        self, raw: bytes, header_length: str | None, user: int
    ) -> tuple[RankRequest, InferRequest, bool, int]:
        """Returns the request, its JSON part, whether scores go back binary, and their rank."""
        split = len(raw)
        if header_length is not None:
            if not header_length.isascii() or not header_length.isdigit():
                raise RequestError(HEADER_LENGTH, f"{header_length[:40]!r} is not a length", 400)
            split = int(header_length) if len(header_length) < 12 else len(raw) + 1
            if split > len(raw):
                raise RequestError(
                    HEADER_LENGTH, f"{header_length[:40]} exceeds the body ({len(raw)} bytes)", 400
                )
        try:
            body = InferRequest.model_validate_json(raw[:split])
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False)[0]
            raise RequestError(location(problem["loc"]), problem["msg"], 400) from None
        arrays, rank = self._read_inputs(body, memoryview(raw)[split:])
        for name in ("history_items", "history_timestamps", "candidates"):
            if name not in arrays:
                raise RequestError("inputs", f"{name} is missing", 400)
        query = arrays.get("query_time")
        request = self._parser.build(
            user,
            arrays["history_items"],
            arrays["history_timestamps"],
            arrays.get("history_actions"),
            arrays["candidates"],
            int(query[0]) if query is not None and len(query) else None,
            ("history_items", "history_timestamps", "history_actions"),
        )
        return request, body, self._binary(body), rank

    def _read_inputs(self, body: InferRequest, blob: memoryview) -> tuple[dict[str, Ints], int]:
        arrays: dict[str, Ints] = {}
        rank = 1
        for index, tensor in enumerate(body.inputs):
            where = f"inputs[{index}]"
            limits = self.inputs.get(tensor.name)
            if limits is None:
                raise RequestError(
                    f"{where}.name",
                    f"{tensor.name[:80]!r} is unknown; the model takes {', '.join(self.inputs)}",
                    400,
                )
            if tensor.name in arrays:
                raise RequestError(f"{where}.name", f"{tensor.name} is given twice", 400)
            values, used = _array(tensor, where, blob)
            blob = blob[used:]
            if len(values) > limits[0]:
                raise RequestError(
                    tensor.name, f"has {len(values)} values; at most {limits[0]} are taken"
                )
            if tensor.name == "candidates":
                rank = len(tensor.shape)
                if not len(values):
                    raise RequestError("candidates", "is empty; give at least one")
            self._parser.check_range(tensor.name, values, limits[1])
            arrays[tensor.name] = values
        if len(blob):
            raise RequestError("body", f"{len(blob)} binary bytes belong to no input", 400)
        return arrays, rank

    @staticmethod
    def _binary(body: InferRequest) -> bool:
        binary = bool((body.parameters or {}).get("binary_data_output", False))
        for index, output in enumerate(body.outputs or []):
            if output.name != "scores":
                raise RequestError(
                    f"outputs[{index}].name",
                    f"{output.name[:80]!r} is unknown; the model gives scores",
                    400,
                )
            binary = bool((output.parameters or {}).get("binary_data", binary))
        return binary


def add_oip(app: FastAPI, engine: Engine, answering: Answering) -> None:
    """Adds the `/v2` endpoints of one served model to the application."""
    limits = engine.config.server
    name = engine.config.model.name
    parser = InferParser(engine.parser)

    def known(request: Request) -> None:
        wanted = request.path_params["model"]
        if wanted != name:
            raise RequestError("model", f"{wanted[:80]!r} is not served here; {name} is", 404)
        version = request.path_params.get("version")
        if version is not None and version != str(engine.model_version):
            raise RequestError(
                "version", f"{version[:40]!r} is not served; {engine.model_version} is", 404
            )

    async def server_live(request: Request) -> Response:
        """The server answers."""
        return json_response(b'{"live":true}')

    async def server_ready(request: Request) -> Response:
        """The server takes requests."""
        ready = engine.state == "ready"
        return json_response(orjson.dumps({"ready": ready}), 200 if ready else 503)

    async def server_metadata(request: Request) -> Response:
        """Name, version and extensions of the server."""
        return json_response(
            orjson.dumps(
                {
                    "name": "hbm-serving",
                    "version": engine.versions["hbm-partition"],
                    "extensions": ["binary_tensor_data"],
                }
            )
        )

    async def model_ready(request: Request) -> Response:
        """The model takes requests."""
        known(request)
        ready = engine.state == "ready"
        return json_response(orjson.dumps({"name": name, "ready": ready}), 200 if ready else 503)

    async def model_metadata(request: Request) -> Response:
        """Inputs and outputs of the model."""
        known(request)
        inputs = [
            {"name": tensor, "datatype": "INT64", "shape": [1 if tensor == "query_time" else -1]}
            for tensor in parser.inputs
        ]
        return json_response(
            orjson.dumps(
                {
                    "name": name,
                    "versions": [str(engine.model_version)],
                    "platform": "pytorch_hstu",
                    "inputs": inputs,
                    "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1]}],
                }
            )
        )

    async def infer(request: Request) -> Response:
        """Scores candidates for one user's whole history."""
        known(request)
        user, deadline_ms = user_of(request), deadline_of(request)
        raw = await read_body(request, limits)
        parsed, body, binary, rank = parser.parse(raw, request.headers.get(HEADER_LENGTH), user)
        result = await engine.rank(parsed, deadline_ms)
        scores = np.ascontiguousarray(result.scores, dtype="<f4")
        output: dict[str, Any] = {
            "name": "scores",
            "datatype": "FP32",
            "shape": [1] * (rank - 1) + [len(scores)],
        }
        answer: dict[str, Any] = {
            "model_name": name,
            "model_version": str(result.model_version),
            "outputs": [output],
        }
        if body.id is not None:
            answer["id"] = body.id
        headers = result_headers(result, len(parsed.candidates), parsed.request_tokens)
        if not binary:
            output["data"] = scores
            return json_response(
                orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), headers=headers
            )
        output["parameters"] = {"binary_data_size": scores.nbytes}
        head = orjson.dumps(answer)
        headers[HEADER_LENGTH] = str(len(head))
        return Response(
            head + scores.tobytes(), headers=headers, media_type="application/octet-stream"
        )

    def get(path: str, endpoint: str, handler: Any) -> None:
        app.get(path, response_class=Response, include_in_schema=False)(
            answering(endpoint, handler, oip_error_body)
        )

    get("/v2", "oip_server", server_metadata)
    get("/v2/health/live", "oip_live", server_live)
    get("/v2/health/ready", "oip_ready", server_ready)
    wrapped = answering("oip_infer", infer, oip_error_body)
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        get(prefix, "oip_model", model_metadata)
        get(f"{prefix}/ready", "oip_model_ready", model_ready)
        app.post(f"{prefix}/infer", response_class=Response, include_in_schema=False)(wrapped)
