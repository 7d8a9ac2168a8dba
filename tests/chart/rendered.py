"""What helm makes of the chart, to ask questions about."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "hbm-partition"
VALUES = [*sorted((CHART / "ci").glob("*-values.yaml")), CHART / "values-cpu.yaml"]

Object = dict[str, Any]


class Rendered:
    """The objects of one rendering. Tests share them: they are looked at, and never changed."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def objects(self) -> list[Object]:
        # libyaml reads a quarter of a megabyte in a tenth of the time.
        return [each for each in yaml.load_all(self.text, Loader=yaml.CSafeLoader) if each]

    def of_kind(self, *kinds: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] in kinds]

    def one(self, kind: str, name: str, namespace: str | None = None) -> Object:
        """The object of that kind and name; there must be exactly one."""
        (found,) = [
            each
            for each in self.of_kind(kind)
            if each["metadata"]["name"] == name
            and namespace in (None, each["metadata"].get("namespace"))
        ]
        return found

    def pods(self) -> Iterator[tuple[str, Object]]:
        """Name, and {metadata, spec} of every pod that the chart makes."""
        for each in self.of_kind("Pod"):
            yield each["metadata"]["name"], each
        for each in self.of_kind("Deployment"):
            yield each["metadata"]["name"], each["spec"]["template"]

    def arguments(self, deployment: str) -> list[str]:
        (container,) = self.one("Deployment", deployment)["spec"]["template"]["spec"]["containers"]
        return [str(each) for each in container["args"]]
