"""A node and a stream small enough for a test, and scenes on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hbm_study.cells import Scene
from hbm_study.scene import SceneData

SMALL = {
    "schema_version": 1,
    "name": "small",
    "rows": 40_000,
    "sample_rate": 0.25,
    "unsampled_top": 50,
    "warm_up": 150,
    "node": {
        "pool_bytes": 24 << 20,
        "extent_bytes": 1 << 16,
        "page_tokens": 16,
        "token_bytes": 1024,
        "row_bytes": 1024,
        "lookups_per_token": 2,
        "max_sequence_tokens": 512,
        "drop_block_tokens": 64,
        "gather_bytes_per_s": 1.0e8,
        "fixed_ms": 1.0,
        "token_us": 20.0,
        "token_context_ns": 10.0,
    },
    "regimes": {
        "rows": {
            "arrivals": {"rate_per_s": 20},
            "users": {"revisit": 0.05, "hot": 0.05, "hot_users": 20, "one_off_users": 5000},
            "items": {"zipf_s": 0.6},
            "history": {"median": 200, "sigma": 0.3, "minimum": 50, "maximum": 480, "growth": 2},
            "candidates": 64,
        },
        "users": {
            "arrivals": {"rate_per_s": 20},
            "users": {"revisit": 0.6, "revisit_distance": 20, "hot": 0.6, "hot_users": 40},
            "items": {"zipf_s": 0.9},
            "history": {"median": 300, "sigma": 0.3, "minimum": 50, "maximum": 480, "growth": 2},
            "candidates": 16,
        },
    },
    "walk": [{"regime": "rows", "requests": 500}, {"regime": "users", "requests": 500}],
}


@pytest.fixture(scope="session")
def workload_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workload") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def scene(workload_file: Path) -> Scene:
    return Scene(str(workload_file), "0.8", "serial", 1001)


@pytest.fixture(scope="session")
def data(scene: Scene, cache: Path) -> SceneData:
    return SceneData(scene, cache)
