"""The control API: what PUT accepts, and that no body makes it fail."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from hbm_sidecar.admin import Admin
from hbm_sidecar.api import MAX_BODY_BYTES, control_app
from hbm_sidecar.config import SidecarConfig
from hbm_sidecar.log import configure
from hbm_sidecar.partition import Partition
from hypothesis import given, settings
from hypothesis import strategies as st


def ask(app: Any, method: str, path: str, **more: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://sidecar") as client:
            return await client.request(method, path, **more)

    return asyncio.run(once())


@pytest.fixture
def app(tmp_path: Path) -> Any:
    config = SidecarConfig(run_dir=tmp_path, alpha_min=0.2, alpha_max=0.8)
    return control_app(Admin(config, configure("test")))


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"alpha_min": 0.9}, "alpha_max"),
        ({"alpha_min": -1}, "alpha_min"),
        ({"alpha_max": "much"}, "alpha_max"),
        ({"mode": "fixed"}, "alpha_fixed"),
        ({"mode": "fixed", "alpha_fixed": 0.1}, "alpha_fixed"),
        ({"mode": "turbo"}, "mode"),
        ({"tick_ms": 0}, "tick_ms"),
        ({"slo_ms": -4}, "slo_ms"),
        ({"refill_bytes_per_s": -4}, "refill_bytes_per_s"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_wrong_wish_is_422_and_names_the_field(app, body, field) -> None:
    before = ask(app, "GET", "/v1/partition").json()
    answer = ask(app, "PUT", "/v1/partition", json=body)
    assert answer.status_code == 422
    assert field in [error["loc"][-1] for error in answer.json()["detail"]]
    assert ask(app, "GET", "/v1/partition").json() == before


def test_fields_left_out_are_as_started(app) -> None:
    ask(app, "PUT", "/v1/partition", json={"mode": "fixed", "alpha_fixed": 0.3})
    answer = ask(app, "PUT", "/v1/partition", json={"slo_ms": 12})
    partition = answer.json()["partition"]
    assert (partition["mode"], partition["alpha_min"], partition["slo_ms"]) == ("auto", 0.2, 12)
    assert partition["alpha_fixed"] is None


def test_a_wish_that_cannot_be_kept_is_not_in_force(app, tmp_path: Path) -> None:
    (tmp_path / "partition.json").mkdir()
    answer = ask(app, "PUT", "/v1/partition", json={"mode": "hold"})
    assert answer.status_code == 507
    assert ask(app, "GET", "/v1/partition").json()["partition"]["mode"] == "auto"


def test_a_huge_body_is_413(app) -> None:
    answer = ask(app, "PUT", "/v1/partition", content=b" " * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413


def test_explain_bounds(app) -> None:
    assert ask(app, "GET", "/v1/explain?last=3").json()["decisions"] == []
    assert ask(app, "GET", "/v1/explain?last=0").status_code == 422
    assert ask(app, "GET", "/v1/explain?last=x").status_code == 422


def test_state_without_anything_is_json(app) -> None:
    state = ask(app, "GET", "/v1/state").json()
    assert state["server"]["fresh"] is False
    assert state["partition"]["partition"]["alpha_min"] == 0.2


fields = st.dictionaries(
    st.sampled_from(list(Partition.model_fields)) | st.text(max_size=5),
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["auto", "fixed", "hold"])
    | st.floats(0, 1)
    | st.lists(st.floats(), max_size=2),
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=100), fields.map(lambda value: json.dumps(value).encode())))
def test_no_body_makes_it_fail(tmp_path_factory: pytest.TempPathFactory, body: bytes) -> None:
    config = SidecarConfig(run_dir=tmp_path_factory.getbasetemp())
    app = control_app(Admin(config, configure("test")))
    answer = ask(
        app, "PUT", "/v1/partition", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code in (200, 400, 422)
    if answer.status_code != 200:
        assert answer.json()["detail"]
    else:
        Partition.model_validate(answer.json()["partition"])
