"""Values: each described, and wrong ones refused with what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml
from hbm_e2e.kubectl import CommandFailed

from tests.chart.conftest import Render
from tests.chart.rendered import CHART, VALUES

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())


def properties(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every described value below a schema."""
    for name, each in schema.get("properties", {}).items():
        resolved = SCHEMA["$defs"][each["$ref"].rsplit("/", 1)[1]] if "$ref" in each else each
        yield f"{path}.{name}", resolved
        yield from properties(resolved, f"{path}.{name}")
        if "items" in resolved:
            yield f"{path}.{name}[]", resolved["items"]
            yield from properties(resolved["items"], f"{path}.{name}[]")


def test_the_schema_is_one_and_fits_the_values_delivered() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.validate(DEFAULTS)
    for path in VALUES:
        validator.validate(yaml.safe_load(path.read_text()))


def test_every_value_is_described_and_nothing_unknown_is_taken() -> None:
    described = dict(properties(SCHEMA))
    assert len(described) > 100
    for path, schema in described.items():
        assert schema.get("description"), path
        if "properties" in schema:
            assert schema["additionalProperties"] is False, path


def test_every_value_of_the_schema_has_its_default() -> None:
    def missing(schema: Any, values: Any, path: str) -> Iterator[str]:
        for name, each in schema.get("properties", {}).items():
            if path == "" and name == "global":
                continue
            if name not in values:
                yield f"{path}.{name}"
            elif isinstance(values[name], dict) and values[name]:
                yield from missing(each, values[name], f"{path}.{name}")

    assert list(missing(SCHEMA, DEFAULTS, "")) == []


ROUTE = "routes[0].name=a,routes[0].namespace=n,routes[0].service=s,routes[0].port=1"


@pytest.mark.helm
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["webhook.replica=3"], "additional properties 'replica' not allowed"),
        (["webhook.replicas=0"], "minimum: got 0, want 1"),
        (["webhook.failurePolicy=Warn"], "'Ignore', 'Fail'"),
        (["webhook.certificates.mode=given"], "given/secretName"),
        (["webhook.certificates.lifetimeSeconds=5"], "minimum: got 5, want 120"),
        (["redis.mode=external"], "external/secretName"),
        (["redis.mode=none"], "'embedded', 'external'"),
        (["sidecar.memory=lots"], "'lots' does not match pattern"),
        (["image.registry=example.com/"], "'example.com/' does not match pattern"),
        (["controller.staleSeconds=10"], "minimum: got 10, want 35"),
        (["routes[0].name=Rank"], "missing properties 'namespace', 'service', 'port'"),
        ([ROUTE, "routes[0].policy=best"], "'cost_ms'"),
        ([ROUTE, "routes[0].name=Rank_A"], "'Rank_A' does not match pattern"),
        (
            [ROUTE, "routes[1].name=a,routes[1].namespace=m,routes[1].service=s,routes[1].port=1"],
            'routes: "a" is there twice',
        ),
    ],
)
def test_wrong_values_are_refused_by_name(
    render: Render, settings: list[str], message: str
) -> None:
    with pytest.raises(CommandFailed) as failure:
        render(None, *settings)
    assert message in failure.value.output
