"""A table in a damaged file: only requests that need the damaged row fail, nothing leaks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hbm_pool.host.file_store import (
    CHECKSUM_BYTES,
    DEFAULT_BUFFERS,
    HEADER_BYTES,
    FileRowStore,
    create_file,
)
from hbm_serving.config import Config
from hbm_serving.engine import Engine
from hbm_serving.errors import ConfigError
from hbm_serving.memory import open_stores
from hbm_serving.reference import ReferenceScorer
from hbm_serving.weights import draw_table

DAMAGED = 77


@pytest.fixture
def on_file(config: Config, tmp_path: Path) -> Config:
    """The tiny model with its item table in a file of which one row is damaged."""
    rows = draw_table(config.model, 0, config.server.seed)
    path = tmp_path / "item.rows"
    row_bytes = rows.shape[1] * 4
    create_file(path, len(rows), row_bytes, lambda start, stop: rows[start:stop])
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES + DAMAGED * (row_bytes + CHECKSUM_BYTES))
        file.write(b"\xff\xff\xff\xff")
    item, *others = config.model.tables
    tables = (item.model_copy(update={"file": path}), *others)
    return config.model_copy(update={"model": config.model.model_copy(update={"tables": tables})})


def test_a_damaged_row_fails_its_requests_alone(
    on_file: Config, start_server: Callable[[Config], Any], reference: ReferenceScorer
) -> None:
    server = start_server(on_file)
    with httpx.Client(base_url=server.url, timeout=30, headers={"X-User-ID": "f"}) as client:

        def rank(items: list[int]) -> httpx.Response:
            history = {"items": items, "timestamps": list(range(len(items)))}
            return client.post("/v1/rank", json={"history": history, "candidates": [5]})

        sound = list(range(100, 130))
        for _ in range(3):
            failed = rank([*sound, DAMAGED])
            assert failed.status_code == 500
            assert failed.json()["error"]["field"] == "server"
            good = rank(sound)
            assert good.status_code == 200
            expected = reference.score(sound, list(range(30)), [5])
            np.testing.assert_allclose(good.json()["scores"], expected, atol=1e-5)
        assert good.json()["kv_reused_tokens"] > 0
        assert "hbm_serving_errors_total 3.0" in client.get("/metrics").text
        found = httpx.get(f"{server.admin_url}/v1/admin/integrity").json()
        assert found == {"violations": []}
        assert "hbm_pool_kv_pinned_extents 0.0" in client.get("/metrics").text
    server.stop()


def test_files_that_do_not_fit_are_refused(on_file: Config, tmp_path: Path) -> None:
    item, *others = on_file.model.tables
    short = item.model_copy(update={"rows": item.rows - 1})
    model = on_file.model.model_copy(update={"tables": (short, *others)})
    with pytest.raises(ConfigError, match=r"model.tables\[0\].file: .*holds 8000 rows"):
        Engine(on_file.model_copy(update={"model": model}))
    absent = item.model_copy(update={"file": tmp_path / "absent"})
    model = on_file.model.model_copy(update={"tables": (absent, *others)})
    with pytest.raises(ConfigError, match=r"model.tables\[0\].file: .*cannot be opened"):
        Engine(on_file.model_copy(update={"model": model}))


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
            ],
        ),
    ],
)
def test_a_file_is_read_through_a_ring_that_the_device_can_read(
    on_file: Config, device: str
) -> None:
    """Page-locked where a GPU copies out of it, plain memory elsewhere; bounded either way."""
    (store, *_) = open_stores(on_file, torch.device(device)).values()
    assert isinstance(store, FileRowStore)
    buffers = [store._ring.get() for _ in range(DEFAULT_BUFFERS)]
    assert store.staging_bytes == sum(buffer.nbytes for buffer in buffers)
    assert {torch.from_numpy(buffer).is_pinned() for buffer in buffers} == {device == "cuda"}
    store.close()


def test_scores_that_are_no_numbers_are_never_sent(
    config: Config, start_server: Callable[[Config], Any]
) -> None:
    """Rows of enormous values overflow the model: an error, and no page of it is kept."""
    server = start_server(config)
    values = np.full((1, config.model.tables[0].width), 3e38, dtype=np.float32)
    server.engine.push_rows("item", np.array([9]), values).result(30)
    history = {"items": [9] * 12, "timestamps": list(range(12))}
    with httpx.Client(base_url=server.url, timeout=30, headers={"X-User-ID": "n"}) as client:
        body = {"history": history, "candidates": [9]}
        assert client.post("/v1/rank", json=body).status_code == 500
        calm = torch.zeros(1, config.model.tables[0].width).numpy()
        server.engine.push_rows("item", np.array([9]), calm).result(30)
        answer = client.post("/v1/rank", json=body)
        assert answer.status_code == 200
        assert answer.json()["kv_reused_tokens"] == 0
    server.stop()
