"""helm, where the harness has built it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Protocol

import pytest
from hbm_e2e.errors import ToolMissing
from hbm_e2e.kubectl import run
from hbm_e2e.toolchain import Toolchain

from tests.chart.rendered import CHART, Rendered


class Render(Protocol):
    """`helm template` with one file of values and further ones as for --set."""

    def __call__(
        self,
        values: Path | None = None,
        *settings: str,
        release: str = "hbm",
        namespace: str = "hbm-ns",
    ) -> Rendered: ...


@pytest.fixture(scope="session")
def helm() -> Path:
    """The program."""
    try:
        return Toolchain().path("helm")
    except ToolMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def render_anew(helm: Path) -> Render:
    """Renders each time that it is called."""

    def rendered(
        values: Path | None = None, *settings: str, release: str = "hbm", namespace: str = "hbm-ns"
    ) -> Rendered:
        command = [str(helm), "template", release, str(CHART), "--namespace", namespace]
        if values is not None:
            command += ["--values", str(values)]
        for setting in settings:
            command += ["--set", setting]
        return Rendered(run(command))

    return rendered


@pytest.fixture(scope="session")
def render(render_anew: Render) -> Render:
    """Renders once, and shows all tests the same objects."""
    return cache(render_anew)
