"""The alerts: they fire when they should, and each leads to its runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.conftest import Render
from tests.chart.metric_names import asked_for, documented
from tests.chart.rendered import CHART, ROOT

RULES = CHART / "files" / "rules" / "alerts.yaml"
CASES = Path(__file__).parent / "alerts_test.yaml"


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(*words: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not here: apt-get install prometheus")
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_rules() -> None:
    promtool("check", "rules", str(RULES))


def test_alerts_fire_and_stay_quiet_as_they_should() -> None:
    promtool("test", "rules", str(CASES))


def test_every_alert_is_tested_both_ways() -> None:
    names = {case["name"] for case in yaml.safe_load(CASES.read_text())["tests"]}
    assert names == {
        f"{alert['alert']} {what}" for alert in alerts() for what in ("fires", "stays quiet")
    }


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("warning", "critical")
    assert alert["annotations"]["summary"].endswith(".")
    assert alert["annotations"]["description"].endswith(".")
    assert alert["annotations"]["runbook_url"] == f"RUNBOOK_URL#{alert['alert'].lower()}"
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert alert["alert"] in headings
    assert asked_for(alert["expr"]) <= documented().keys()


def test_no_runbook_is_left_over() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    headings = re.findall(r"^### (HBM\w+)$", text, re.MULTILINE)
    assert headings
    assert set(headings) == {alert["alert"] for alert in alerts()}


@pytest.mark.helm
def test_the_chart_puts_the_address_of_the_runbooks_in(render: Render) -> None:
    rendered = render(
        None,
        "monitoring.rules.enabled=true",
        "monitoring.rules.runbookUrl=https://wiki.example.com/hbm",
        "monitoring.rules.labels.release=prometheus",
    )
    rule = rendered.one("PrometheusRule", "hbm")
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    shown = [each for group in rule["spec"]["groups"] for each in group["rules"]]
    assert [each["expr"] for each in shown] == [each["expr"] for each in alerts()]
    for each in shown:
        assert each["annotations"]["runbook_url"].startswith("https://wiki.example.com/hbm#hbm")
