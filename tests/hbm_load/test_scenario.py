from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hbm_load.errors import ScenarioError
from hbm_load.generate import generate
from hbm_load.scenario import Scenario, blend, load_scenario, parse_scenario, scenarios
from hypothesis import given, settings
from hypothesis import strategies as st


def test_every_shipped_scenario_is_valid_and_named_like_its_file() -> None:
    assert "demo" in scenarios()
    for name in scenarios():
        assert load_scenario(name).name == name


def test_a_file_is_read_like_a_shipped_one(tmp_path: Path, scenario: Scenario) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(scenario.model_dump(mode="json")))
    assert load_scenario(path) == scenario


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.update(surprise=1), "surprise: unknown key"),
        (lambda raw: raw.pop("catalogue"), "catalogue: this key is required"),
        (lambda raw: raw["walk"][0].update(regime="nobody"), "no regime is called 'nobody'"),
        (lambda raw: raw.update(catalogue=100), "more than the catalogue of 100 items"),
        (lambda raw: raw.update(schema_version=2), "schema_version"),
        (
            lambda raw: raw["regimes"]["regulars"]["users"].update(hot=1.5),
            "regimes.regulars.users.hot: Input should be less than or equal to 1 (got 1.5)",
        ),
        (
            lambda raw: raw["regimes"]["strangers"]["items"].update(new_items=0),
            "new_share is 0.25 but new_items is 0",
        ),
        (
            lambda raw: raw["regimes"]["regulars"]["history"].update(minimum=91),
            "minimum 91 is above maximum 90",
        ),
        (lambda raw: raw["walk"].clear(), "walk"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(scenario: Scenario, change, said: str) -> None:
    raw = scenario.model_dump(mode="json")
    change(raw)
    with pytest.raises(ScenarioError) as error:
        parse_scenario(yaml.safe_dump(raw), "mine.yaml")
    text = str(error.value)
    assert text.startswith("mine.yaml: ")
    assert said in text
    assert "\n" not in text


def test_the_example_of_the_documentation_makes_a_trace() -> None:
    text = (Path(__file__).parents[2] / "docs" / "workloads.md").read_text()
    example = text.split("```yaml\n")[1].split("```")[0]
    trace = generate(parse_scenario(example, "docs/workloads.md"), 1, duration_s=20)
    assert trace.labels == ("quiet", "sale")


def test_a_missing_file_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"nowhere\.yaml: cannot be read.*demo"):
        load_scenario(tmp_path / "nowhere.yaml")


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_scenario_or_a_scenario_error(text: str) -> None:
    with pytest.raises(ScenarioError) as error:
        parse_scenario(text, "fuzz")
    assert "\n" not in str(error.value)


def test_blend_interpolates_numbers_and_keeps_both_ends(scenario: Scenario) -> None:
    start, end = scenario.regimes["strangers"], scenario.regimes["regulars"]
    assert blend(start, end, 1.0) == end
    assert blend(start, end, 0.0).items == start.items
    half = blend(start, end, 0.5)
    assert half.users.hot == pytest.approx(0.5)
    assert half.items.zipf_s == pytest.approx(0.95)
    assert half.history.median == pytest.approx(45)
