"""Rows and weights pushed while requests are served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hbm_serving.config import Config
from hbm_serving.reference import ReferenceScorer
from hbm_serving.weights import draw_dense, save

BODY = {"history": {"items": [1, 2, 3, 4, 5], "timestamps": [1, 2, 3, 4, 5]}, "candidates": [1, 9]}


@pytest.fixture(scope="module")
def updated(start_server: Callable[[Config], Any], config: Config) -> Iterator[Any]:
    strict = config.model_copy(
        update={"pool": config.pool.model_copy(update={"max_kv_row_lag_s": 0.0})}
    )
    server = start_server(strict)
    yield server
    server.stop()


@pytest.fixture
def admin(updated: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=updated.admin_url, timeout=30) as client:
        yield client


def scores(server: Any) -> list[float]:
    answer = httpx.post(f"{server.url}/v1/rank", json=BODY, headers={"X-User-ID": "admin-test"})
    assert answer.status_code == 200
    found: list[float] = answer.json()["scores"]
    return found


def test_pushed_rows_and_weights_take_effect(
    updated: Any, admin: httpx.Client, config: Config, tmp_path: Any
) -> None:
    reference = ReferenceScorer.from_config(config)

    def expected() -> Any:
        history = BODY["history"]
        assert isinstance(history, dict)
        return pytest.approx(
            reference.score(history["items"], history["timestamps"], [1, 9]), abs=1e-5
        )

    before = scores(updated)
    assert before == expected()
    values = np.full((2, config.model.tables[0].width), 0.7, dtype=np.float32)
    answer = admin.post(
        "/v1/admin/rows", json={"table": "item", "ids": [2, 9], "values": values.tolist()}
    )
    assert answer.json() == {"row_epoch": 1}
    reference.push_rows("item", np.array([2, 9]), torch.from_numpy(values))
    after = scores(updated)
    assert after == expected()
    assert after != pytest.approx(before, abs=1e-3)

    answer = admin.post("/v1/admin/model_version", json={"version": 5, "seed": 5})
    assert answer.json() == {"model_version": 5}
    reference.load(draw_dense(config.model, 5))
    assert scores(updated) == expected()

    save(tmp_path / "w.safetensors", draw_dense(config.model, 6), {})
    answer = admin.post(
        "/v1/admin/model_version", json={"version": 6, "weights": str(tmp_path / "w.safetensors")}
    )
    assert answer.json() == {"model_version": 6}
    reference.load(draw_dense(config.model, 6))
    assert scores(updated) == expected()
    assert admin.get("/v1/admin/integrity").json() == {"violations": []}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("rows", {"table": "other", "ids": [1], "values": [[0.0] * 16]}, "table"),
        ("rows", {"table": "item", "ids": [], "values": []}, "ids"),
        ("rows", {"table": "item", "ids": [8000], "values": [[0.0] * 16]}, "ids[0]"),
        ("rows", {"table": "item", "ids": [1, 1], "values": [[0.0] * 16] * 2}, "ids"),
        ("rows", {"table": "item", "ids": [1], "values": [[0.0] * 15]}, "values[0]"),
        ("rows", {"table": "item", "ids": [1], "values": [[0.0] * 16] * 2}, "values"),
        ("rows", {"table": "item", "ids": [1], "values": [[1e39] * 16]}, "values"),
        ("rows", {"table": "item", "ids": [1], "values": [["x"] * 16]}, "values[0][0]"),
        ("model_version", {"version": 7}, "body"),
        ("model_version", {"version": -1, "seed": 1}, "version"),
        ("model_version", {"version": 7, "weights": "/nowhere"}, "weights"),
    ],
)
def test_bad_updates_name_the_field(
    admin: httpx.Client, path: str, body: dict[str, Any], field: str
) -> None:
    answer = admin.post(f"/v1/admin/{path}", json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == field


def test_the_served_version_is_refused(updated: Any, admin: httpx.Client) -> None:
    version = updated.engine.model_version
    answer = admin.post("/v1/admin/model_version", json={"version": version, "seed": 1})
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "version"
