"""The webhook's configuration for an API server whose webhooks listen on loopback."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("webhook-configuration.yaml")


def configuration(
    name: str, address: str, namespaces: list[str], authority: bytes | None
) -> dict[str, Any]:
    """As the chart renders it, with addresses instead of a Service, for some namespaces only.

    Args:
        name: of the object.
        address: https://HOST:PORT.
        namespaces: the API server is shared; nobody else's pods are to be sent.
        authority: PEM; None: left unset, as the chart does where the operator fills it in.
    """
    content: dict[str, Any] = yaml.safe_load(FILE.read_text())
    content["metadata"]["name"] = name
    for webhook in content["webhooks"]:
        path = webhook["clientConfig"]["service"]["path"]
        webhook["clientConfig"] = {"url": f"{address}{path}"}
        if authority is not None:
            webhook["clientConfig"]["caBundle"] = base64.b64encode(authority).decode()
        webhook["namespaceSelector"]["matchExpressions"].append(
            {"key": "kubernetes.io/metadata.name", "operator": "In", "values": namespaces}
        )
    return content
