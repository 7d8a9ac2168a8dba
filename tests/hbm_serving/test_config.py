"""Wrong configuration is one clear line; what cannot be reused safely is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hbm_serving.config import load_config, presets
from hbm_serving.errors import ConfigError


def written(tmp_path: Path, change: dict[str, Any]) -> Path:
    """The tiny preset with `section.key` replaced."""
    import hbm_serving

    folder = Path(hbm_serving.__file__).parent / "presets"
    raw = yaml.safe_load((folder / "tiny.yaml").read_text())
    for path, value in change.items():
        section, key = path.split(".", 1)
        raw[section][key] = value
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def test_presets_load() -> None:
    assert {"demo", "tiny"} <= set(presets())
    for name in presets():
        assert load_config(name).model.items > 0


def test_overrides_reach_their_section() -> None:
    config = load_config("tiny", {"pool.alpha": 0.3, "server.seed": 7})
    assert config.pool.alpha == 0.3
    assert config.server.seed == 7


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        ({"normalisation": "present_length"}, "rescales every cached token"),
        ({"time_bias": "next_timestamp"}, "following token's time"),
        ({"positions": "from_end"}, "renumbers every cached token"),
        ({"query_time": "all_tokens"}, "depend on the request"),
        ({"commit_candidates": True}, "candidates into the user's history"),
    ],
)
def test_unsafe_models_are_refused_with_the_reason(
    tmp_path: Path, attention: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match="not safe to reuse KV") as caught:
        load_config(written(tmp_path, {"model.attention": attention}))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pool.alpha": 0.95}, "alpha_max=0.7 does not hold"),
        ({"pool.page_tokens": 5}, "page_tokens=5 does not divide"),
        ({"pool.colour": 1}, "pool.colour: unknown key"),
        ({"model.layers": "two"}, "model.layers: .*got 'two'"),
        ({"model.drop_block_tokens": 6}, "page_tokens=4 does not divide model.drop_block_tokens=6"),
        ({"model.max_request_history_tokens": 8}, "is below max_sequence_tokens"),
        ({"model.tables": []}, "model.tables"),
        ({"server.max_queue": 0}, "server.max_queue"),
    ],
)
def test_one_line_names_field_and_value(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(written(tmp_path, change))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read.*demo"):
        load_config(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(broken)
    broken.write_text("- 1")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_config(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(broken)
