"""NetworkPolicies by shape: which edges are open, read off the rendered objects.

The network plug-in of the e2e's cluster does not enforce them, so this is where they are tested.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from tests.chart.conftest import Render
from tests.chart.rendered import CHART, Object, Rendered

pytestmark = pytest.mark.helm

NAME = "app.kubernetes.io/component"


class Place(NamedTuple):
    """A pod somewhere."""

    namespace: str
    labels: dict[str, str]


def component(namespace: str, name: str, **more: str) -> Place:
    return Place(
        namespace,
        {
            "app.kubernetes.io/name": "hbm-partition",
            "app.kubernetes.io/instance": "hbm",
            NAME: name,
            **more,
        },
    )


CONTROLLER = component("hbm-ns", "controller")
WEBHOOK = component("hbm-ns", "webhook")
REDIS = component("hbm-ns", "redis")
ROUTER = component("models", "router", **{"hbm-partition.io/route": "rank"})
OTHER_ROUTER = component("feeds", "router", **{"hbm-partition.io/route": "feed"})
SERVER = Place("models", {"hbm-partition.io/injected": "true", "app": "rank"})
OTHER_SERVER = Place("feeds", {"hbm-partition.io/injected": "true", "app": "feed"})
STRANGER = Place("somewhere", {"app": "curl"})
SCRAPER = Place("monitoring", {"app": "prometheus"})
API_SERVER = Place("", {})


def selects(selector: Object, labels: dict[str, str]) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for each in selector.get("matchExpressions", []):
        inside = labels.get(each["key"]) in each.get("values", [])
        if {"In": not inside, "NotIn": inside}[each["operator"]]:
            return False
    return True


def peer_matches(peer: Object, place: Place, own_namespace: str) -> bool:
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": place.namespace}
        if not place.namespace or not selects(peer["namespaceSelector"], labels):
            return False
    elif place.namespace != own_namespace:
        return False
    return selects(peer.get("podSelector", {}), place.labels)


def rules_open(rules: list[Object], side: str, other: Place, own_namespace: str, port: int) -> bool:
    return any(
        (not rule.get(side) or any(peer_matches(peer, other, own_namespace) for peer in rule[side]))
        and (not rule.get("ports") or port in [each["port"] for each in rule["ports"]])
        for rule in rules
    )


def is_open(rendered: Rendered, source: Place, target: Place, port: int) -> bool:
    """Whether both ends allow the connection."""

    def end(place: Place, direction: str, side: str, other: Place) -> bool:
        policies = [
            each["spec"]
            for each in rendered.of_kind("NetworkPolicy")
            if each["metadata"]["namespace"] == place.namespace
            and selects(each["spec"]["podSelector"], place.labels)
            and direction.capitalize() in each["spec"]["policyTypes"]
        ]
        return not policies or any(
            rules_open(policy.get(direction, []), side, other, place.namespace, port)
            for policy in policies
        )

    return end(source, "egress", "to", target) and end(target, "ingress", "from", source)


@pytest.fixture(scope="module")
def rendered(render: Render) -> Rendered:
    return render(CHART / "ci" / "full-values.yaml")


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (CONTROLLER, REDIS, 6379),
        (CONTROLLER, API_SERVER, 6443),
        (CONTROLLER, WEBHOOK, 9443),
        (API_SERVER, WEBHOOK, 9443),
        (SERVER, REDIS, 6379),
        (OTHER_SERVER, REDIS, 6379),
        (SERVER, API_SERVER, 443),
        (ROUTER, REDIS, 6379),
        (OTHER_ROUTER, REDIS, 6379),
        (ROUTER, API_SERVER, 443),
        (ROUTER, SERVER, 8000),
        (OTHER_ROUTER, OTHER_SERVER, 8000),
        (STRANGER, ROUTER, 8080),
        (SCRAPER, CONTROLLER, 8080),
        (SCRAPER, WEBHOOK, 8080),
        (SCRAPER, ROUTER, 8081),
        (SCRAPER, SERVER, 9400),
    ],
)
def test_edges_that_are_needed_are_open(
    rendered: Rendered, source: Place, target: Place, port: int
) -> None:
    assert is_open(rendered, source, target, port)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (STRANGER, REDIS, 6379),
        (SCRAPER, REDIS, 6379),
        (WEBHOOK, REDIS, 6379),
        (component("elsewhere", "router"), REDIS, 6379),
        (ROUTER, OTHER_SERVER, 8000),
        (OTHER_ROUTER, SERVER, 8000),
        (STRANGER, ROUTER, 8081),
        (STRANGER, CONTROLLER, 8080),
        (STRANGER, WEBHOOK, 8080),
        (STRANGER, SERVER, 8000),
        (REDIS, API_SERVER, 443),
    ],
)
def test_edges_that_nobody_needs_are_closed(
    rendered: Rendered, source: Place, target: Place, port: int
) -> None:
    assert not is_open(rendered, source, target, port)


def test_an_external_redis_is_reached_by_its_address(render: Render) -> None:
    rendered = render(CHART / "ci" / "external-values.yaml")
    router = rendered.one("NetworkPolicy", "pool-router-a", "team-a")
    assert {"to": [{"ipBlock": {"cidr": "10.20.0.0/16"}}]} in router["spec"]["egress"]


def test_namespaces_of_users_are_left_alone_unless_they_are_named(render: Render) -> None:
    rendered = render(None, "networkPolicy.enabled=true")
    assert {each["metadata"]["namespace"] for each in rendered.of_kind("NetworkPolicy")} == {
        "hbm-ns"
    }
