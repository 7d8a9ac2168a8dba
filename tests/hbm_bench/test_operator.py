"""The operator's benchmark runs, and says which goals it judged."""

from __future__ import annotations

import pytest
from hbm_bench.operator import run, thresholds
from hbm_e2e.api_server import ApiServer

pytestmark = pytest.mark.apiserver


@pytest.mark.timeout(600)
def test_a_quick_run_judges_every_goal(api_server: ApiServer) -> None:
    """`api_server` builds what is missing, or skips."""
    figures = run(quick=True, seed=3)
    assert figures["goals"].keys() == thresholds().keys()
    assert figures["one_spec"]["changes"] == 40
    assert figures["cold_start"]["seconds"] > 0
    assert figures["steady"]["reports_per_object_hour"] > 0
