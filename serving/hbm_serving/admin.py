"""Administration of one server, on its own port, bound to the loopback address by default.

Rows and weights are pushed here while requests are served; both take effect between two batches.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hbm_serving.engine import Engine
from hbm_serving.errors import ConfigError, RequestError
from hbm_serving.http import Answering, json_response, plain_errors, read_body
from hbm_serving.metrics import Metrics
from hbm_serving.schema import location

_MAX_ADMIN_BODY = 1 << 28


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RowsBody(_Strict):
    """New values of rows of one table."""

    table: str
    ids: list[int] = Field(min_length=1, max_length=1 << 20)
    values: list[list[float]] = Field(description="One row per id, as wide as the table.")


class VersionBody(_Strict):
    """Other dense weights: from a seed, or from a safetensors file that the server can read."""

    version: int = Field(ge=0, lt=1 << 63)
    seed: int | None = Field(None, ge=0, lt=1 << 32)
    weights: Path | None = None

    @model_validator(mode="after")
    def _one(self) -> VersionBody:
        if (self.seed is None) == (self.weights is None):
            raise ValueError("give either seed or weights")
        return self


def build_admin_app(engine: Engine, metrics: Metrics) -> FastAPI:
    """The application of the admin port."""
    app = FastAPI(title="HBM Partition model server, administration", docs_url=None, redoc_url=None)
    answering = Answering(metrics)
    plain_errors(app)
    limits = engine.config.server.model_copy(update={"max_body_bytes": _MAX_ADMIN_BODY})
    tables = {table.name: table for table in engine.config.model.tables}

    async def parsed(request: Request, kind: type[BaseModel]) -> Any:
        try:
            return kind.model_validate_json(await read_body(request, limits))
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False)[0]
            raise RequestError(
                location(problem["loc"]), problem["msg"].removeprefix("Value error, ")
            ) from None

    async def rows(request: Request) -> Response:
        """Overwrites rows of a table; answers with the new row epoch."""
        body: RowsBody = await parsed(request, RowsBody)
        table = tables.get(body.table)
        if table is None:
            raise RequestError("table", f"{body.table[:80]!r} is unknown; there are {list(tables)}")
        if len(body.values) != len(body.ids):
            raise RequestError("values", f"has {len(body.values)} rows for {len(body.ids)} ids")
        for index, row in enumerate(body.values):
            if len(row) != table.width:
                raise RequestError(
                    f"values[{index}]",
                    f"has {len(row)} values; table {table.name} is {table.width} wide",
                )
        wrong = [i for i, row in enumerate(body.ids) if not 0 <= row < table.rows]
        if wrong:
            raise RequestError(
                f"ids[{wrong[0]}]", f"{body.ids[wrong[0]]} is not in 0..{table.rows - 1}"
            )
        if len(set(body.ids)) != len(body.ids):
            raise RequestError("ids", "names a row twice")
        with np.errstate(over="ignore"):
            values = np.array(body.values, dtype=np.float32)
        if not np.isfinite(values).all():
            raise RequestError("values", "holds NaN or a number beyond float32")
        ids = np.array(body.ids, dtype=np.int64)
        epoch = await asyncio.wrap_future(engine.push_rows(body.table, ids, values))
        return json_response(orjson.dumps({"row_epoch": epoch}))

    async def model_version(request: Request) -> Response:
        """Switches to other dense weights between two batches; all cached KV becomes void."""
        body: VersionBody = await parsed(request, VersionBody)
        try:
            switched = await asyncio.to_thread(
                engine.set_weights, body.version, seed=body.seed, path=body.weights
            )
        except ConfigError as error:
            raise RequestError("weights", str(error)) from None
        return json_response(orjson.dumps({"model_version": await asyncio.wrap_future(switched)}))

    async def integrity(request: Request) -> Response:
        """Looks for violations of the pool's invariants while nothing is in flight."""
        violations = await asyncio.wrap_future(engine.check_integrity())
        return json_response(orjson.dumps({"violations": violations}))

    app.post("/v1/admin/rows", response_class=Response)(answering("admin_rows", rows))
    app.post("/v1/admin/model_version", response_class=Response)(
        answering("admin_model_version", model_version)
    )
    app.get("/v1/admin/integrity", response_class=Response)(answering("admin_integrity", integrity))
    return app
