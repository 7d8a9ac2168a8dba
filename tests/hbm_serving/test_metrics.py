"""`/metrics` and the document that lists it say the same."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics-serving.md"
BODY = {"history": {"items": [1, 2], "timestamps": [1, 2]}, "candidates": [3]}


def documented() -> dict[str, tuple[str, set[str]]]:
    found = {}
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 3 and (name := re.fullmatch(r"`(hbm_\w+)`", cells[1])):
            labels = {label.strip(" `") for label in cells[3].split(",")} - {""}
            found[name[1]] = cells[2], labels
    return found


def test_document_and_scrape_agree(client: httpx.Client) -> None:
    assert client.post("/v1/rank", json=BODY).status_code == 200
    text = client.get("/metrics").text
    scraped = {}
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        scraped[name] = family.type, labels
        assert family.documentation, name
    assert scraped == documented()


def test_counters_follow_the_requests(client: httpx.Client) -> None:
    def value(name: str) -> float:
        for family in text_string_to_metric_families(client.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and not sample.labels:
                    return sample.value
        raise AssertionError(f"{name} is not there")

    ranked, candidates, context = (
        value("hbm_serving_ranked_total"),
        value("hbm_serving_candidate_tokens_total"),
        value("hbm_serving_context_tokens_total"),
    )
    for _ in range(3):
        assert client.post("/v1/rank", json=BODY).status_code == 200
    assert client.post("/v1/rank", json={}).status_code == 422
    assert value("hbm_serving_ranked_total") == ranked + 3
    assert value("hbm_serving_candidate_tokens_total") == candidates + 3
    # Tokens 1 and 2 of the history attend to 1 and 2 tokens, the candidate to both.
    assert value("hbm_serving_context_tokens_total") == context + 3 * (1 + 2 + 2)
