"""Each folder of `golden/`: a pod as it is asked for, and what becomes of it.

`pod.yaml` goes in, with `facts.yaml` where the namespace or the settings matter; `expected.yaml`
holds the outcome, what the author is told, and the pod (left out where it is unchanged). After an
intended change: `HBM_UPDATE_GOLDEN=1 pytest tests/hbm_operator/injector`, and read the diff.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import jsonpatch
import pytest
import yaml
from hbm_operator.injector import InjectionSettings, NamespaceFacts, inject, json_patch

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(folder.name for folder in GOLDEN.iterdir())


def _load(folder: Path) -> tuple[dict[str, Any], NamespaceFacts, InjectionSettings]:
    facts_file = folder / "facts.yaml"
    facts = yaml.safe_load(facts_file.read_text()) if facts_file.exists() else {}
    namespace = NamespaceFacts("shop", **{"opted_in": False, **facts.get("namespace", {})})
    settings = InjectionSettings(
        image="hbm-partition/sidecar:0.1.0", version="0.1.0", **facts.get("settings", {})
    )
    return yaml.safe_load((folder / "pod.yaml").read_text()), namespace, settings


@pytest.mark.parametrize("case", CASES)
def test_pod_becomes_what_is_written_down(case: str) -> None:
    folder = GOLDEN / case
    pod, namespace, settings = _load(folder)
    given = copy.deepcopy(pod)
    result = inject(pod, namespace, settings)
    assert pod == given, "the given pod was edited"

    observed: dict[str, Any] = {"outcome": str(result.outcome)}
    if result.skip_reason:
        observed["reason"] = str(result.skip_reason)
    if result.denied:
        observed["denied"] = result.denied
    if result.warnings:
        observed["warnings"] = list(result.warnings)
    if result.pod != pod:
        observed["pod"] = result.pod
    expected = folder / "expected.yaml"
    if os.environ.get("HBM_UPDATE_GOLDEN"):
        expected.write_text(yaml.safe_dump(observed, sort_keys=False, width=100))
    assert observed == yaml.safe_load(expected.read_text())


@pytest.mark.parametrize("case", CASES)
def test_second_call_changes_nothing(case: str) -> None:
    pod, namespace, settings = _load(GOLDEN / case)
    once = inject(pod, namespace, settings).pod
    assert inject(once, namespace, settings).pod == once


@pytest.mark.parametrize("case", CASES)
def test_patch_makes_the_same_pod_and_replaces_nothing(case: str) -> None:
    pod, namespace, settings = _load(GOLDEN / case)
    after = inject(pod, namespace, settings).pod
    patch = json_patch(pod, after)
    assert jsonpatch.apply_patch(pod, patch) == after
    assert {operation["op"] for operation in patch} <= {"add", "remove"}
